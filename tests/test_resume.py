"""A training that is interrupted, runs out of disk or diverges: it goes on as the same run, bit for
bit, or stops with one line and keeps its last good checkpoint."""
import dataclasses
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from common.errors import Stopped, UserError
from finetune import FinetuneConfig
from toy_training import (Died, dying, fingerprint, interrupting, logged_steps, read_metrics,
                          read_state, settings, tiny_model, toy_batches, train_tiny)
from train import FitConfig, TrainConfig, fit, make_optimizer
from training.state import resumable_settings
from weights import load_model
from weights.save import save_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train_tiny(folder)
    return folder


# ---- Beginning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["consolidated.00.pth", "consolidated.01.pth", "params.json",
                                  "config.json", "adapter_config.json"])
def test_a_model_that_no_training_left_is_not_written_over(tmp_path, name, fresh):
    (tmp_path / name).write_text("of great value", encoding="utf-8")
    with pytest.raises(UserError, match="holds a model, and no state of a training that could go "
                                        "on: choose another --out"):
        train_tiny(tmp_path, fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text(encoding="utf-8") == "of great value"


def test_a_run_without_its_state_begins_again_where_that_harms_nobody(tmp_path):
    """Killed between the first model and its state, it does by itself; another one with --fresh."""
    train_tiny(tmp_path, steps=5)
    before = fingerprint(tmp_path)
    (tmp_path / "state.pt").unlink()
    train_tiny(tmp_path, steps=5)
    assert fingerprint(tmp_path) == before
    (tmp_path / "state.pt").unlink()
    with pytest.raises(UserError, match="holds a model, and no state"):
        train_tiny(tmp_path, steps=5, lr=0.5)
    train_tiny(tmp_path, steps=5, lr=0.5, fresh=True)
    assert fingerprint(tmp_path) != before


# ---- Going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, accumulate", [("float32", 1), ("float32", 2), ("bfloat16", 1)])
def test_resume_is_bit_exact(tmp_path, dtype, accumulate):
    changes = dict(dtype=dtype, accumulate=accumulate, batch_size=4 // accumulate)
    train_tiny(tmp_path / "whole", **changes)
    for at in (3, 13, 17):  # before the first checkpoint, and twice later
        with pytest.raises(Died):
            train_tiny(tmp_path / "parts", dying(at), **changes)
    train_tiny(tmp_path / "parts", **changes)
    assert read_state(tmp_path / "parts")["step"] == 20
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


def test_resume_goes_on_from_the_last_checkpoint(tmp_path, uninterrupted):
    with pytest.raises(Died):
        train_tiny(tmp_path, dying(14))
    assert read_state(tmp_path)["step"] == 10
    assert logged_steps(tmp_path) == list(range(1, 15))
    asked = []

    def spy(step, *share):
        asked.append(step)
        return toy_batches(step, *share)
    train_tiny(tmp_path, spy)
    assert asked == list(range(10, 20))
    assert logged_steps(tmp_path) == list(range(1, 21)), "a step is there twice, or missing"

    def learning(folder):
        return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(folder)]
    assert learning(tmp_path) == learning(uninterrupted)


def test_seconds_are_those_of_all_parts(tmp_path):
    with pytest.raises(Died):
        train_tiny(tmp_path, dying(14))
    torch.save({**read_state(tmp_path), "seconds": 1000.0}, tmp_path / "state.pt")
    assert 1000 < fit(tiny_model(), settings(tmp_path), toy_batches) < 2000
    assert 1000 < read_state(tmp_path)["seconds"] < 2000


def test_the_random_generator_goes_on_where_it_was(tmp_path):
    with pytest.raises(Died):
        train_tiny(tmp_path, dying(14))
    torch.manual_seed(1234)
    torch.rand(5)
    expected = torch.get_rng_state()
    torch.save({**read_state(tmp_path), "rng": expected}, tmp_path / "state.pt")
    train_tiny(tmp_path)
    assert torch.equal(torch.get_rng_state(), expected)
    assert torch.equal(read_state(tmp_path)["rng"], expected)


def test_a_cut_line_of_metrics_is_dropped(tmp_path):
    with pytest.raises(Died):
        train_tiny(tmp_path, dying(7))
    with open(tmp_path / "metrics.jsonl", "ab") as file:  # and what no run of ours wrote
        file.write(b'null\n7\n[]\n{"loss": 1}\n{"step": "x"}\n\xff\xfe\n{"step": 8, "lo')
    train_tiny(tmp_path)
    assert logged_steps(tmp_path) == list(range(1, 21))


def times(folder):
    return {file: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_finished_run_returns_at_once(tmp_path):
    first = tiny_model()
    seconds = fit(first, settings(tmp_path), toy_batches)
    files = times(tmp_path)
    again = tiny_model()

    def no_batches(step, *share):
        raise AssertionError("nothing is left to train")
    seconds_again = fit(again, settings(tmp_path), no_batches)
    assert files == times(tmp_path)
    for a, b in zip(first.parameters(), again.parameters()):
        assert torch.equal(a, b), "the model is not the finished one"
    assert seconds_again == seconds > 0, "the time of training, not of finding it finished"


# ---- Ctrl-C --------------------------------------------------------------------------------------


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, uninterrupted):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match=r"stopped at step \d+ of 20 and saved in .*: the same "
                                      "command goes on from there"):
        train_tiny(tmp_path, interrupting(7), save_every=1000)
    stopped = read_state(tmp_path)["step"]
    assert 7 <= stopped <= 9
    assert signal.getsignal(signal.SIGINT) == before
    assert logged_steps(tmp_path)[-1] == stopped
    load_model(tmp_path)
    train_tiny(tmp_path)
    assert fingerprint(tmp_path) == fingerprint(uninterrupted)


