"""The modules of the repository's root are imported flat, from wherever pytest is started. And a corpus that is made in a second."""
import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tensors here are tiny: handing them to a second thread costs more than it brings


@pytest.fixture(autouse=True, scope="function")
def one_thread():
    """Another number of threads, or how float32 is multiplied, which some tests want, changes the last digits of what later ones compute."""
    yield
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def tokenizer():
    from data.tokenizer import Tokenizer
    return Tokenizer(ROOT / "data" / "tiny" / "tokenizer.model")


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory, tokenizer):
    """A token folder of 30 documents of a few thousand tokens each, some for validation. Nobody may change it: it serves all tests."""
    from data.prepare import PrepareConfig, prepare
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    names = ["value", "index", "items", "result", "count", "name"]
    for n in range(30):
        lines = [f"    {rng.choice(names)} = {rng.choice(names)}[{rng.randrange(10)}] + {rng.choice(names)}\n" for _ in range(400)]
        (folder / f"{n}.py").write_text(f"def function_{n}(self):\n" + "".join(lines), encoding="utf-8")
    return prepare(PrepareConfig(text=[str(folder)], tokenizer=str(tokenizer.path), val_fraction=0.2, out=str(folder / "tokens")))
