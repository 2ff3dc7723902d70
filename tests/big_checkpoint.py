"""Peak memory of loading a synthetic LLaMA of 1.1 billion parameters in every layout: python tests/big_checkpoint.py

pytest does not collect this: it writes 2.2 GB (bfloat16) at a time into a temporary folder. Each load runs in a process of its own, whose
peak is the kernel's VmHWM: everything that is resident, the interpreter, PyTorch and the mapped pages of the files included. The limit is
1.15 times the model, in the dtype that it is loaded in, plus 300 MB. Exit code 1 if one is above.
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
LOAD = """
import json, sys, time, torch
from pathlib import Path
from weights import load_model
started = time.perf_counter()
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
seconds = time.perf_counter() - started
peak = next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps({"seconds": seconds, "peak": peak, "model": sum(p.nbytes for p in model.parameters())}))
"""


def make(layout, folder):
    """Write the checkpoint: random numbers, the same block of them in every tensor."""
    import torch
    from huggingface import export_hugging_face, hugging_face_name, reorder
    from model import LLaMA, ModelConfig
    from weights import save_model
    with torch.device("meta"):
        model = LLaMA(ModelConfig(**SHAPE))
    block = (torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    weights = {name: block.repeat(-(-p.numel() // len(block)))[:p.numel()].view(p.shape) for name, p in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    if layout == "Meta":
        save_model(model, folder)
    elif layout == "Meta, 2 parts":
        save_model(model, folder)
        for n in range(2):
            part = {name: p if p.dim() == 1 else p.chunk(2, 1 if name.endswith(("wo.weight", "w2.weight")) else 0)[n].clone()
                    for name, p in weights.items()}
            torch.save(part, folder / f"consolidated.{n:02d}.pth")
    elif layout == "Hugging Face .bin":
        export_hugging_face(model, folder)
        (folder / "model.safetensors").unlink()
        torch.save({hugging_face_name(name): reorder(model.config, name, p, inverse=True) for name, p in weights.items()},
                   folder / "pytorch_model.bin")
    else:
        export_hugging_face(model, folder, shard_bytes=5 * 10**9 if layout == "Hugging Face" else 5 * 10**8)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", help="where to write the checkpoints, a disk with 5 GB free [a temporary folder]")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)  # a process of its own, whose memory is nobody else's
    given = parser.parse_args()
    if given.make:
        return make(given.make[0], Path(given.make[1]))
    print(f"{'layout':<22}{'loaded as':<11}{'model MB':>9}{'peak MB':>9}{'limit MB':>9}{'ratio':>7}{'seconds':>9}")
    above = False
    for layout in ("Meta", "Meta, 2 parts", "Hugging Face", "Hugging Face, 5 parts", "Hugging Face .bin"):
        with tempfile.TemporaryDirectory(dir=given.dir) as folder:
            subprocess.run([sys.executable, __file__, "--make", layout, f"{folder}/model"], check=True)
            for dtype in ("bfloat16", "float32"):
                shown = subprocess.run([sys.executable, "-c", LOAD, f"{folder}/model", dtype], check=True, cwd=ROOT, capture_output=True)
                got = json.loads(shown.stdout)
                limit = 1.15 * got["model"] + 300e6
                above |= got["peak"] > limit
                print(f"{layout:<22}{dtype:<11}{got['model'] / 1e6:9.0f}{got['peak'] / 1e6:9.0f}{limit / 1e6:9.0f}"
                      f"{got['peak'] / got['model']:7.2f}{got['seconds']:9.1f}", flush=True)
            shutil.rmtree(f"{folder}/model")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