@pytest.mark.slow
def test_ctrl_c_at_the_keyboard(corpus_folder, tokenizer, tmp_path):
    """The command itself, as a process that is sent SIGINT once it printed its first validation."""
    flags = (f"--dim 16 --n-layers 1 --n-heads 2 --max-seq-len 80 --steps 1000000 --eval-every 1 "
             f"--batch-size 1 --corpus {corpus_folder} --tokenizer {tokenizer.path} --device cpu "
             f"--out {tmp_path}").split()
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                               env={**os.environ, "PYTHONUNBUFFERED": "1"})
    for line in process.stdout:
        if line.startswith("step 1:"):
            process.send_signal(signal.SIGINT)
            break
    _, error = process.communicate(timeout=600)
    stopped = read_state(tmp_path)["step"]
    assert process.returncode == 130
    assert error == (f"\nstopped at step {stopped} of 1000000 and saved in {tmp_path}: the same "
                     "command goes on from there\n")
    assert logged_steps(tmp_path)[-1] == stopped
    assert load_model(tmp_path)


def pressing(model, presses):
    """A model whose loss sends this process SIGINT presses[n] times in its n-th call, from 0 on.
    Returns the list that counts the calls."""
    calls = []
    loss = model.loss

    def loss_and_ctrl_c(x, y):
        calls.append(len(calls))
        for _ in range(presses.get(calls[-1], 0)):
            signal.raise_signal(signal.SIGINT)
        return loss(x, y)
    model.loss = loss_and_ctrl_c
    return calls


def test_second_ctrl_c_stops_at_once(tmp_path):
    model = tiny_model()
    calls = pressing(model, {1: 2})
    with pytest.raises(KeyboardInterrupt) as stop:
        fit(model, settings(tmp_path), toy_batches)
    assert not isinstance(stop.value, Stopped)
    assert len(calls) == 2
    assert not (tmp_path / "state.pt").exists()


def test_ctrl_c_during_the_last_step_is_a_finished_run(tmp_path, uninterrupted):
    model = tiny_model()
    calls = pressing(model, {19: 1})
    fit(model, settings(tmp_path), toy_batches)
    assert len(calls) == 20
    assert fingerprint(tmp_path) == fingerprint(uninterrupted)


# ---- Whether it is the same run ------------------------------------------------------------------


@pytest.mark.parametrize("name, value", dict(
    lr=0.001, steps=30, seed=1, batch_size=2, accumulate=2, schedule="linear", dtype="bfloat16",
    weight_decay=0.0, clip=0.0, warmup=4, beta2=0.9, min_lr=0.5).items())
def test_other_settings_are_refused(uninterrupted, name, value):
    before = fingerprint(uninterrupted)
    with pytest.raises(UserError, match=rf"other settings \({name} .* there, {value} here\)"
                                        ".*--fresh"):
        train_tiny(uninterrupted, **{name: value})
    assert fingerprint(uninterrupted) == before


def test_settings_that_decide_nothing_may_change(tmp_path, uninterrupted):
    with pytest.raises(Died):
        train_tiny(tmp_path, dying(14))
    train_tiny(tmp_path, log_every=7, eval_every=3, save_every=2)
    assert fingerprint(tmp_path) == fingerprint(uninterrupted)


def test_at_a_constant_rate_a_finished_run_is_taken_further(tmp_path):
    """No step depends on their number there."""
    train_tiny(tmp_path / "parts", schedule="constant", steps=10)
    train_tiny(tmp_path / "parts", schedule="constant", steps=20)
    train_tiny(tmp_path / "whole", schedule="constant", steps=20)
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")
    with pytest.raises(UserError, match="holds a run of 20 steps, more than the 15 asked for"):
        train_tiny(tmp_path / "parts", schedule="constant", steps=15)


