"""finetune.py on a random model of one layer: the table holds what the folders reproduce, and the baseline gets the same steps and rows."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import finetune
from cli import UserError
from data.passkey import PasskeyPrompts
from eval import passkey, perplexity, validation_documents
from finetune import FinetuneConfig
from model import LLaMA, ModelConfig
from rope import RopeConfig, inv_freq
from weights import load_model, load_tokenizer, save_model

NAMES = ["extrapolation", "pi_zero_shot", "pi_finetuned", "direct_finetuned"]
TOKENS = 1300  # of held-out text


@pytest.fixture(scope="module")
def L(tokenizer):
    """A window of which half still holds a passkey prompt."""
    return 2 * PasskeyPrompts(tokenizer).shortest


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer, L):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = LLaMA(ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=tokenizer.vocab_size, multiple_of=16, max_seq_len=L))
    torch.nn.init.normal_(model.layers[0].attention.wq.weight, std=0.5)  # so that positions matter
    torch.nn.init.normal_(model.layers[0].attention.wk.weight, std=0.5)
    save_model(model, folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def finetuned(corpus_folder, tmp_path_factory):
    """finetuned(model, folder, *flags) runs the command with few steps and small measurements; returns the results file's content."""
    def command(model, folder, *flags, results="r/f.json"):
        finetune.main(["--model", str(model), "--corpus", str(corpus_folder), "--steps", "3", "--warmup", "1", "--depths", "2",
                       "--trials", "1", "--eval-tokens", str(TOKENS), "--device", "cpu", "--out", str(folder / "out"),
                       "--results", str(folder / results), *map(str, flags)])
        name = folder / results if "--results" not in flags else folder / "results" / "finetune-pi-pose.json"
        return json.loads(name.read_text(encoding="utf-8"))
    return command


