"""Peak memory of loading and exporting a synthetic LLaMA of 1.1 billion parameters in every layout: python tests/big_checkpoint.py

pytest does not collect this: it writes 2.2 GB (bfloat16) at a time into a temporary folder, and exports take as much again. Each load and
each export runs in a process of its own, whose peak is the kernel's VmHWM: everything that is resident, the interpreter, PyTorch and the
mapped pages of the files included. The limit is 1.15 times the model, in the dtype that it is loaded or written in, plus 300 MB. Exit code
1 if one is above. --layers 4 is a third of a billion.
"""
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPE = dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=32000, ffn_dim=8192, max_seq_len=4096)  # nearly LLaMA 3.2 1B
LAYOUTS = ("Meta", "Meta, 2 parts", "Hugging Face", "Hugging Face, 5 parts", "Hugging Face .bin", "GGUF BF16", "GGUF Q8_0")
MEASURE = """
import json, sys, time, torch
from pathlib import Path
import weights
model, action, out = sys.argv[1:]
started = time.perf_counter()
if action in ("bfloat16", "float32"):
    weights.load_model(model, dtype=getattr(torch, action))
else:
    weights.main(["export", "--model", model, "--to", action, "--out", out])
seconds = time.perf_counter() - started
peak = next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps({"seconds": seconds, "peak": peak}))
"""


def make(layout, layers, path):
    """Write the checkpoint: random numbers, the same block of them in every tensor."""
    import torch
    from huggingface import export_hugging_face, hugging_face_name, reorder
    from model import LLaMA, ModelConfig
    from weights import save_model
    with torch.device("meta"):
        model = LLaMA(ModelConfig(**SHAPE | {"n_layers": layers}))
    block = (torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    if layout.startswith("GGUF"):
        return make_gguf(layout.split()[1], model, block, path)
    weights = {name: block.repeat(-(-p.numel() // len(block)))[:p.numel()].view(p.shape) for name, p in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    if layout == "Meta":
        save_model(model, path)
    elif layout == "Meta, 2 parts":
        save_model(model, path)
        for n in range(2):
            part = {name: p if p.dim() == 1 else p.chunk(2, 1 if name.endswith(("wo.weight", "w2.weight")) else 0)[n].clone()
                    for name, p in weights.items()}
            torch.save(part, path / f"consolidated.{n:02d}.pth")
    elif layout == "Hugging Face .bin":
        export_hugging_face(model, path)
        (path / "model.safetensors").unlink()
        torch.save({hugging_face_name(name): reorder(model.config, name, p, inverse=True) for name, p in weights.items()},
                   path / "pytorch_model.bin")
    else:
        size = sum(p.nbytes for p in weights.values())
        export_hugging_face(model, path, shard_bytes=size if layout == "Hugging Face" else size // 4)


def make_gguf(kind, model, block, path):
    import gguf
    import numpy as np
    import torch
    from gguf_model import gguf_name
    config, writer, kind = model.config, gguf.GGUFWriter(path, "llama"), gguf.GGMLQuantizationType[kind]
    for key, value in (("context_length", config.max_seq_len), ("embedding_length", config.dim), ("block_count", config.n_layers),
                       ("feed_forward_length", config.ffn_dim), ("attention.head_count", config.n_heads),
                       ("attention.head_count_kv", config.n_kv_heads)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.norm_eps)
    in_block, in_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = block.view(torch.uint8).numpy() if kind.name == "BF16" else gguf.quants.quantize(block.float().numpy()[None], kind)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            writer.add_tensor(gguf_name(name), np.ones(p.shape, np.float32))
        else:
            writer.add_tensor(gguf_name(name), np.resize(data, (p.shape[0], p.shape[1] // in_block * in_bytes)), raw_dtype=kind)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", help="where to write the checkpoints, a disk with 8 GB free [a temporary folder]")
    parser.add_argument("--layers", type=int, default=SHAPE["n_layers"], help="of the model [%(default)s]")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS, metavar="LAYOUT",
                        help=f"some of {', '.join(LAYOUTS)} [all]")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)  # a process of its own, whose memory is nobody else's
    given = parser.parse_args()
    if given.make:
        return make(given.make[0], given.layers, Path(given.make[1]))
    from model import ModelConfig
    parameters = ModelConfig(**SHAPE | {"n_layers": given.layers}).parameters()
    print(f"{parameters:,} parameters\n{'layout':<22}{'what':<18}{'model MB':>9}{'peak MB':>9}{'limit MB':>9}{'ratio':>7}{'seconds':>9}")
    above = False
    for layout in given.layouts:
        with tempfile.TemporaryDirectory(dir=given.dir) as folder:
            path = f"{folder}/model" + (".gguf" if "GGUF" in layout else "")
            subprocess.run([sys.executable, __file__, "--layers", str(given.layers), "--make", layout, path], check=True)
            for action in ("bfloat16", "float32", "hf", "meta"):
                shown = subprocess.run([sys.executable, "-c", MEASURE, path, action, f"{folder}/out"], check=True, cwd=ROOT,
                                       capture_output=True)
                got = json.loads(shown.stdout.splitlines()[-1])
                size = parameters * (4 if action == "float32" or "Q8" in layout and action in ("hf", "meta") else 2)
                limit = 1.15 * size + 300e6
                above |= got["peak"] > limit
                what = f"export to {action}" if action in ("hf", "meta") else f"load as {action}"
                print(f"{layout:<22}{what:<18}{size / 1e6:9.0f}{got['peak'] / 1e6:9.0f}{limit / 1e6:9.0f}{got['peak'] / size:7.2f}"
                      f"{got['seconds']:9.1f}", flush=True)
                shutil.rmtree(f"{folder}/out", ignore_errors=True)
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