def test_other_weights_are_refused(tmp_path):
    """A fine-tuning whose base has been trained anew since, or that has another shape, is another
    run."""
    train_tiny(tmp_path, steps=5)
    for other in (tiny_model(seed=1), tiny_model(dim=32), tiny_model(n_layers=1)):
        with pytest.raises(UserError, match="began with other weights"):
            fit(other, settings(tmp_path, steps=5), toy_batches)


def test_fresh_starts_again(tmp_path, uninterrupted):
    train_tiny(tmp_path, lr=0.1, steps=7)
    train_tiny(tmp_path, fresh=True)
    assert fingerprint(tmp_path) == fingerprint(uninterrupted)
    assert logged_steps(tmp_path) == list(range(1, 21))
    with pytest.raises(Stopped, match="the same command, without --fresh, goes on"):
        train_tiny(tmp_path, interrupting(7), fresh=True)


# ---- The format of state.pt ----------------------------------------------------------------------

FIT_SETTINGS = {"steps", "batch_size", "accumulate", "lr", "schedule", "min_lr", "warmup",
                "weight_decay", "beta2", "clip", "seed", "dtype"}
TRAIN_SETTINGS = FIT_SETTINGS | {
    "dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "max_seq_len", "rope", "rope_theta",
    "tokenizer", "corpus", "corpus_mb", "passkey_share"}
FINETUNE_SETTINGS = FIT_SETTINGS | {
    "model", "rope", "factor", "passkey_share", "passkey_packed", "positions", "corpus",
    "corpus_mb", "row_length"}


@pytest.mark.parametrize("config, names", [(FitConfig, FIT_SETTINGS), (TrainConfig, TRAIN_SETTINGS),
                                           (FinetuneConfig, FINETUNE_SETTINGS)])
def test_settings_that_tell_runs_apart(config, names):
    """Where a name comes or goes, resume_run takes every run in a folder for another one."""
    assert set(resumable_settings(config())) == names
    everything = {f.name for f in dataclasses.fields(config)}
    assert set(resumable_settings(config(schedule="constant"))) == names - {"steps"}
    off = everything & {"optimizer", "lora_rank", "lora_alpha", "lora_matrices", "lora_full",
                        "base_dtype"}
    assert config.may_change_on_resume | names | off == everything
    assert set(resumable_settings(config(optimizer="adamw8bit"))) == names | {"optimizer"}
    if "lora_rank" in off:
        on = resumable_settings(config(lora_rank=8))
        assert set(on) == names | off - {"optimizer"}


def test_a_state_written_by_hand_is_taken_up(tmp_path, uninterrupted):
    """The folder of a run, key by key: five steps of plain AdamW, then fit() goes on from there."""
    model = tiny_model()
    start = torch.cat([p.detach().flatten()[:4] for p in model.parameters()])
    optimizer = make_optimizer(model, settings(tmp_path))
    rates = [line["lr"] for line in read_metrics(uninterrupted)]
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        model.loss(*(half[:4] for half in toy_batches(step))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    save_model(model, tmp_path)
    torch.save({
        "settings": {"steps": 20, "batch_size": 4, "accumulate": 1, "lr": 3e-3,
                     "schedule": "cosine", "min_lr": 0.0, "warmup": 3, "weight_decay": 0.1,
                     "beta2": 0.95, "clip": 1.0, "seed": 0, "dtype": "auto"},
        "start": start, "step": 5, "seconds": 77.0, "model": model.state_dict(),
        "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(),
    }, tmp_path / "state.pt")
    lines = (uninterrupted / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:7]) + "\n", encoding="utf-8")
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")

    asked = []

    def spy(step, *share):
        asked.append(step)
        return toy_batches(step, *share)
    seconds = fit(tiny_model(), settings(tmp_path), spy)
    assert asked == list(range(5, 20))
    assert logged_steps(tmp_path) == list(range(1, 21))
    assert 77 < seconds < 177
    assert fingerprint(tmp_path) == fingerprint(uninterrupted)
    assert set(read_state(tmp_path)) == {"settings", "start", "step", "seconds", "model",
                                         "optimizer", "rng"}
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert run["settings"]["steps"] == 20


