"""train.py: the step is AdamW's, and a run leaves a model that loads, a log and its settings."""
import itertools
import json
import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
from common.distributed import ContextShard
from data.batches import prefetch
from data.corpus import TokenFile
from model import LLaMA
from reference import adamw_step
from toy_training import T, V, read_metrics, settings, tiny_model, toy_batches, train_tiny
from train import fit, learning_rate, make_optimizer, validation
from training import run as training_run
from weights import load_model

# ---- The step ------------------------------------------------------------------------------------


def test_learning_rate():
    def rate(step, **changes):
        defaults = dict(steps=100, warmup=20, lr=2.0, min_lr=0.1)
        return learning_rate(settings("", **{**defaults, **changes}), step)

    assert rate(0) == pytest.approx(0.2)
    assert rate(10) == pytest.approx(1.1)
    assert rate(20) == 2.0
    for schedule, middle, end in (("cosine", 1.1, 0.2), ("linear", 1.1, 0.2),
                                  ("constant", 2.0, 2.0)):
        assert rate(60, schedule=schedule) == pytest.approx(middle)
        assert rate(100, schedule=schedule) == pytest.approx(end)
    quarter = 0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2
    assert rate(40) == pytest.approx(quarter), "a quarter of the cosine"
    rates = [rate(step) for step in range(100)]
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rate(0, warmup=0) == 2.0
    longer_than_the_run = 2 * (0.1 + 0.9 * 99 / 200)
    assert rate(99, warmup=200) == pytest.approx(longer_than_the_run)


