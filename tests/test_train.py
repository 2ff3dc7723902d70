"""train.py: the step is AdamW's, and a run that is interrupted, killed at any point of a save, or shared by two processes is the same run.

As a script this file is the process that dies: `python tests/test_train.py crash FOLDER` and the others in ACTIONS.
"""
import hashlib
import io
import json
import math
import mmap
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from cli import Stopped, UserError
from data.batches import TokenFile
from model import LLaMA, ModelConfig
from reference import adamw_step
from train import FitConfig, fit, learning_rate, make_optimizer, validation
from weights import load_model

V, T = 13, 12


def toy(step, first=0, last=8, rows=8):
    """Rows a, a+b, a+2b, ... modulo V: what comes next follows from the two tokens before. A function of (step, row), like Batches."""
    rows = range(first, min(last, rows))
    tokens = torch.tensor([[(step * 5 + row * 3 + (1 + (step + row) % 4) * t) % V for t in range(T + 1)] for row in rows])
    return tokens[:, :-1], tokens[:, 1:]


def tiny(seed=0, **shape):
    torch.manual_seed(seed)
    return LLaMA(ModelConfig(**{**dict(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=V, multiple_of=8, max_seq_len=T), **shape}))


def settings(out, **changes):
    """Twenty steps, a checkpoint after every fifth."""
    return FitConfig(**{**dict(out=str(out), steps=20, batch_size=4, warmup=3, save_every=5, log_every=1, eval_every=1000), **changes})


def trained(out, batches=toy, evaluate=None, **changes):
    model = tiny()
    fit(model, settings(out, **changes), batches, evaluate)
    return model