@pytest.mark.parametrize("damage", ["empty", "cut off", "no state", "would run code"])
def test_unreadable_state_is_one_line(tmp_path, uninterrupted, damage):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)
    data = (uninterrupted / "state.pt").read_bytes()
    if damage == "would run code":
        torch.save({"step": 0, "settings": Evil()}, tmp_path / "state.pt")
    else:
        damaged = {"empty": b"", "cut off": data[:len(data) // 2], "no state": b"hello" * 100}
        (tmp_path / "state.pt").write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"state.pt: the state of this run cannot be read "
                                        ".*--fresh"):
        train_tiny(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state.pt"]
    train_tiny(tmp_path, fresh=True, steps=1)


STATE_DAMAGE = {"no list": lambda state: [state], "no step": lambda state: without(state, "step"),
                "step None": lambda state: state | {"step": None},
                "step 2.5": lambda state: state | {"step": 2.5},
                "settings 3": lambda state: state | {"settings": 3},
                "start text": lambda state: state | {"start": "x"},
                "seconds text": lambda state: state | {"seconds": "long"},
                "rng text": lambda state: state | {"rng": "x"},
                "rng short": lambda state: state | {"rng": torch.zeros(3, dtype=torch.uint8)},
                "model 1": lambda state: state | {"model": 1},
                "model empty": lambda state: state | {"model": {}},
                "optimizer list": lambda state: state | {"optimizer": []},
                "optimizer empty": lambda state: state | {"optimizer": {}},
                **{f"no {name}": lambda state, name=name: without(state, name)
                   for name in ("settings", "start", "seconds", "model", "optimizer", "rng")}}


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize("damage", STATE_DAMAGE)
def test_a_state_that_lacks_something_is_one_line(tmp_path, uninterrupted, damage):
    torch.save(STATE_DAMAGE[damage](read_state(uninterrupted)), tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"state.pt: the state of this run cannot be read "
                                        ".*--fresh"):
        train_tiny(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


# ---- Loss that is not finite ---------------------------------------------------------------------


def test_divergence_stops_the_run(tmp_path):
    with pytest.raises(UserError, match=r"not finite after step \d+ \(nothing had been saved yet\)"
                                        ": lower --lr"):
        train_tiny(tmp_path, lr=1e30, save_every=1000)
    assert logged_steps(tmp_path) == [1], "the loss of step 2 is that of weights of 1e29"
    assert not (tmp_path / "state.pt").exists()
    assert not (tmp_path / "consolidated.00.pth").exists()


def test_divergence_keeps_the_last_good_checkpoint(tmp_path, uninterrupted):
    model = tiny_model()
    loss, calls = model.loss, []

    def once_nan(x, y):
        calls.append(0)
        return loss(x, y) * (math.nan if len(calls) == 13 else 1.0)
    model.loss = once_nan
    with pytest.raises(UserError, match=r"not finite after step 15 \(.* holds the last good "
                                        r"checkpoint\)"):
        fit(model, settings(tmp_path, log_every=100), toy_batches)
    assert read_state(tmp_path)["step"] == 10
    load_model(tmp_path)
    assert all(math.isfinite(line["loss"]) for line in read_metrics(tmp_path))
    train_tiny(tmp_path)
    assert fingerprint(tmp_path) == fingerprint(uninterrupted)


@pytest.mark.parametrize("spoilt", ["weights", "validation"])
def test_nothing_bad_is_saved(tmp_path, spoilt):
    """The loss of a step is that of the weights before it: the weights that the step made are
    looked at before they are saved."""
    model = tiny_model()
    steps = []

    def evaluate(model):
        return {"val_loss": math.nan if spoilt == "validation" else 1.0, "val_accuracy": 0.5}

    def spoil(optimizer, *_):
        steps.append(0)
        if spoilt == "weights" and len(steps) == 10:
            model.norm.weight.data[3] = math.inf
    hook = register_optimizer_step_post_hook(spoil)
    try:
        with pytest.raises(UserError, match="not finite after step 10 .*last good checkpoint"):
            fit(model, settings(tmp_path, eval_every=10, steps=10), toy_batches, evaluate)
    finally:
        hook.remove()
    assert read_state(tmp_path)["step"] == 5
    assert load_model(tmp_path)


# ---- A full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("full", ["model", "state"])
def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, uninterrupted, full):
    """The disk is full when half of the model is written, or after it, when half of the state
    is."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    small = (uninterrupted / "consolidated.00.pth").stat().st_size
    large = (uninterrupted / "state.pt").stat().st_size
    room = small // 2 if full == "model" else (small + large) // 2

    def filling(step, *share):
        if step == 12:  # from here on no file can grow beyond this
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        return toy_batches(step, *share)
    try:
        with pytest.raises(OSError, match="too large|No space"):
            train_tiny(tmp_path, filling)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_state(tmp_path)["step"] == 10
    assert load_model(tmp_path)
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]
    train_tiny(tmp_path)
    assert fingerprint(tmp_path) == fingerprint(uninterrupted)
