"""The repository's root is on the path, from wherever pytest is started; and a corpus that is made
in a second."""
import contextlib
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Packages of requirements-extra.txt: a test that needs one is skipped where it is not installed.
EXTRAS = {line.split(">=")[0].split()[0].replace("-", "_")
          for line in (ROOT / "requirements-extra.txt").read_text("utf-8").splitlines()
          if line.strip() and not line.startswith("#")}
# Tensors here are tiny: handing them to a second thread costs more than it brings. The same in
# commands that tests start: their threads would wait for each other, busily, on a core that works.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# It is for power failures: what a killed process has written stays. Tests save some 6,000 files.
os.fsync = lambda file: None


# ---- Long work at the side -----------------------------------------------------------------------
#
# A test file with a function begin(folder) starts processes that take a while. They begin before
# the first test of all, and the tests that want them come last. One core is kept for the other
# tests: beside a dozen processes they would get a fifth of it. And ranks that wait for each other
# on two cores take half as much time again.

BEGUN = {}  # test module: (the process that begin() returned, its folder)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "begun" in item.fixturenames)


def pytest_collection_finish(session):
    if session.config.option.collectonly:
        return
    gc.collect()
    gc.freeze()     # a million objects of PyTorch: looking through them took an eighth of the time
    waiting = [item.module for item in session.items if "begun" in item.fixturenames]
    for module in dict.fromkeys(waiting):
        folder = Path(tempfile.mkdtemp(prefix=f"{module.__name__}-"))
        with on_all_cores_but_one():
            BEGUN[module.__name__] = module.begin(folder), folder


@contextlib.contextmanager
def on_all_cores_but_one():
    """Where processes begin meanwhile, if the system can say so (Linux)."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    if len(cores) > 1:
        os.sched_setaffinity(0, cores - {min(cores)})
    try:
        yield
    finally:
        if len(cores) > 1:
            os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module")
def begun(request):
    return BEGUN[request.module.__name__]


def pytest_sessionfinish():
    for process, folder in BEGUN.values():
        if process is not None:
            with contextlib.suppress(ProcessLookupError):     # it and its children have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


# ---- For all tests -------------------------------------------------------------------------------

@pytest.fixture(autouse=True, scope="function")
def one_thread():
    """Some tests change the number of threads or the precision of float32 products. Left so, the
    last digits of later tests would change."""
    yield
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def tokenizer():
    from data.tokenizer import Tokenizer
    return Tokenizer(ROOT / "data" / "tiny" / "tokenizer.model")


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory, tokenizer):
    """A token folder of 30 documents of a few thousand tokens each, some for validation. Nobody may
    change it: it serves all tests."""
    from data.prepare import PrepareConfig, prepare
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    names = ["value", "index", "items", "result", "count", "name"]
    for n in range(30):
        lines = [f"def function_{n}(self):\n"]
        for _ in range(400):
            lines.append(f"    {rng.choice(names)} = {rng.choice(names)}[{rng.randrange(10)}] "
                         f"+ {rng.choice(names)}\n")
        (folder / f"{n}.py").write_text("".join(lines), encoding="utf-8")
    return prepare(PrepareConfig(text=[str(folder)], tokenizer=str(tokenizer.path),
                                 val_fraction=0.2, out=str(folder / "tokens")))