def state(folder):
    return torch.load(Path(folder) / "state.pt", weights_only=True)


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def final(folder):
    """A hash of every bit that a run leaves behind: weights in the model's folder, and the state but for its clock and its settings."""
    kept, digest, weights = state(folder), hashlib.sha256(), torch.load(folder / "consolidated.00.pth", weights_only=True)
    del kept["seconds"], kept["settings"]
    for path, leaf in torch.utils._pytree.tree_flatten_with_path([kept, weights])[0]:
        digest.update(repr(path).encode() + (leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf).encode()))
    return digest.hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    trained(folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The step


def test_learning_rate():
    config = settings("", steps=100, warmup=20, lr=2.0, min_lr=0.1)
    at = lambda step, **changes: learning_rate(settings("", **{**dict(steps=100, warmup=20, lr=2.0, min_lr=0.1), **changes}), step)
    assert at(0) == pytest.approx(0.2) and at(10) == pytest.approx(1.1) and at(20) == 2.0
    for schedule, middle, end in (("cosine", 1.1, 0.2), ("linear", 1.1, 0.2), ("constant", 2.0, 2.0)):
        assert at(60, schedule=schedule) == pytest.approx(middle) and at(100, schedule=schedule) == pytest.approx(end)
    assert at(40) == pytest.approx(0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2), "a quarter of the cosine"
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert at(0, warmup=0) == 2.0
    assert at(99, warmup=200) == pytest.approx(2 * (0.1 + 0.9 * 99 / 200)), "warm-up may be longer than the run"


def test_only_matrices_are_decayed():
    model = tiny()
    groups = make_optimizer(model, settings("", weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.3), name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_adamw_with_clipping(tmp_path, accumulate):
    """Five steps against the optimiser of tests/reference.py in float64: clipped to a norm of 0.5, decayed, at the scheduled rate."""
    model, seen = tiny(), []

    def see(optimizer, *_):
        seen.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]).norm().item())
    hook = register_optimizer_step_pre_hook(see)
    try:
        fit(model, settings(tmp_path, steps=5, warmup=2, lr=0.01, clip=0.5, weight_decay=0.2, beta2=0.97,
                            batch_size=8 // accumulate, accumulate=accumulate), toy)
    finally:
        hook.remove()
    oracle = tiny()
    weights = {name: p.detach().double().numpy() for name, p in oracle.named_parameters()}
    moments = {name: (0.0, 0.0) for name in weights}
    for step, line in enumerate(lines(tmp_path)):
        oracle.load_state_dict({name: torch.from_numpy(w).float() for name, w in weights.items()})
        oracle.zero_grad()
        loss = oracle.loss(*toy(step))
        loss.backward()
        gradients = {name: p.grad.double().numpy() for name, p in oracle.named_parameters()}
        norm = math.sqrt(sum((g * g).sum() for g in gradients.values()))
        rate = 0.01 * (0.1, 0.55, 1.0, (1 + math.cos(math.pi / 3)) / 2, (1 + math.cos(2 * math.pi / 3)) / 2)[step]
        assert line["step"] == step + 1 and line["lr"] == pytest.approx(rate)
        assert line["loss"] == pytest.approx(loss.item(), abs=1e-5) and line["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert norm > 0.5, "this test needs gradients that are clipped"
        for name in weights:
            weights[name], *moments[name] = adamw_step(weights[name], gradients[name] * 0.5 / norm, *moments[name], step + 1, rate,
                                                       (0.9, 0.97), weight_decay=0.0 if "norm" in name else 0.2)
    assert len(seen) == 5 and max(seen) <= 0.5 + 1e-6
    for name, p in model.named_parameters():
        assert torch.allclose(p.double(), torch.from_numpy(weights[name]), atol=2e-5), name


def test_clip_0_does_not_clip(tmp_path):
    loose, none = trained(tmp_path / "loose", clip=1e9, steps=5), trained(tmp_path / "none", clip=0.0, steps=5)
    assert all(torch.equal(a, b) for a, b in zip(loose.parameters(), none.parameters()))


def test_accumulation_and_recompute_change_nothing(tmp_path):
    whole = trained(tmp_path / "a", batch_size=8, steps=6)
    for n, changes in enumerate((dict(batch_size=4, accumulate=2), dict(batch_size=2, accumulate=4), dict(batch_size=8, recompute=True))):
        other = trained(tmp_path / str(n), steps=6, **changes)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole.parameters(), other.parameters())), changes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_falls(tmp_path, dtype):
    """From ln 13 = 2.56 nats downwards: what comes next follows from the two tokens before."""
    model = trained(tmp_path, dtype=dtype, steps=80, lr=0.03, batch_size=8, log_every=10, save_every=80)
    losses = [line["loss"] for line in lines(tmp_path)]
    assert losses[0] == pytest.approx(math.log(V), abs=0.1) and losses[-1] < 1.0
    assert all(p.dtype == torch.float32 for p in model.parameters()), "autocast computes in bfloat16, over float32 weights"
    assert not model.training


def test_bfloat16_computes_in_bfloat16(tmp_path):
    assert lines_of_one_step(tmp_path / "a", "float32") != lines_of_one_step(tmp_path / "b", "bfloat16")


def lines_of_one_step(folder, dtype):
    trained(folder, dtype=dtype, steps=1)
    return lines(folder)[0]["loss"]


def test_golden_run(tmp_path):
    """Twenty steps of a seeded model of three layers: initialisation, model, loss, schedule and optimiser at once."""
    model = tiny(seed=1, dim=24, n_layers=3, n_heads=4, n_kv_heads=2)
    fit(model, settings(tmp_path, lr=0.01, batch_size=8), toy)
    losses = {line["step"]: line["loss"] for line in lines(tmp_path)}
    assert [losses[step] for step in (1, 10, 20)] == pytest.approx(GOLDEN, abs=2e-3)


GOLDEN = [2.57161, 1.77509, 1.51199]


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_metrics_and_evaluation(tmp_path):
    modes = []

    def evaluate(model):
        modes.append(model.training)
        return {"val_loss": 1.5, "val_perplexity": 4.5}

    def spy(step, *share):
        modes.append("batch")
        return toy(step, *share)
    model = tiny()
    seconds = fit(model, settings(tmp_path, steps=11, log_every=4, eval_every=6, save_every=100), spy, evaluate)
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 4, 6, 8, 11]
    assert [line["step"] for line in lines(tmp_path) if "val_loss" in line] == [6, 11]
    assert set(lines(tmp_path)[0]) == {"step", "loss", "lr", "grad_norm", "tokens_per_second"}
    assert [mode for mode in modes if mode != "batch"] == [False, False] and modes.count("batch") == 11
    assert not model.training and seconds > 0
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert run["settings"]["steps"] == 11 and run["parameters"] == sum(p.numel() for p in model.parameters()) and "torch" in run["versions"]
    for name, p in load_model(tmp_path).named_parameters():
        assert torch.equal(p, dict(model.named_parameters())[name]), name