@pytest.fixture(scope="module")
def done(base, finetuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    return folder, finetuned(base, folder)


def test_results_have_what_the_contract_says(done, base, L):
    folder, result = done
    assert [row["name"] for row in result["rows"]] == NAMES
    assert [row["steps"] for row in result["rows"]] == [0, 0, 3, 3]
    assert [row["rope"]["rope_type"] for row in result["rows"]] == ["default", "linear", "linear", "default"]
    assert [row["rope"].get("factor", 1) for row in result["rows"]] == [1, 2, 2, 1]
    lengths = [L // 2, L, 2 * L, 4 * L]  # L' is 2L
    assert (result["original_window"], result["window"], result["lengths"]) == (L, 2 * L, lengths)
    for row in result["rows"]:
        assert list(row["perplexity"]) == list(row["passkey"]) == list(row["k_max"]) == list(map(str, lengths))
        assert all(1 < value < 1e5 for value in row["perplexity"].values()) and all(0 <= value <= 1 for value in row["passkey"].values())
    assert {"model", "rope", "seed", "device", "versions", "command", "settings", "documents", "tokens_scored"} <= set(result)
    assert result["model"] == str(base) and result["rope"]["factor"] == 2
    assert (folder / "r" / "f.png").read_bytes().startswith(b"\x89PNG") and (folder / "r" / "f.png").stat().st_size > 10_000


def test_folders_reproduce_their_rows(done, base, corpus_folder, tokenizer, L):
    """No RoPE flag: the scaling and the original window travel with the weights."""
    folder, result = done
    documents = validation_documents(corpus_folder, 8 * L, TOKENS, tokenizer)
    assert result["tokens_scored"] == sum(len(d) - 1 for d in documents)
    models = {"extrapolation": load_model(base), "pi_zero_shot": load_model(base, rope={"rope_type": "linear", "factor": 2}),
              "pi_finetuned": load_model(folder / "out"), "direct_finetuned": load_model(folder / "out-direct")}
    for row in result["rows"]:
        model = models[row["name"]]
        for n, value in row["perplexity"].items():
            assert perplexity(model, documents, window=int(n), progress=False)["perplexity"] == value, (row["name"], n)
        n = 2 * L
        assert passkey(model, tokenizer, [n], 2, 1, progress=False)["accuracy"][n] == row["passkey"][str(n)]
    tuned, direct = models["pi_finetuned"].config, models["direct_finetuned"].config
    for config, scaling in ((tuned, ("linear", 2)), (direct, ("default", 1))):
        assert (config.rope.rope_type, config.rope.factor) == scaling
        assert config.rope.original_max_position_embeddings == L and config.max_seq_len == 2 * L
    values = {tuple(row["perplexity"].values()) for row in result["rows"]}
    assert len(values) == 4, "two rows are the same model"
    assert load_tokenizer(folder / "out").sha256 == tokenizer.sha256


def test_same_command_again_takes_up_what_is_finished(done, base, finetuned):
    folder, result = done
    states = {name: (folder / name / "state.pt").stat().st_mtime_ns for name in ("out", "out-direct")}
    again = finetuned(base, folder, "--eval-every", 7, results="again.json")
    assert states == {name: (folder / name / "state.pt").stat().st_mtime_ns for name in states}
    assert again["rows"] == result["rows"], "also the seconds of training are those of the run"


def test_measuring_more_does_not_need_another_training(done, base, finetuned):
    folder, _ = done
    before = (folder / "out" / "state.pt").stat().st_mtime_ns
    more = finetuned(base, folder, "--depths", 3, "--no-baseline", results="more.json")
    assert [row["name"] for row in more["rows"]] == NAMES[:3] and more["settings"]["depths"] == 3
    assert (folder / "out" / "state.pt").stat().st_mtime_ns == before


@pytest.fixture
def recorded(monkeypatch):
    """Neither trains nor measures: what fit() and measure() are asked for."""
    asked = []

    def fit(model, config, batches, evaluate, tokenizer):
        asked.append((model, config, batches))
        save_model(model, config.out, tokenizer)
        return 1.0

    def measure(model, tokenizer, documents, lengths, depths, trials, keep=None):
        return {key: {n: 1.0 for n in lengths} for key in ("perplexity", "passkey", "k_max")}
    monkeypatch.setattr(finetune, "fit", fit)
    monkeypatch.setattr(finetune, "measure", measure)
    monkeypatch.setattr(finetune, "plot_finetune", lambda *_: None)
    return asked


def test_baseline_gets_the_same_steps_and_rows(recorded, base, finetuned, tmp_path, L, tokenizer):
    finetuned(base, tmp_path, "--factor", 3, "--seed", 5)
    (pi, pi_config, pi_batches), (direct, direct_config, direct_batches) = recorded
    differ = {f.name for f in dataclasses.fields(FinetuneConfig) if getattr(pi_config, f.name) != getattr(direct_config, f.name)}
    assert differ == {"out", "rope", "positions"}
    for step in range(4):
        (tokens, targets), (same_tokens, same_targets) = pi_batches(step), direct_batches(step)
        assert tokens.shape == (pi_config.batch_size, 3 * L) and torch.equal(tokens, same_tokens) and torch.equal(targets, same_targets)
    assert pi_batches.passkey_longest == direct_batches.passkey_longest == L, "retrieval beyond L is never trained"
    assert 0 < pi_batches.passkey_share == pi_config.passkey_share and pi_batches.seed == 5
    for a, b in zip(pi.parameters(), direct.parameters()):
        assert torch.equal(a, b), "both begin with the pretrained weights"
    assert pi.config.rope.factor == 3 and direct.config.rope.factor == 1 and pi.config.max_seq_len == direct.config.max_seq_len == 3 * L


def test_recipe_is_the_papers():
    config = FinetuneConfig()
    assert (config.weight_decay, config.warmup, config.beta2, config.rope) == (0.0, 20, 0.95, "linear")


@pytest.mark.parametrize("flags, names, steps", [
    (["--rope", "default"], ["extrapolation", "direct_finetuned"], [0, 3]),
    (["--rope", "pi"], NAMES, [0, 0, 3, 3]),
    (["--rope", "ntk", "--no-baseline"], ["extrapolation", "ntk_zero_shot", "ntk_finetuned"], [0, 0, 3]),
    (["--rope", "linear", "--factor", "2.5"], NAMES, [0, 0, 3, 3])])
def test_rows_of_other_methods(recorded, base, finetuned, tmp_path, L, flags, names, steps):
    result = finetuned(base, tmp_path, *flags)
    assert [row["name"] for row in result["rows"]] == names and [row["steps"] for row in result["rows"]] == steps
    window = round(float(flags[-1]) * L) if "--factor" in flags else 2 * L
    assert result["window"] == window and result["lengths"] == sorted({L // 2, L, 2 * L, 4 * L, window})
    outs = [config.out for _, config, _ in recorded]
    assert len(set(outs)) == len(outs) and outs[0] == str(tmp_path / "out")


@pytest.mark.parametrize("flags, row, spread", [
    (["--positions", "pose"], "L", "skip"), (["--rope", "clex"], "L", "stretched"),
    (["--rope", "clex", "--positions", "contiguous"], "window", None), (["--rope", "drope"], "L", None),
    (["--rope", "yarn"], "window", None), (["--rope", '{"rope_type": "default", "random_positions": 5000}'], "window", "random")],
    ids=["pose", "clex", "clex contiguous", "drope", "yarn", "random"])
def test_rows_and_positions_of_each_recipe(recorded, base, finetuned, tmp_path, L, flags, row, spread):
    """PoSE, CLEX and DroPE train on rows of L tokens; where positions are drawn, they are new for every row and the same for every call.
    The baseline has whole rows and plain positions always."""
    result = finetuned(base, tmp_path, *flags, "--factor", 3, "--baseline")
    (model, config, batches), (_, direct_config, direct) = recorded
    assert [r["name"] for r in result["rows"]][-1] == "direct_finetuned" and len(result["rows"]) == 4
    assert batches.seq_len == (L if row == "L" else 3 * L) and direct.seq_len == 3 * L and direct.positions is None
    assert direct_config.positions == "contiguous" and batches.passkey_longest == L
    assert all(len(direct(step)) == 2 for step in range(2))
    for step in range(3):
        batch = batches(step)
        assert len(batch) == (2 if spread is None else 3)
        if spread is None:
            continue
        positions = batch[2]
        assert positions.shape == batch[0].shape and (positions.diff(dim=1) > 0).all() and (positions >= 0).all()
        assert torch.equal(positions, batches(step)[2]) and not torch.equal(positions, batches(step + 1)[2])
        assert torch.equal(batches(step, 1, 3)[2], positions[1:3]), "a rank's share is a share of the same step"
        if spread == "skip":
            assert (positions[:, 0] == 0).all() and positions.max() < 3 * L and ((positions.diff(dim=1) > 1).sum(dim=1) <= 1).all()
        if spread == "stretched":
            assert (positions[:, 0] == 0).all() and (positions[:, -1] == positions[0, -1]).all() and (positions[0, -1] + 1) % L == 0
        if spread == "random":
            assert positions.max() < 5000 and positions.max() > 3 * L
    if "drope" in flags:
        theta, factor = model.frequencies(torch.arange(2 * L))
        assert (theta == 0).all() and factor > 1


def test_no_baseline_unasked_that_takes_more_memory(recorded, base, finetuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = finetuned(base, tmp_path, "--positions", "pose", "--results", "", "--out", "")
    assert [row["name"] for row in result["rows"]] == ["extrapolation", "pi_zero_shot", "pi_finetuned"]
    assert [config.out for _, config, _ in recorded] == ["out/pi-pose-x2"]


def test_a_method_that_grows_may_have_a_factor_of_its_own(recorded, base, finetuned, tmp_path, L):
    """--factor is the window; the parameter-free dynamic NTK has factor 1 all the same."""
    result = finetuned(base, tmp_path, "--rope", '{"rope_type": "dynamic", "factor": 1}', "--factor", 2, "--no-baseline")
    model = recorded[0][0]
    assert (model.config.rope.factor, model.config.max_seq_len, result["window"]) == (1, 2 * L, 2 * L)
    with pytest.raises(UserError, match="--factor 2 and factor 1"):
        finetuned(base, tmp_path, "--rope", '{"rope_type": "yarn", "factor": 1}', "--factor", 2)


def test_a_model_without_rope_is_extended_in_its_own_way(recorded, finetuned, tmp_path, tokenizer, L):
    """ALiBi's baseline is ALiBi, not RoPE."""
    torch.manual_seed(0)
    config = ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=tokenizer.vocab_size, multiple_of=16, max_seq_len=L, rope=RopeConfig("alibi"))
    save_model(LLaMA(config), tmp_path / "alibi", tokenizer)
    result = finetuned(tmp_path / "alibi", tmp_path, "--rope", "alibi")
    assert [(row["name"], row["rope"]["rope_type"], row["rope"].get("factor", 1)) for row in result["rows"]] == [
        ("extrapolation", "alibi", 1), ("alibi_zero_shot", "alibi", 2), ("alibi_finetuned", "alibi", 2), ("direct_finetuned", "alibi", 1)]


def test_clex_learns_its_frequencies(base, finetuned, tmp_path, L):
    """A real run: the network moves, is saved, and the measured model is the one with it."""
    finetuned(base, tmp_path, "--rope", "clex", "--no-baseline", "--factor", 2)
    model = load_model(tmp_path / "out")
    assert model.clex.down.weight.abs().max() > 0
    untrained = RopeConfig("clex", original_max_position_embeddings=L)
    assert not torch.allclose(model.frequencies(torch.arange(3 * L))[0], inv_freq(untrained, 8, 3 * L)[0], rtol=1e-4)
    assert torch.equal(model.frequencies(torch.arange(L))[0], inv_freq(untrained, 8, L)[0]), "at t = 1 nothing has flowed yet"


def test_folder_is_named_after_method_and_factor(recorded, base, finetuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finetuned(base, tmp_path, "--out", "", "--factor", 4)
    assert [config.out for _, config, _ in recorded] == ["out/pi-x4", "out/direct-x4"]


def test_an_extended_model_is_extended_from_its_original_window(recorded, done, finetuned, tmp_path, L):
    """Factors never compound: what was extended by 2 and is now by 4 has the window 4L, and fine-tuned directly it is plain RoPE."""
    folder, _ = done
    for model in ("out", "out-direct"):
        recorded.clear()
        result = finetuned(folder / model, tmp_path, "--factor", 4)
        assert (result["original_window"], result["window"]) == (L, 4 * L)
        (pi, _, batches), (direct, _, _) = recorded
        assert (pi.config.rope.factor, pi.config.rope.original_max_position_embeddings, pi.config.max_seq_len) == (4, L, 4 * L)
        assert (direct.config.rope.rope_type, direct.config.rope.factor, direct.config.max_seq_len) == ("default", 1, 4 * L)
        assert batches.seq_len == 4 * L and batches.passkey_longest == L


@pytest.mark.parametrize("factor", ["1", "0.5", "0", "-2", "nan", "inf"])
def test_factor_has_to_lengthen_the_window(base, finetuned, tmp_path, factor):
    with pytest.raises(UserError, match="--factor"):
        finetuned(base, tmp_path, f"--factor={factor}")
    assert not list(tmp_path.iterdir())


def test_table_says_what_the_rows_hold(done, L):
    _, result = done
    rows = [{"name": row["name"], **{key: {int(n): v for n, v in row[key].items()} for key in ("perplexity", "passkey")}}
            for row in result["rows"]]
    rows[0]["perplexity"][4 * L] = math.inf
    text = finetune.table(rows, result["lengths"], {"L": L, "L'": 2 * L}).splitlines()
    assert len(text) == 6 and f"{L} L " in text[1] and f"{2 * L} L' " in text[1]
    for row, line in zip(rows, text[2:]):
        name, *numbers = line.split()
        assert name == row["name"]
        expected = [*row["perplexity"].values(), *row["passkey"].values()]
        assert np.allclose([float(n) for n in numbers], expected, atol=5e-3)
