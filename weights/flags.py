"""Flags that name a model, its positions and its arithmetic: shared by all evaluations."""
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from common.cli import field
from common.device import choose_device, choose_dtype, describe_device, dtype_name
from common.errors import UserError
from data.tokenizer import Tokenizer
from methods import METHODS, RopeConfig, parse_rope_flag
from model import LLaMA, ModelConfig
from weights.load import load_config, load_model
from weights.size import parameter_count
from weights.tokenizer import load_tokenizer


@dataclass
class ModelFlags:
    model: str = field("data/tiny", "Meta's folder, Hugging Face's, or a .gguf file")
    rope: str | None = field(None, "method to use instead of the folder's own: default, linear "
                             "(= pi), ntk, yarn, rerope, ..., or a JSON object")
    factor: float | None = field(None, "s = target window / original window, for --rope")
    seed: int = field(0, "of keys and samples")
    out: str = field("", "JSON file to write")
    device: str = field("auto", "auto, cpu, cuda or mps")
    dtype: str = field("float32", "of the weights",
                       choices=["auto", "float32", "bfloat16", "float16"])
    matmul: str = field("highest", "how float32 matrices are multiplied, sums in float32: highest "
                        "in float32; high in TF32, on a GPU that has it; medium the same, and in "
                        "bfloat16 on a CPU that has it (AMX)",
                        choices=["highest", "high", "medium"])
    attention: str = field("auto", "auto takes sdpa; for a distance map tiled, or "
                           "flex_attention on a GPU", choices=["auto", "naive", "tiled", "sdpa"])


def rope_from_flags(flags: ModelFlags) -> dict[str, Any] | None:
    """--rope and --factor as a dict for load_model; None keeps the folder's own."""
    if flags.rope is None:
        if flags.factor is not None:
            raise UserError(f"--factor {flags.factor:g} needs --rope: which method stretches the "
                            "window? (linear: Position Interpolation)")
        return None
    rope = parse_rope_flag(flags.rope)
    name, factor = rope["rope_type"], rope.get("factor", flags.factor)
    method = METHODS[name]
    if flags.factor not in (None, factor):
        raise UserError(f"--factor {flags.factor:g} and factor {factor} in --rope contradict "
                        "each other: give one of them")
    fixed_stretch = method.extends_rope and not method.length_dependent and name != "default"
    if factor is None and fixed_stretch:
        raise UserError(f"--rope {flags.rope} needs --factor: how many times longer does the "
                        "window become?")
    return rope | {"factor": 1.0 if factor is None else factor}


def load_from_flags(flags: ModelFlags, quiet: bool = False
                    ) -> tuple[LLaMA, Tokenizer]:
    """The model and tokenizer that the flags name, and the header that every evaluation prints
    first. --matmul is set for the whole process."""
    device = choose_device(flags.device)
    rope = rope_from_flags(flags)
    torch.set_float32_matmul_precision(flags.matmul)
    model = load_model(flags.model, rope=rope, device=device,
                       dtype=choose_dtype(flags.dtype, device), attention=flags.attention)
    tokenizer = load_tokenizer(flags.model, model.config.vocab_size)
    if rope is not None:
        warn_if_shorter(load_config(flags.model), model.config.max_seq_len)
    if not quiet:
        print_model_header(flags, model, tokenizer)
    return model, tokenizer


def warn_if_shorter(base: ModelConfig, window: int) -> None:
    """Warn if a model that is stretched already (LLaMA 3.1: 8192 -> 131072) is given another
    stretched window, and a shorter one. Its scaling taken off, for a comparison, is no mistake."""
    L, own = base.original_window, base.max_seq_len
    if L < window < own:
        warnings.warn(f"the target window {window} is shorter than the model's own, {own}: a "
                      f"factor counts from the original window {L}, so ask for a --factor above "
                      f"{own / L:g}", stacklevel=1)


def print_model_header(flags: ModelFlags, model: LLaMA, tokenizer: Tokenizer
                       ) -> None:
    dtype = dtype_name(model.tok_embeddings.weight.dtype)
    if dtype == "float32" and flags.matmul != "highest":
        dtype += f" (matmul {flags.matmul})"
    config = model.config
    attention = describe_attention(flags.attention, config.rope, model.device)
    print(f"device     {describe_device(model.device)}, {dtype}, attention {attention}")
    print(f"model      {flags.model}, {parameter_count(config):,} parameters, "
          f"window {config.original_window} -> {config.max_seq_len}, rope {config.rope.to_dict()}")
    print(f"tokenizer  {tokenizer.vocab_size:,} pieces, {tokenizer.policy}")


def describe_attention(name: str, rope: RopeConfig, device: torch.device) -> str:
    """The implementation in words: what `auto` takes."""
    if METHODS[rope.rope_type].distance_map is None:
        return "auto (sdpa, the fused kernels)" if name == "auto" else name
    if name in ("naive", "tiled"):
        return name
    if device.type == "cuda":
        return f"{name} (flex_attention, band by band)"
    return f"{name} (tiled, which can merge bands)"