def test_validation_is_the_mean_loss_of_fixed_rows(corpus_folder, tokenizer):
    model = tiny(vocab_size=tokenizer.vocab_size, max_seq_len=32)
    evaluate = validation(TokenFile(corpus_folder, "val"), tokenizer, 2, 32)
    measured = evaluate(model)
    assert measured == evaluate(model) and measured["val_perplexity"] == pytest.approx(math.exp(measured["val_loss"]))
    assert measured["val_loss"] == pytest.approx(math.log(tokenizer.vocab_size), abs=0.1)
    model.loss = lambda x, y: torch.tensor(1000.0)
    assert evaluate(model) == {"val_loss": 1000.0, "val_perplexity": math.inf}


def test_command(corpus_folder, tokenizer, tmp_path, capsys):
    """python train.py, with a smaller model: one that loads with its tokenizer, in a window that passkey prompts fit."""
    flags = f"--dim 16 --n-layers 1 --n-heads 2 --n-kv-heads 1 --max-seq-len 80 --steps 3 --batch-size 2 --corpus {corpus_folder} " \
            f"--tokenizer {tokenizer.path} --device cpu --out {tmp_path}"
    train.main(flags.split())
    said = capsys.readouterr().out
    for words in ("device     cpu", "window 80 -> 80", "2 rows x 80 = 160 tokens, 3 steps", "val_perplexity", f"wrote {tmp_path}"):
        assert words in said
    model = load_model(tmp_path)
    assert model.config.max_seq_len == 80 and model.config.n_kv_heads == 1 and model.config.vocab_size == tokenizer.vocab_size
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
    before = (tmp_path / "state.pt").stat().st_mtime_ns
    train.main(flags.split())
    assert (tmp_path / "state.pt").stat().st_mtime_ns == before, "a finished run is not trained again"


@pytest.mark.parametrize("rope, expected", [
    ("alibi", {"rope_type": "alibi"}), ("xpos", {"rope_type": "xpos"}), ("nope", {"rope_type": "nope"}),
    ('{"rope_type": "default", "random_positions": 300}', {"rope_type": "default", "random_positions": 300}),
    ('{"rope_type": "proportional", "partial_rotary_factor": 0.5}', {"rope_type": "proportional", "partial_rotary_factor": 0.5})])
def test_command_trains_other_positions_from_scratch(corpus_folder, tokenizer, tmp_path, rope, expected):
    """The folder knows them, and what is loaded from it is the model that was validated."""
    train.main(f"--dim 16 --n-layers 1 --n-heads 2 --max-seq-len 80 --steps 3 --batch-size 2 --corpus {corpus_folder} "
               f"--tokenizer {tokenizer.path} --device cpu --out {tmp_path} --rope".split() + [rope])
    model = load_model(tmp_path)
    assert expected.items() <= model.config.rope.to_dict().items() and model.config.rope.original_max_position_embeddings == 80
    measured = validation(TokenFile(corpus_folder, "val"), tokenizer, 2, 80)(model)["val_loss"]
    assert measured == pytest.approx([line for line in lines(tmp_path) if "val_loss" in line][-1]["val_loss"], rel=1e-6)