def test_only_matrices_are_decayed():
    model = tiny_model()
    groups = make_optimizer(model, settings("", weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.3), name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_adamw_with_clipping(tmp_path, accumulate):
    """Five steps against the float64 optimiser of tests/reference.py: gradients clipped to a norm
    of 0.5, weights decayed, at the scheduled rate."""
    model, clipped_norms = tiny_model(), []

    def see(optimizer, *_):
        gradients = [p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]
        clipped_norms.append(torch.cat(gradients).norm().item())
    hook = register_optimizer_step_pre_hook(see)
    config = settings(tmp_path, steps=5, warmup=2, lr=0.01, clip=0.5, weight_decay=0.2, beta2=0.97,
                      batch_size=8 // accumulate, accumulate=accumulate)
    try:
        fit(model, config, toy_batches)
    finally:
        hook.remove()

    third = math.pi / 3
    schedule = [0.1, 0.55, 1.0, (1 + math.cos(third)) / 2, (1 + math.cos(2 * third)) / 2]
    oracle = tiny_model()
    weights = {name: p.detach().double().numpy() for name, p in oracle.named_parameters()}
    moments = {name: (0.0, 0.0) for name in weights}
    for step, line in enumerate(read_metrics(tmp_path)):
        oracle.load_state_dict({name: torch.from_numpy(w).float() for name, w in weights.items()})
        oracle.zero_grad()
        loss = oracle.loss(*toy_batches(step))
        loss.backward()
        gradients = {name: p.grad.double().numpy() for name, p in oracle.named_parameters()}
        norm = math.sqrt(sum((g * g).sum() for g in gradients.values()))
        rate = 0.01 * schedule[step]
        assert line["step"] == step + 1
        assert line["lr"] == pytest.approx(rate)
        assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3), "the norm before clipping"
        assert norm > 0.5, "this test needs gradients that are clipped"
        for name in weights:
            clipped = gradients[name] * 0.5 / norm
            decay = 0.0 if "norm" in name else 0.2
            weights[name], *moments[name] = adamw_step(weights[name], clipped, *moments[name],
                                                       step + 1, rate, (0.9, 0.97),
                                                       weight_decay=decay)
    assert len(clipped_norms) == 5
    assert max(clipped_norms) <= 0.5 + 1e-6
    for name, p in model.named_parameters():
        assert torch.allclose(p.double(), torch.from_numpy(weights[name]), atol=2e-5), name


def test_clip_0_does_not_clip(tmp_path):
    loose = train_tiny(tmp_path / "loose", clip=1e9, steps=5)
    none = train_tiny(tmp_path / "none", clip=0.0, steps=5)
    assert all(torch.equal(a, b) for a, b in zip(loose.parameters(), none.parameters()))


def test_accumulation_and_recompute_change_nothing(tmp_path):
    whole = train_tiny(tmp_path / "a", batch_size=8, steps=6)
    others = [dict(batch_size=4, accumulate=2), dict(batch_size=2, accumulate=4),
              dict(batch_size=8, recompute=True)]
    for n, changes in enumerate(others):
        other = train_tiny(tmp_path / str(n), steps=6, **changes)
        for a, b in zip(whole.parameters(), other.parameters()):
            assert torch.allclose(a, b, atol=1e-6), changes


def test_a_target_counts_alike_in_every_micro_batch(tmp_path):
    """Two micro-batches with other numbers of targets are one batch of both; a step without any has
    a loss of 0 and moves nothing but by AdamW's decay."""
    def unscored(all_of_them):
        def batches(step, first=0, last=8):
            tokens, targets = toy_batches(step, first, last)
            targets = targets.clone()  # a view of the tokens
            for row in range(len(targets)):
                targets[row, :T if all_of_them else row] = -100
            return tokens, targets
        return batches
    whole = train_tiny(tmp_path / "whole", unscored(False), batch_size=8, steps=6)
    parts = train_tiny(tmp_path / "parts", unscored(False), batch_size=2, accumulate=4, steps=6)
    for a, b in zip(whole.parameters(), parts.parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    train_tiny(tmp_path / "none", unscored(True), batch_size=4, accumulate=2, steps=2)
    assert [line["loss"] for line in read_metrics(tmp_path / "none")] == [0, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_falls(tmp_path, dtype):
    """From ln 13 = 2.56 nats downwards: two tokens decide the next."""
    model = train_tiny(tmp_path, dtype=dtype, steps=80, lr=0.03, batch_size=8, log_every=10,
                       save_every=80)
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert losses[0] == pytest.approx(math.log(V), abs=0.1)
    assert losses[-1] < 1.0
    float32 = [p.dtype == torch.float32 for p in model.parameters()]
    assert all(float32), "autocast computes in bfloat16, over float32 weights"
    assert not model.training


def test_bfloat16_computes_in_bfloat16(tmp_path):
    train_tiny(tmp_path / "a", dtype="float32", steps=1)
    train_tiny(tmp_path / "b", dtype="bfloat16", steps=1)
    assert read_metrics(tmp_path / "a")[0]["loss"] != read_metrics(tmp_path / "b")[0]["loss"]


def test_golden_run(tmp_path):
    """Twenty steps of a seeded model of three layers: initialisation, model, loss, schedule and
    optimiser at once."""
    model = tiny_model(seed=1, dim=24, n_layers=3, n_heads=4, n_kv_heads=2)
    fit(model, settings(tmp_path, lr=0.01, batch_size=8), toy_batches)
    losses = {line["step"]: line["loss"] for line in read_metrics(tmp_path)}
    golden = [2.57161, 1.77509, 1.51199]
    assert [losses[step] for step in (1, 10, 20)] == pytest.approx(golden, abs=2e-3)


# ---- Batches -------------------------------------------------------------------------------------


def test_positions_reach_the_model(tmp_path):
    """A batch of three tensors is trained on at its positions, micro-batch by micro-batch."""
    def shifted(step, first=0, last=8):
        tokens, targets = toy_batches(step, first, last)
        rows = torch.arange(len(tokens))[:, None]
        return tokens, targets, torch.arange(T).expand(len(tokens), -1) + 10 * rows**2 % 70

    def stretched(step, first=0, last=8):
        tokens, targets = toy_batches(step, first, last)
        return tokens, targets, 9 * torch.arange(T).expand(len(tokens), -1)
    plain = train_tiny(tmp_path / "plain", toy_batches, steps=4)
    same = train_tiny(tmp_path / "shifted", shifted, steps=4)
    other = train_tiny(tmp_path / "stretched", stretched, steps=4)
    for a, b in zip(plain.parameters(), same.parameters()):
        # A shift changes nothing but rounding.
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    plain_wq = plain.layers[0].attention.wq.weight
    other_wq = other.layers[0].attention.wq.weight
    assert not torch.allclose(plain_wq, other_wq, atol=2e-3)


def test_prefetch_gives_every_step_once_and_only_the_ranks_rows():
    asked = []

    def batches(step, first, last):
        asked.append((step, first, last))
        return toy_batches(step, first, last)
    given = list(prefetch(batches, 3, 6, first_row=2, rows=4))
    assert [step for step, _ in given] == [3, 4, 5]
    assert asked == [(3, 2, 6), (4, 2, 6), (5, 2, 6)], "no batch after the last step"
    for step, batch in given:
        for tensor, expected in zip(batch, toy_batches(step, 2, 6)):
            assert torch.equal(tensor, expected)


# ---- What a run leaves ---------------------------------------------------------------------------


def test_metrics_and_evaluation(tmp_path):
    modes, asked = [], []

    def evaluate(model):
        modes.append(model.training)
        return {"val_loss": 1.5, "val_perplexity": 4.5}

    def spy(step, *share):
        asked.append(step)
        return toy_batches(step, *share)
    model = tiny_model()
    config = settings(tmp_path, steps=11, log_every=4, eval_every=6, save_every=100)
    seconds = fit(model, config, spy, evaluate)
    metrics = read_metrics(tmp_path)
    assert [line["step"] for line in metrics if "loss" in line] == [1, 4, 6, 8, 11]
    assert [line["step"] for line in metrics if "val_loss" in line] == [6, 11]
    assert set(metrics[0]) == {"step", "loss", "lr", "grad_norm", "tokens_per_second"}
    assert modes == [False, False]
    assert asked == list(range(11))
    assert not model.training
    assert seconds > 0
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert run["settings"]["steps"] == 11
    assert run["parameters"] == sum(p.numel() for p in model.parameters())
    assert "torch" in run["versions"]
    trained = dict(model.named_parameters())
    for name, p in load_model(tmp_path).named_parameters():
        assert torch.equal(p, trained[name]), name


def test_a_model_in_eval_mode_is_trained_in_training_mode(tmp_path):
    """A model may have been evaluated before."""
    model = tiny_model().eval()
    loss, modes = model.loss, []

    def noting(tokens, targets):
        modes.append(model.training)
        return loss(tokens, targets)
    model.loss = noting
    fit(model, settings(tmp_path, steps=2), toy_batches)
    assert modes == [True, True]
    assert not model.training


@pytest.mark.parametrize("world", [1, 2])
def test_speed_is_that_of_all_steps_and_ranks_since_the_last_line(tmp_path, monkeypatch, world):
    """By a clock on which a second passes between two lines."""
    clock = itertools.count()
    monkeypatch.setattr(training_run.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(training_run, "join_process_group", lambda: (0, world))
    monkeypatch.setattr(train, "trains_sharded", lambda config: False)
    monkeypatch.setattr(training_run, "on_any_rank", lambda flag: False)
    monkeypatch.setattr(training_run, "of_first_rank", lambda value: value)
    config = settings(tmp_path, steps=11, log_every=4, save_every=100)
    fit(tiny_model(), config, toy_batches, progress=False)
    tokens = 4 * T * world
    speeds = {line["step"]: line["tokens_per_second"] for line in read_metrics(tmp_path)}
    assert speeds == {1: tokens, 4: 3 * tokens, 8: 4 * tokens, 11: 3 * tokens}


def test_validation_is_the_mean_loss_of_fixed_rows(corpus_folder, tokenizer):
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_seq_len=32)
    evaluate = validation(TokenFile(corpus_folder, "val"), tokenizer, 2, 32)
    measured = evaluate(model)
    assert measured == evaluate(model)
    assert measured["val_perplexity"] == pytest.approx(math.exp(measured["val_loss"]))
    assert measured["val_loss"] == pytest.approx(math.log(tokenizer.vocab_size), abs=0.1)
    model.loss = lambda x, y: torch.tensor(1000.0)
    assert evaluate(model) == {"val_loss": 1000.0, "val_perplexity": math.inf}


def test_validation_rows_can_be_cut_into_chunks(corpus_folder, tokenizer):
    """Two GPUs that share rows cut each into four chunks: of 30 tokens 28 are read."""
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_seq_len=32)
    evaluate = validation(TokenFile(corpus_folder, "val"), tokenizer, 2, 30)
    shapes = []
    model.loss = lambda x, y: shapes.append((x.shape, y.shape)) or torch.tensor(1.0)
    evaluate(model)
    model.context = ContextShard(0, 2, None)
    evaluate(model)
    assert shapes == 8 * [((2, 30), (2, 30))] + 8 * [((2, 28), (2, 28))]


# ---- The command ---------------------------------------------------------------------------------


def train_command(flags, corpus_folder, tokenizer, out):
    """python train.py with a smaller model, in a window that holds passkey prompts."""
    train.main(f"--dim 16 --n-layers 1 --n-heads 2 --max-seq-len 80 --steps 3 --batch-size 2 "
               f"--corpus {corpus_folder} --tokenizer {tokenizer.path} --device cpu "
               f"--out {out}".split() + flags)


def test_command(corpus_folder, tokenizer, tmp_path, capsys):
    """The folder that it writes loads, with its tokenizer."""
    train_command(["--n-kv-heads", "1"], corpus_folder, tokenizer, tmp_path)
    printed = capsys.readouterr().out
    for words in ("device     cpu", "window 80 -> 80", "2 rows x 80 = 160 tokens, 3 steps",
                  "val_perplexity", f"wrote {tmp_path}"):
        assert words in printed
    config = load_model(tmp_path).config
    assert config.max_seq_len == 80
    assert config.n_kv_heads == 1
    assert config.vocab_size == tokenizer.vocab_size
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
    before = (tmp_path / "state.pt").stat().st_mtime_ns
    train_command(["--n-kv-heads", "1"], corpus_folder, tokenizer, tmp_path)
    assert (tmp_path / "state.pt").stat().st_mtime_ns == before, "a finished run is finished"


@pytest.mark.parametrize("rope, expected", [
    ("alibi", {"rope_type": "alibi"}),
    ("xpos", {"rope_type": "xpos"}),
    ("nope", {"rope_type": "nope"}),
    ('{"rope_type": "default", "random_positions": 300}',
     {"rope_type": "default", "random_positions": 300}),
    ('{"rope_type": "proportional", "partial_rotary_factor": 0.5}',
     {"rope_type": "proportional", "partial_rotary_factor": 0.5})])
def test_command_trains_other_positions_from_scratch(corpus_folder, tokenizer, tmp_path, rope,
                                                     expected):
    """The folder knows them: the model that is loaded from it is the one that was validated."""
    train_command(["--rope", rope], corpus_folder, tokenizer, tmp_path)
    model = load_model(tmp_path)
    assert expected.items() <= model.config.rope.to_dict().items()
    assert model.config.rope.original_max_position_embeddings == 80
    measured = validation(TokenFile(corpus_folder, "val"), tokenizer, 2, 80)(model)["val_loss"]
    logged = [line["val_loss"] for line in read_metrics(tmp_path) if "val_loss" in line]
    assert measured == pytest.approx(logged[-1], rel=1e-6)


def test_command_trains_on_the_mix_that_its_flags_say(corpus_folder, tokenizer, tmp_path,
                                                      monkeypatch):
    asked = []
    monkeypatch.setattr(train, "fit", lambda *given: asked.append(given) or 1.0)
    flags = ("--max-seq-len 90 --batch-size 3 --accumulate 2 --seed 4 --passkey-share 0.25 "
             "--rope-theta 500").split()
    train_command(flags, corpus_folder, tokenizer, tmp_path)
    (model, config, batches, evaluate, its_tokenizer), = asked
    assert (batches.rows, batches.seq_len, batches.seed) == (6, 90, 4)
    assert (batches.passkey_share, batches.passkey_longest) == (0.25, 90)
    assert len(batches.corpus) == len(TokenFile(corpus_folder, "train"))
    assert its_tokenizer.sha256 == tokenizer.sha256
    assert evaluate(model) == validation(TokenFile(corpus_folder, "val"), tokenizer, 3, 90)(model)
    assert model.config.rope.rope_theta == 500
    assert config.accumulate == 2
    torch.manual_seed(4)
    again = LLaMA(model.config)
    assert torch.equal(model.output.weight, again.output.weight), "--seed decides initialisation"


@pytest.mark.parametrize("recompute", [False, True])
def test_dry_run_says_what_it_would_take(corpus_folder, tokenizer, tmp_path, capsys, recompute):
    """C = 16, F = 64, one layer of two heads of 8, rows of T = 80 tokens."""
    V = tokenizer.vocab_size
    out = tmp_path / "out"
    flags = ["--dry-run", "--recompute"] if recompute else ["--dry-run"]
    train_command(flags, corpus_folder, tokenizer, out)
    printed = capsys.readouterr().out
    matrices = V * 16 + 4 * 16 * 16 + 3 * 16 * 64
    forward = 2 * matrices + 4 * 16 * (80 + 1) / 2
    parameters = matrices + V * 16 + 3 * 16
    assert f"model      {parameters:,} parameters, window 80 -> 80" in printed
    assert f"{3 * forward / 1e6:.1f} MFLOP a token" in printed
    training = 3 * 2 * 80 * (4 if recompute else 3) * forward
    assert f"training   {training:.2e} floating-point operations" in printed
    assert "then       to read 80 tokens in bfloat16: " in printed
    assert f"weights {2 * parameters / 2**20:,.0f} MiB" in printed
    assert f"keys and values 0 MiB, {80 * forward:.2e} operations" in printed
    assert not out.exists()
