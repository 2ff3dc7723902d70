"""A training that takes a second: rows of a toy language, a tiny model, and what a run leaves."""
import hashlib
import json
import os
import signal
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten_with_path

from model import LLaMA, ModelConfig
from train import FitConfig, fit

V, T = 13, 12  # vocabulary and row length


def toy_batches(step, first=0, last=8, rows=8):
    """Rows a, a+b, a+2b, ... modulo V: two tokens decide the next. A function of (step, row), as
    data.batches.Batches is."""
    tokens = []
    for row in range(first, min(last, rows)):
        start, stride = step * 5 + row * 3, 1 + (step + row) % 4
        tokens.append([(start + stride * t) % V for t in range(T + 1)])
    tokens = torch.tensor(tokens)
    return tokens[:, :-1], tokens[:, 1:]


def tiny_model(seed=0, **shape):
    torch.manual_seed(seed)
    defaults = dict(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=V, multiple_of=8,
                    max_seq_len=T)
    return LLaMA(ModelConfig(**{**defaults, **shape}))


def settings(out, **changes):
    """Twenty steps, a checkpoint after every fifth."""
    defaults = dict(out=str(out), steps=20, batch_size=4, warmup=3, save_every=5, log_every=1,
                    eval_every=1000)
    return FitConfig(**{**defaults, **changes})


def train_tiny(out, batches=toy_batches, evaluate=None, **changes):
    model = tiny_model()
    fit(model, settings(out, **changes), batches, evaluate)
    return model


# ---- What a run leaves ---------------------------------------------------------------------------


def read_state(folder):
    return torch.load(Path(folder) / "state.pt", weights_only=True)


def read_metrics(folder):
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def logged_steps(folder):
    return [line["step"] for line in read_metrics(folder)]


def fingerprint(folder):
    """A hash of every bit that a run leaves: the weights in the model's folder, and the state
    without its clock and its settings."""
    state = read_state(folder)
    del state["seconds"], state["settings"]
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True)
    digest = hashlib.sha256()
    for path, leaf in tree_flatten_with_path([state, weights])[0]:
        digest.update(repr(path).encode())
        is_tensor = isinstance(leaf, torch.Tensor)
        digest.update(leaf.numpy().tobytes() if is_tensor else repr(leaf).encode())
    return digest.hexdigest()


# ---- Interruptions -------------------------------------------------------------------------------


class Died(Exception):
    pass


def dying(at):
    """Batches that fail at step `at`."""
    def batches(step, *share):
        if step == at:
            raise Died
        return toy_batches(step, *share)
    return batches


def interrupting(at):
    """Batches that send this process SIGINT, as Ctrl-C does, when step `at` is asked for."""
    def batches(step, *share):
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return toy_batches(step, *share)
    return batches