def test_positions_reach_the_model(tmp_path):
    """A batch of three tensors is trained on at its positions, micro-batch by micro-batch."""
    def moved(step, first=0, last=8):
        tokens, targets = toy(step, first, last)
        return tokens, targets, torch.arange(T).expand(len(tokens), -1) + 10 * torch.arange(len(tokens))[:, None] ** 2 % 70

    def stretched(step, first=0, last=8):
        tokens, targets = toy(step, first, last)
        return tokens, targets, 9 * torch.arange(T).expand(len(tokens), -1)
    plain, same, other = (trained(tmp_path / name, batches, steps=4) for name, batches in (("a", toy), ("b", moved), ("c", stretched)))
    for a, b in zip(plain.parameters(), same.parameters()):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)  # a shift changes nothing but rounding
    assert not torch.allclose(plain.layers[0].attention.wq.weight, other.layers[0].attention.wq.weight, atol=2e-3)


def test_command_trains_on_the_mix_that_its_flags_say(corpus_folder, tokenizer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "fit", lambda *given: asked.append(given) or 1.0)
    train.main(f"--dim 16 --n-layers 1 --n-heads 2 --max-seq-len 90 --batch-size 3 --accumulate 2 --seed 4 --passkey-share 0.25 "
               f"--rope-theta 500 --corpus {corpus_folder} --tokenizer {tokenizer.path} --device cpu --out {tmp_path}".split())
    (model, config, batches, evaluate, its_tokenizer), = asked
    assert (batches.rows, batches.seq_len, batches.seed, batches.passkey_share, batches.passkey_longest) == (6, 90, 4, 0.25, 90)
    assert len(batches.corpus) == len(TokenFile(corpus_folder, "train")) and its_tokenizer.sha256 == tokenizer.sha256
    assert evaluate(model) == validation(TokenFile(corpus_folder, "val"), tokenizer, 3, 90)(model)
    assert model.config.rope.rope_theta == 500 and config.accumulate == 2
    torch.manual_seed(4)
    assert torch.equal(model.output.weight, LLaMA(model.config).output.weight), "the initialisation follows from --seed"


# ---------------------------------------------------------------------------------------------------------------------
# Going on


class Died(Exception):
    pass


def dying(at):
    """Batches of which step `at` cannot be had."""
    def batches(step, *share):
        if step == at:
            raise Died
        return toy(step, *share)
    return batches


def interrupting(at):
    """Batches that send this process SIGINT, as Ctrl-C does, when step `at` is asked for."""
    def batches(step, *share):
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return toy(step, *share)
    return batches


@pytest.mark.parametrize("dtype, accumulate", [("float32", 1), ("float32", 2), ("bfloat16", 1)])
def test_resume_is_bit_exact(tmp_path, dtype, accumulate):
    changes = dict(dtype=dtype, accumulate=accumulate, batch_size=4 // accumulate)
    trained(tmp_path / "whole", **changes)
    for at in (3, 13, 17):  # before the first checkpoint, and twice later
        with pytest.raises(Died):
            trained(tmp_path / "parts", dying(at), **changes)
    trained(tmp_path / "parts", **changes)
    assert state(tmp_path / "parts")["step"] == 20 and final(tmp_path / "parts") == final(tmp_path / "whole")


def test_resume_goes_on_from_the_last_checkpoint(tmp_path, whole):
    with pytest.raises(Died):
        trained(tmp_path, dying(14))
    assert state(tmp_path)["step"] == 10 and [line["step"] for line in lines(tmp_path)] == list(range(1, 15))
    asked = []
    trained(tmp_path, lambda step, *share: asked.append(step) or toy(step, *share))
    assert asked == list(range(10, 20))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 21)), "a step is there twice, or missing"
    strip = lambda folder: [(line["step"], line["loss"], line["grad_norm"]) for line in lines(folder)]
    assert strip(tmp_path) == strip(whole)


def test_seconds_are_those_of_all_parts(tmp_path):
    with pytest.raises(Died):
        trained(tmp_path, dying(14))
    torch.save({**state(tmp_path), "seconds": 1000.0}, tmp_path / "state.pt")
    assert 1000 < fit(tiny(), settings(tmp_path), toy) < 2000 and 1000 < state(tmp_path)["seconds"] < 2000


def test_a_cut_line_of_metrics_is_dropped(tmp_path):
    with pytest.raises(Died):
        trained(tmp_path, dying(7))
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 8, "lo')
    trained(tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 21))


