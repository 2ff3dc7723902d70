"""Peak memory of loading and exporting a LLaMA of 1.1 billion random parameters in every layout.

    python tests/big_checkpoint.py

pytest does not collect this: it writes 2.2 GB (bfloat16) at a time into a temporary folder, and
exports take as much again. Each load and each export runs in a process of its own. Its peak is the
kernel's VmHWM: everything that is resident, the interpreter, PyTorch and the mapped pages of the
files included. The limit is 1.15 times the model, in the dtype that it is loaded or written in,
plus 300 MB. Exit code 1 if one is above. --layers 4 is a third of a billion.
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

SHAPE = dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=32000, ffn_dim=8192,
             max_seq_len=4096)  # nearly LLaMA 3.2 1B
LAYOUTS = ("Meta", "Meta, 2 parts", "Hugging Face", "Hugging Face, 5 parts", "Hugging Face .bin",
           "GGUF BF16", "GGUF Q8_0")
ACTIONS = ("bfloat16", "float32", "hf", "meta")  # load in this dtype, or export to this layout
MEASURE = """
import json, sys, time, torch
from pathlib import Path
from weights import load_model
from weights.export import export
model, action, out = sys.argv[1:]
started = time.perf_counter()
if action in ("bfloat16", "float32"):
    load_model(model, dtype=getattr(torch, action))
else:
    export(model, action, out)
seconds = time.perf_counter() - started
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps({"seconds": seconds, "peak": peak}))
"""


def make(layout, layers, path):
    """Write the checkpoint: random numbers, the same block of them in every tensor."""
    import torch

    from model import LLaMA, ModelConfig
    from weights import save_model
    from weights.export import export_hugging_face
    with torch.device("meta"):
        model = LLaMA(ModelConfig(**SHAPE | {"n_layers": layers}))
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(2**20, generator=generator) * 0.02).bfloat16()
    if layout.startswith("GGUF"):
        make_gguf(layout.split()[1], model, block, path)
        return
    tensors = {}
    for name, p in model.named_parameters():
        copies = -(-p.numel() // len(block))
        tensors[name] = block.repeat(copies)[:p.numel()].view(p.shape)
    model.load_state_dict(tensors, assign=True)
    size = sum(p.nbytes for p in tensors.values())
    if layout == "Meta":
        save_model(model, path)
    elif layout == "Meta, 2 parts":
        save_model(model, path)
        for n in range(2):
            torch.save(half(tensors, n), path / f"consolidated.{n:02d}.pth")
    elif layout == "Hugging Face":
        export_hugging_face(model, path, shard_bytes=size)
    elif layout == "Hugging Face, 5 parts":
        export_hugging_face(model, path, shard_bytes=size // 4)
    else:
        make_bin(model, tensors, path)


def half(tensors, n):
    """Part n of two of a Meta checkpoint."""
    part = {}
    for name, p in tensors.items():
        if p.dim() == 1:
            part[name] = p
        else:
            dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            part[name] = p.chunk(2, dim)[n].clone()
    return part


def make_bin(model, tensors, path):
    """A Hugging Face folder with pytorch_model.bin."""
    import torch

    from weights.export import export_hugging_face
    from weights.hugging_face import hugging_face_name, reorder_rows
    export_hugging_face(model, path)
    (path / "model.safetensors").unlink()
    renamed = {}
    for name, p in tensors.items():
        renamed[hugging_face_name(name)] = reorder_rows(model.config, name, p, inverse=True)
    torch.save(renamed, path / "pytorch_model.bin")


def make_gguf(kind, model, block, path):
    import gguf
    import numpy as np
    import torch

    from weights.gguf import gguf_name
    config = model.config
    kind = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"context_length": config.max_seq_len,
                       "embedding_length": config.dim,
                       "block_count": config.n_layers,
                       "feed_forward_length": config.ffn_dim,
                       "attention.head_count": config.n_heads,
                       "attention.head_count_kv": config.n_kv_heads}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.norm_eps)
    if kind.name == "BF16":
        data = block.view(torch.uint8).numpy()
    else:
        data = gguf.quants.quantize(block.float().numpy()[None], kind)
    numbers_in_block, bytes_of_block = gguf.GGML_QUANT_SIZES[kind]
    for name, p in model.named_parameters():
        if p.dim() == 1:
            writer.add_tensor(gguf_name(name), np.ones(p.shape, np.float32))
        else:
            row_bytes = p.shape[1] // numbers_in_block * bytes_of_block
            rows = np.resize(data, (p.shape[0], row_bytes))
            writer.add_tensor(gguf_name(name), rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(path, action, out):
    """{"seconds", "peak"} of one load or export in a process of its own. peak: bytes."""
    command = [sys.executable, "-c", MEASURE, path, action, out]
    shown = subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return json.loads(shown.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", help="where to write the checkpoints, a disk with 8 GB free "
                                      "[a temporary folder]")
    parser.add_argument("--layers", type=int, default=SHAPE["n_layers"],
                        help="of the model [%(default)s]")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS, metavar="LAYOUT",
                        help=f"some of {', '.join(LAYOUTS)} [all]")
    # Writes one checkpoint, in a process whose memory is nobody else's.
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.make[0], given.layers, Path(given.make[1]))
        return 0

    from model import ModelConfig
    from weights.size import parameter_count
    parameters = parameter_count(ModelConfig(**SHAPE | {"n_layers": given.layers}))
    print(f"{parameters:,} parameters\n{'layout':<22}{'what':<18}{'model MB':>9}{'peak MB':>9}"
          f"{'limit MB':>9}{'ratio':>7}{'seconds':>9}")
    above = False
    for layout in given.layouts:
        with tempfile.TemporaryDirectory(dir=given.dir) as folder:
            path = f"{folder}/model.gguf" if "GGUF" in layout else f"{folder}/model"
            subprocess.run([sys.executable, __file__, "--layers", str(given.layers),
                            "--make", layout, path], check=True)
            for action in ACTIONS:
                measured = measure(path, action, f"{folder}/out")
                shutil.rmtree(f"{folder}/out", ignore_errors=True)
                exporting = action in ("hf", "meta")
                in_float32 = action == "float32" or exporting and "Q8" in layout
                size = parameters * (4 if in_float32 else 2)
                limit = 1.15 * size + 300e6
                above = above or measured["peak"] > limit
                what = f"export to {action}" if exporting else f"load as {action}"
                print(f"{layout:<22}{what:<18}{size / 1e6:9.0f}{measured['peak'] / 1e6:9.0f}"
                      f"{limit / 1e6:9.0f}{measured['peak'] / size:7.2f}"
                      f"{measured['seconds']:9.1f}", flush=True)
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