def test_finished_run_returns_at_once(tmp_path):
    first = tiny()
    seconds = fit(first, settings(tmp_path), toy)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again = tiny()
    told = fit(again, settings(tmp_path), dying(None))
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters())), "the model is not the finished one"
    assert told == seconds > 0, "the time of training is that of the run, not of finding it finished"


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, whole):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match=r"stopped at step \d+ of 20 and saved in .*: the same command goes on from there"):
        trained(tmp_path, interrupting(7), save_every=1000)
    stopped = state(tmp_path)["step"]
    assert 7 <= stopped <= 9 and signal.getsignal(signal.SIGINT) == before
    assert lines(tmp_path)[-1]["step"] == stopped
    load_model(tmp_path)
    trained(tmp_path)
    assert final(tmp_path) == final(whole)


def test_ctrl_c_at_the_keyboard(corpus_folder, tokenizer, tmp_path):
    """The command itself, as a process that is sent SIGINT once it has printed its first validation."""
    flags = f"--dim 16 --n-layers 1 --n-heads 2 --max-seq-len 80 --steps 1000000 --eval-every 1 --batch-size 1 --corpus {corpus_folder} " \
            f"--tokenizer {tokenizer.path} --device cpu --out {tmp_path}"
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen([sys.executable, str(root / "train.py"), *flags.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               encoding="utf-8", env={**os.environ, "PYTHONUNBUFFERED": "1"})
    while line := process.stdout.readline():
        if line.startswith("step 1:"):
            process.send_signal(signal.SIGINT)
            break
    _, error = process.communicate(timeout=600)
    stopped = state(tmp_path)["step"]
    assert process.returncode == 130
    assert error == f"\nstopped at step {stopped} of 1000000 and saved in {tmp_path}: the same command goes on from there\n"
    assert lines(tmp_path)[-1]["step"] == stopped and load_model(tmp_path)


def test_second_ctrl_c_stops_at_once(tmp_path):
    model, calls = tiny(), []
    loss = model.loss

    def pressing(x, y):
        calls.append(signal.raise_signal(signal.SIGINT) if calls else None)  # in the second step, and in the one after, if there is one
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return loss(x, y)
    model.loss = pressing
    with pytest.raises(KeyboardInterrupt):
        fit(model, settings(tmp_path), toy)
    assert len(calls) == 2 and not (tmp_path / "state.pt").exists()


def test_ctrl_c_during_the_last_step_is_a_finished_run(tmp_path, whole):
    model, calls = tiny(), []
    loss = model.loss

    def pressing(x, y):
        calls.append(signal.raise_signal(signal.SIGINT) if len(calls) == 19 else None)
        return loss(x, y)
    model.loss = pressing
    fit(model, settings(tmp_path), toy)
    assert final(tmp_path) == final(whole)


def test_other_settings_are_refused(whole):
    before = final(whole)
    for name, value in dict(lr=0.001, steps=30, seed=1, batch_size=2, accumulate=2, schedule="linear", dtype="bfloat16", weight_decay=0.0,
                            clip=0.0, warmup=4, beta2=0.9, min_lr=0.5).items():
        with pytest.raises(UserError, match=rf"other settings \({name} .* there, {value} here\).*--fresh"):
            trained(whole, **{name: value})
    assert final(whole) == before


def test_settings_that_decide_nothing_may_change(tmp_path, whole):
    with pytest.raises(Died):
        trained(tmp_path, dying(14))
    trained(tmp_path, log_every=7, eval_every=3, save_every=2)
    assert final(tmp_path) == final(whole)


def test_other_weights_are_refused(tmp_path):
    """A fine-tuning whose base has been trained anew since, or that has another shape, is another run."""
    trained(tmp_path, steps=5)
    for other in (tiny(seed=1), tiny(dim=32), tiny(n_layers=1)):
        with pytest.raises(UserError, match="began with other weights"):
            fit(other, settings(tmp_path, steps=5), toy)


def test_fresh_starts_again(tmp_path, whole):
    trained(tmp_path, lr=0.1, steps=7)
    trained(tmp_path, fresh=True)
    assert final(tmp_path) == final(whole) and [line["step"] for line in lines(tmp_path)] == list(range(1, 21))
    with pytest.raises(Stopped, match="the same command, without --fresh, goes on"):
        trained(tmp_path, interrupting(7), fresh=True)


@pytest.mark.parametrize("damage", ["empty", "cut off", "no state", "would run code"])
def test_unreadable_state_is_one_line(tmp_path, whole, damage):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)
    data = (whole / "state.pt").read_bytes()
    if damage == "would run code":
        torch.save({"step": 0, "settings": Evil()}, tmp_path / "state.pt")
    else:
        (tmp_path / "state.pt").write_bytes({"empty": b"", "cut off": data[:len(data) // 2], "no state": b"hello" * 100}[damage])
    with pytest.raises(UserError, match=r"state.pt: the state of this run cannot be read .*--fresh"):
        trained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state.pt"]
    trained(tmp_path, fresh=True, steps=1)


# ---------------------------------------------------------------------------------------------------------------------
# Loss that is not finite


def test_divergence_stops_the_run(tmp_path):
    with pytest.raises(UserError, match=r"not finite after step \d+ \(nothing had been saved yet\): lower --lr"):
        trained(tmp_path, lr=1e30, save_every=1000)
    assert [line["step"] for line in lines(tmp_path)] == [1], "the loss of the second step is that of weights of 1e29"
    assert not (tmp_path / "state.pt").exists() and not (tmp_path / "consolidated.00.pth").exists()


def test_divergence_keeps_the_last_good_checkpoint(tmp_path, whole):
    model = tiny()
    loss, calls = model.loss, []

    def once_nan(x, y):
        calls.append(0)
        return loss(x, y) * (math.nan if len(calls) == 13 else 1.0)
    model.loss = once_nan
    with pytest.raises(UserError, match=r"not finite after step 15 \(.* holds the last good checkpoint\)"):
        fit(model, settings(tmp_path, log_every=100), toy)
    assert state(tmp_path)["step"] == 10
    load_model(tmp_path)
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path))
    trained(tmp_path)
    assert final(tmp_path) == final(whole)


@pytest.mark.parametrize("what", ["weights", "validation"])
def test_nothing_bad_is_saved(tmp_path, what):
    """The loss of a step is that of the weights before it: what the step made of them is looked at before they are saved."""
    model = tiny()

    def evaluate(model):
        return {"val_loss": math.nan if what == "validation" and calls > 4 else 1.0}

    def spoil(optimizer, *_):
        nonlocal calls
        calls += 1
        if what == "weights" and calls == 10:
            model.norm.weight.data[3] = math.inf
    calls, hook = 0, register_optimizer_step_post_hook(spoil)
    try:
        with pytest.raises(UserError, match="not finite after step 10 .*last good checkpoint"):
            fit(model, settings(tmp_path, eval_every=10, steps=10), toy, evaluate)
    finally:
        hook.remove()
    assert state(tmp_path)["step"] == 5 and load_model(tmp_path)


@pytest.mark.parametrize("full", ["model", "state"])
def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, whole, full):
    """The disk is full when the model is half written, or after it, when half of the state is."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    small, large = ((whole / name).stat().st_size for name in ("consolidated.00.pth", "state.pt"))
    room = small // 2 if full == "model" else (small + large) // 2

    def filling(step, *share):
        if step == 12:  # from here on no file can grow beyond this
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        return toy(step, *share)
    try:
        with pytest.raises(OSError, match="too large|No space"):
            trained(tmp_path, filling)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert state(tmp_path)["step"] == 10 and load_model(tmp_path)
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]
    trained(tmp_path)
    assert final(tmp_path) == final(whole)


# ---------------------------------------------------------------------------------------------------------------------
# Kills. Each runs in a process of its own, forked from one that has imported everything: `python tests/test_train.py crash FOLDER`


def start(action, *arguments, **environment):
    """This file as a process. It sees no GPU: autograd with a GPU cannot be forked, and gloo is wanted."""
    return subprocess.Popen([sys.executable, __file__, action, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            encoding="utf-8", env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment})


def finish(*processes):
    for process in processes:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, out + err
    return out


class Shared:
    """Numbers that outlive a killed process."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 16)

    def __getitem__(self, i):
        return struct.unpack_from("q", self.memory, 8 * i)[0]

    def __setitem__(self, i, value):
        struct.pack_into("q", self.memory, 8 * i, value)


DONE, FIRST = 0, 1
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "shutil.rmtree", "tempfile.mkstemp"}


def forked(run):
    """Call run() in a child process; returns its pid. The child ends here: 0, or 1 with a traceback."""
    pid = os.fork()
    if pid:
        return pid
    try:
        run()
    except BaseException:
        import traceback
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def ended(pid):
    """The exit status of a child, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def part_of_a_run(folder, shared, **changes):
    """Train, noting in `shared` the first step of this part and the number of steps done."""
    def batches(step, *share):
        shared[FIRST] = min(step, shared[FIRST]) if shared[FIRST] >= 0 else step
        return toy(step, *share)

    def count(*_):
        shared[DONE] += 1
    shared[FIRST], shared[DONE] = -1, 0
    register_optimizer_step_post_hook(count)
    trained(folder, batches, **changes)


def check_after_death(folder, had_model):
    """Whatever the moment: a model that loads, or none because none had been finished; and no state that does not load."""
    if had_model or (folder / "state.pt").exists():
        load_model(folder)
        return True
    try:
        load_model(folder)
        return True
    except UserError:
        return False


def crash(folder):
    """Kill a run of two checkpoints at every single operation on a file, and inside every write; each time go on and compare."""
    changes, shared = dict(steps=4, save_every=2), Shared()
    assert ended(forked(lambda: part_of_a_run(folder / "whole", shared, **changes))) == 0
    expected, points = final(folder / "whole"), 0
    real_save = torch.save

    def doomed(out, n, how):
        """A run that dies at operation n on files in its folder. how: before it, or half-way through the n-th torch.save."""
        seen = [0]

        def audit(event, arguments):
            if event in FILE_EVENTS and any(str(out) in str(a) for a in arguments):
                seen[0] += 1
                if seen[0] > n:
                    os.kill(os.getpid(), signal.SIGKILL)

        def half(value, file):
            seen[0] += 1
            if seen[0] <= n:
                return real_save(value, file)
            buffer = io.BytesIO()
            real_save(value, buffer)
            file.write(buffer.getvalue()[:len(buffer.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "operation":
            sys.addaudithook(audit)
        else:
            torch.save = half
        part_of_a_run(out, shared, **changes)

    for how in ("operation", "write"):
        for n in range(1000):
            out = folder / f"{how}{n}"
            status = ended(forked(lambda: doomed(out, n, how)))
            if status == 0:
                assert final(out) == expected
                break
            assert status == -signal.SIGKILL, f"{how} {n}: {status}"
            done, first, points = shared[DONE], shared[FIRST], points + 1
            loads = check_after_death(out, had_model=done > 2)
            assert ended(forked(lambda: part_of_a_run(out, shared, **changes))) == 0, f"{how} {n}: cannot go on"
            if done < 4 or shared[FIRST] >= 0:
                assert done - shared[FIRST] <= 2, f"{how} {n}: {done} steps were done, and it goes on from {shared[FIRST]}"
            assert final(out) == expected, f"{how} {n}: other weights after going on"
            assert [line["step"] for line in lines(out)] == [1, 2, 3, 4], f"{how} {n}"
            left = [file.name for file in out.iterdir() if file.name.startswith(".")]
            assert not left, f"{how} {n}: {left} left behind"
            print(how, n, done, shared[FIRST], loads, flush=True)
    print(f"{points} points")


def kills(folder):
    """Twenty SIGKILLs after pauses that have nothing to do with what the run is doing; a run that ends before its kill makes room for another."""
    changes, shared, pauses = dict(steps=150, save_every=10, log_every=3), Shared(), random.Random(0)
    assert ended(forked(lambda: part_of_a_run(folder / "whole", shared, **changes))) == 0
    expected, killed = final(folder / "whole"), 0
    for n in range(200):
        out = folder / f"killed{n}"
        for _ in range(20):
            before = state(out)["step"] if (out / "state.pt").exists() else 0
            pid = forked(lambda: part_of_a_run(out, shared, **changes))
            time.sleep(pauses.uniform(0.01, 0.4))
            if killed < 20:
                os.kill(pid, signal.SIGKILL)
            if ended(pid) == 0:
                break
            killed += 1
            if shared[FIRST] >= 0:
                assert shared[FIRST] == before
                saved = state(out)["step"] if (out / "state.pt").exists() else 0
                assert before + shared[DONE] - saved <= 10, f"{before} + {shared[DONE]} steps done, {saved} saved"
            check_after_death(out, had_model=False)
        else:
            assert ended(forked(lambda: part_of_a_run(out, shared, **changes))) == 0
        assert final(out) == expected
        steps = [line["step"] for line in lines(out)]
        assert steps == sorted(set(steps))
        if killed == 20:
            break
    print(f"{killed} kills")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Both kinds of killing side by side: half the time on two cores."""
    both = {action: start(action, tmp_path_factory.mktemp(action)) for action in ("crash", "kills")}
    yield both
    for process in both.values():
        process.kill()


def test_killed_at_every_operation_of_a_save(killed):
    """Weights, optimiser and metrics end as those of the uninterrupted run; a model is always there; one interval at most is lost."""
    said = finish(killed["crash"]).splitlines()
    assert int(said[-1].split()[0]) > 40, "too few points: are the operations of a save still seen?"
    assert sum(line.startswith("write") for line in said) == 4, "two checkpoints of two files"


def test_killed_at_any_time(killed):
    assert finish(killed["kills"]).splitlines()[-1] == "20 kills"


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


def rank(folder):
    """One of two processes that torchrun would start. Rank 1 alone gets Ctrl-C; both stop after the same step, and then go on."""
    me = int(os.environ["RANK"])
    changes = dict(batch_size=2, log_every=3)
    try:
        trained(folder, interrupting(7) if me == 1 else toy, **changes)
        raise AssertionError("nobody stopped")
    except Stopped as stop:
        print(stop)
    torch.distributed.barrier()
    model = trained(folder, **changes)
    torch.save(model.state_dict(), folder / f"rank{me}.pt")


def test_two_processes_are_one_run(tmp_path):
    """Rank by rank half of the rows, gradients averaged: the same weights as one process with all rows."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    finish(*(start("rank", tmp_path / "two", RANK=str(n), LOCAL_RANK=str(n), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
             for n in range(2)))
    one = trained(tmp_path / "one", batch_size=4).state_dict()
    two = [torch.load(tmp_path / "two" / f"rank{n}.pt", weights_only=True) for n in range(2)]
    for name in one:
        assert torch.equal(two[0][name], two[1][name]), "the two processes have different weights"
        assert torch.allclose(one[name], two[0][name], atol=1e-6), name
    assert all(torch.equal(p, two[0][name]) for name, p in load_model(tmp_path / "two").named_parameters())
    logged, alone = lines(tmp_path / "two"), {line["step"]: line["loss"] for line in lines(tmp_path / "one")}
    assert len({line["step"] for line in logged}) == len(logged) and logged[-1]["step"] == 20
    assert all(line["loss"] == pytest.approx(alone[line["step"]], abs=1e-5) for line in logged), "the logged loss is the mean over all"
    with pytest.raises(UserError, match="ranks 2 there, None here"):
        trained(tmp_path / "two", batch_size=2, log_every=3)


ACTIONS = {"crash": crash, "kills": kills, "rank": rank}

if __name__ == "__main__":
    import torch._dynamo  # noqa: F401  the optimizer does at its first step, for seconds: once here instead of in every forked child
    torch.set_num_threads(1)
    os.fsync = lambda file: None  # for power failures: what a killed process has written stays written, and these tests save often
    ACTIONS[sys.argv[1]](Path(sys.argv[2]))
