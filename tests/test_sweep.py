"""extras/sweep.py: the plan becomes runs, a run is the training that finetune.py would do, and
nothing is measured twice."""
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import pytest
import torch

from common.errors import UserError
from data.passkey import PasskeyPrompts
from eval import passkey, perplexity
from extras import sweep
from extras.sweep_tables import cell, markdown, sweep_tables
from model import LLaMA, ModelConfig
from plot import plot_sweep
from weights import load_config, load_model, save_model


@pytest.fixture(scope="module")
def L(tokenizer):
    return PasskeyPrompts(tokenizer).shortest + 10


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer, L):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = LLaMA(ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=tokenizer.vocab_size,
                              multiple_of=16, max_seq_len=L))
    save_model(model, folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def command(base, corpus_folder, place, L):
    """command(*flags, folder=..., figure=...) runs a small sweep whose runs and result lie in and
    beside place / folder; returns the result. A figure takes longer than the sweep."""
    text = place / "prose.txt"
    text.write_text("It is a truth that is not yet acknowledged, that a window must be in want of "
                    "tokens.\n" * 200, encoding="utf-8")

    def call(*flags, folder, figure=False):
        with pytest.MonkeyPatch.context() as patch:
            if not figure:
                patch.setattr(sweep, "plot_sweep", lambda result, path: path)
            sweep.main(["--model", str(base), "--corpus", str(corpus_folder), "--text", str(text),
                        "--lengths", str(L), "--jobs", "1", "--max-tokens", "900", "--trials", "1",
                        "--distances", "3", "--step-tokens", str(2 * L), "--device", "cpu",
                        "--folder", str(place / folder), "--out", str(place / f"{folder}.json"),
                        *map(str, flags)])
        return json.loads((place / f"{folder}.json").read_text(encoding="utf-8"))
    return call


@pytest.fixture(scope="module")
def whole(command):
    return command(*SMALL, folder="whole", figure=True)


SMALL = ["--methods", "default", "linear", "--factors", "2", "--steps", "2", "4",
         "--seeds", "0", "1"]
ONE = ["--methods", "linear", "--factors", "2", "--steps", "1", "--seeds", "0"]


def numbers(result):
    """Everything that was measured, but for the time it took."""
    return [{k: v for k, v in row.items() if k != "training_seconds"} for row in result["rows"]]


def find_row(result, method, seed, steps):
    return next(row for row in result["rows"]
                if (row["method"], row["seed"], row["steps"]) == (method, seed, steps))


def test_rows_are_what_the_folders_give(whole, command, base, place, corpus_folder, tokenizer, L,
                                        capsys):
    result = command(*SMALL, folder="whole")
    printed = capsys.readouterr().out
    assert numbers(result) == numbers(whole)
    trained = [(method, seed, n) for method in ("default", "linear") for seed in (0, 1)
               for n in (2, 4)]
    assert [(r["method"], r["seed"], r["steps"]) for r in result["rows"]] == [
        ("default", 0, 0), ("linear", 0, 0), *trained]
    assert "time       about" in printed
    assert printed.index("time ") < printed.index("Perplexity by window")
    assert (place / "whole.png").read_bytes().startswith(b"\x89PNG")

    row = find_row(result, "linear", 1, 4)
    model = load_model(place / "whole" / "methods" / "linear-x2-seed1")
    assert model.config.rope.rope_type == "linear"
    assert model.config.max_seq_len == row["window"] == 2 * L
    documents = sweep.documents_by_kind(sweep.SweepConfig(**result["settings"]), tokenizer)
    assert set(documents) == {corpus_folder.name, "prose"}
    assert all(len(d) == 4 * L for d in documents[corpus_folder.name])
    for kind in documents:
        for n in (L, 2 * L):
            expected = perplexity(model, documents[kind], n, progress=False)["perplexity"]
            assert row["perplexity"][kind][str(n)] == expected
    # One key, twice as many where it is followed from step to step.
    found = passkey(model, tokenizer, [2 * L], 3, 2, 1, progress=False)
    assert row["k_max"] == found["k_max"]
    assert row["accuracy_at_target"] == found["accuracy"][2 * L]

    between = find_row(result, "linear", 1, 2)
    assert "k_max" in between and between["passkey"] == {}
    assert list(between["perplexity"]) == [corpus_folder.name]
    perplexities = between["perplexity"][corpus_folder.name]
    assert list(perplexities) == [str(2 * L)]
    assert perplexities[str(2 * L)] != row["perplexity"][corpus_folder.name][str(2 * L)]

    before = find_row(result, "linear", 0, 0)
    assert before["disturbance"] < result["rows"][0]["disturbance"], (
        "interpolation shows no new angles")
    untrained = load_model(base, rope={"rope_type": "linear", "factor": 2.0})
    expected = perplexity(untrained, documents["prose"], 2 * L, progress=False)["perplexity"]
    assert before["perplexity"]["prose"][str(2 * L)] == expected


@pytest.mark.slow
def test_the_same_command_gives_the_same_numbers_in_any_number_of_processes(command, whole):
    assert numbers(command(*SMALL, "--jobs", "2", folder="two")) == numbers(whole)


@pytest.mark.parametrize("name, calls", [("fit", 2), ("perplexity", 5), ("passkey", 4)])
def test_an_interruption_costs_only_the_measurement_in_hand(command, whole, monkeypatch, name,
                                                            calls):
    expected, function, made = numbers(whole), getattr(sweep, name), []

    def counting(*args, **kwargs):
        if len(made) == calls:
            raise KeyboardInterrupt
        made.append(args)
        return function(*args, **kwargs)
    monkeypatch.setattr(sweep, name, counting)
    with pytest.raises(KeyboardInterrupt):
        command(*SMALL, folder=f"broken-{name}")
    calls = 10**6
    resumed = command(*SMALL, folder=f"broken-{name}")
    assert numbers(resumed) == expected
    if name == "fit":
        assert len(made) == 8, "four runs of two stages"
    made.clear()
    calls = 0
    assert numbers(command(*SMALL, folder=f"broken-{name}")) == expected, "all of it was there"


def test_other_conditions_are_measured_anew(command):
    flags = ["--methods", "linear", "--factors", "2", "--steps", "1", "2", "--seeds", "0"]
    first = command(*flags, folder="other")
    again = command(*flags, "--max-tokens", "450", folder="other")
    fresh = command(*flags, "--max-tokens", "450", folder="fresh")
    assert numbers(again) == numbers(fresh) != numbers(first)


@pytest.mark.parametrize("flags, words", [
    (["--methods", "linear", "--factors", "1"], "--factors above 1"),
    (["--methods", "lnear"], "lnear"),
    (["--steps", "0"], "--steps"),
    (["--methods", "longrope"], "longrope"),
    (["--plan", "scratch", "--steps", "2", "4"], "one number"),
    (["--trials", "-1"], "--trials"),
    (["--jobs", "0"], "--jobs"),
    (["--factors", "nan"], "--factors"),
    (["--lengths", "-5"], "--lengths"),
    (["--methods", "linear", "--lengths", "20"], "passkey prompt"),
    (["--methods", "linear", "--curves", "lineer"], "--curves lineer"),
    (["--stride", "100000"], "--stride"),
    (["--seeds", "-1"], "--seeds"),
    (["--lr", "0"], "--lr"),
    (["--text", "a/x.txt", "b/x.txt"], "same name"),
    (["--methods", "linear", "--text", "missing.txt"], "missing.txt: no such file"),
    (["--passkey-share", "2"], "--passkey-share 2.0: give a share from 0 to 1"),
    (["--passkey-share", "nan"], "--passkey-share nan"),
    (["--methods", '{"rope_type": "yarn", "factor": 8}'], "contradicts"),
    (["--methods", '{"rope_type": "yarn", "factor": 4}', "--factors", "2"], "contradicts")])
def test_mistakes_are_told_before_any_work(command, flags, words, monkeypatch):
    monkeypatch.setattr(sweep, "fit", None)
    with pytest.raises(UserError, match=words):
        command(*flags, folder="mistake")


def test_a_method_that_is_followed_from_step_to_step_is_asked_for_twice_as_many_keys(
        command, monkeypatch, L):
    asked = {}

    def passkey(model, tokenizer, lengths, depths, trials, seed, progress, cache):
        asked.setdefault(model.config.rope.rope_type, []).append((lengths, depths, trials))
        return {"accuracy": {n: 0.5 for n in lengths}, "k_max": 7,
                "accuracy_by_depth": {n: [0.5] for n in lengths}}

    monkeypatch.setattr(sweep, "passkey", passkey)
    result = command("--methods", "default", "yarn", "--curves", "yarn", "--factors", "2",
                     "--steps", "1", "2", "--seeds", "0", "--trials", "3", folder="keys",
                     figure=True)
    ends = [([L], 10, 3), ([2 * L], 10, 3)]
    assert asked["default"] == [*ends, ([2 * L], 3, 3)] * 2, "before and after all steps"
    followed = [*ends, ([2 * L], 3, 6)]
    assert asked["yarn"] == [*followed, ([2 * L], 3, 6), *followed]
    rows = [(r["method"], r["steps"], r.get("k_max")) for r in result["rows"]]
    assert rows == [("default", 0, 7), ("yarn", 0, 7), ("default", 1, None), ("default", 2, 7),
                    ("yarn", 1, 7), ("yarn", 2, 7)]


def test_a_text_does_not_take_the_place_of_the_corpus(command, corpus_folder, place):
    text = place / f"{corpus_folder.name}.txt"
    text.write_text("A window in want of tokens.\n" * 900, encoding="utf-8")
    with pytest.raises(UserError, match="name tokens is that of the corpus"):
        command("--methods", "linear", "--text", text, folder="mistake")


def test_methods_have_one_name(command, monkeypatch):
    seen = []

    def one_run(c, run):
        seen.append((run.method, run.method in c.curves))
        return []

    monkeypatch.setattr(sweep, "one_run", one_run)
    with pytest.raises(IndexError):  # no rows, no tables
        command("--methods", "pi", "--factors", "2", folder="names")
    assert set(seen) == {("linear", True)}


def test_the_learning_rate_of_a_small_model_is_not_given_to_a_large_one(command, monkeypatch):
    monkeypatch.setattr(sweep, "parameter_count", lambda config: 10**8)
    with pytest.raises(UserError, match="--lr is needed"):
        command("--methods", "linear", folder="mistake")
    monkeypatch.setattr(sweep, "fit", None)
    with pytest.raises(UserError, match="--lengths 20"):
        command("--methods", "linear", "--lr", "2e-5", "--lengths", "20", folder="mistake")


def test_from_scratch_every_way_of_telling_positions(command, L):
    result = command("--plan", "scratch", "--steps", "3", "--seeds", "0", folder="scratch",
                     figure=True)
    rope_types = [r["rope"]["rope_type"] for r in result["rows"]]
    assert rope_types == ["default", "alibi", "xpos", "nope", "default", "default"]
    assert result["rows"][-2]["rope"]["no_rope_layer_interval"] == 4
    assert result["rows"][-1]["rope"]["random_positions"] == 2048
    assert all(r["steps"] == 3 for r in result["rows"])
    found = [r["perplexity"]["prose"][str(L)] for r in result["rows"]]
    assert found[4] == found[0], "this model has no fourth layer"
    assert len(set(found)) == 5


def test_methods_with_rows_of_their_own(command, monkeypatch, place, L):
    """CLEX and DroPE train on rows of L tokens, so that there are twice as many of them. A direct
    fine-tuning knows L, too."""
    rows = {}
    fit = sweep.fit

    def recorded(model, settings, batches, *given, **more):
        rows[settings.rope] = batches(0)[0].shape
        return fit(model, settings, batches, *given, **more)

    monkeypatch.setattr(sweep, "fit", recorded)
    twice = '{"rope_type": "dynamic", "factor": 1}'    # no stretch of the window, so it may be
    command("--methods", "clex", "drope", "default", twice, "--factors", "2", "--steps", "1",
            "--seeds", "0", "--step-tokens", 4 * L, "--trials", "0", folder="rows")
    assert rows == {"clex": (4, L), "drope": (4, L), "default": (2, 2 * L), twice: (2, 2 * L)}
    direct = load_config(place / "rows" / "methods" / "default-x2-seed0")
    assert (direct.original_window, direct.max_seq_len) == (L, 2 * L)


def test_dprope_by_the_number_of_interpolated_dimensions(command):
    nothing = '{"rope_type": "dprope", "interpolated_dims": 0}'
    everything = '{"rope_type": "dprope", "interpolated_dims": 8}'
    result = command("--plan", "dprope", "--factors", "2", "--steps", "1",
                     "--methods", nothing, everything, "linear",
                     "--zero-shot", "default", '{"rope_type": "dprope", "bins": 8}',
                     folder="dprope", figure=True)
    by = {(r["method"], r["steps"]): r["perplexity"]["prose"] for r in result["rows"]}
    assert by[nothing, 0] == by["default", 0], "plain RoPE"
    assert by[everything, 0] == by["linear", 0], "PI"


def test_without_a_text_the_other_kind_is_code_that_comes_with_pytorch(base, corpus_folder,
                                                                      tokenizer, L):
    c = sweep.SweepConfig(model=str(base), corpus=str(corpus_folder), lengths=[L, 2 * L],
                          max_tokens=10 * L)
    documents = sweep.documents_by_kind(c, tokenizer)
    assert list(documents) == [corpus_folder.name, "C++ headers"]
    headers = documents["C++ headers"]
    assert [len(d) for d in headers] == [4 * L] * 3, "10 L tokens at least"
    assert all(d[0] == tokenizer.bos_id for d in headers)
    assert "#" in tokenizer.decode(headers[0].tolist())


# --------------------------------------------------------------------------------------------------
# Tables, on rows with known numbers


def made_up(method, factor, seed, steps, value, k_max=None):
    target = round(100 * factor)
    row = {"method": method, "factor": factor, "seed": seed, "steps": steps,
           "rope": {"rope_type": method}, "window": target, "passkey": {},
           "perplexity": {"Python": {"100": value, "200": value + 1},
                          "prose": {"100": 7.0, "200": 8.0}}}
    if k_max is not None:
        row |= {"k_max": k_max, "accuracy_at_target": k_max / 200}
    if not steps:
        row["disturbance"] = value / 100
    return row


def test_cells_show_the_mean_and_half_the_range():
    assert cell([9.0, 10.0], 2) == "9.50 ±0.50" and cell([9.0], 2) == "9.00" and cell([], 2) == ""
    assert cell([None, 3.0], 2) == "inf" and cell([1234.5], 2) == "1,234"
    assert cell([100, 140], 0) == "120 ±20"


def test_tables_have_the_form_of_the_papers(tmp_path):
    rows = [made_up("default", 2.0, 0, 0, 50.0, 0), made_up("linear", 2.0, 0, 0, 17.0, 0)]
    for seed in (0, 1):
        rows += [made_up("default", 2.0, seed, 5, 12.0 + seed, 20),
                 made_up("default", 2.0, seed, 10, 11.0, 40 + 20 * seed),
                 made_up("linear", 2.0, seed, 5, 10.0, 180),
                 made_up("linear", 2.0, seed, 10, 9.0 + seed, 200)]
    result = {"rows": rows, "lengths": [100, 200], "original_window": 100, "model": "m",
              "rope": {"rope_type": "default"}, "plan": "methods"}
    windows, steps, k_max = sweep_tables(result)
    assert windows[2] == [
        ["2", "plain RoPE", "0", "50.00", "51.00", "7.00", "8.00", "0", "0.00"],
        ["2", "PI", "0", "17.00", "18.00", "7.00", "8.00", "0", "0.00"],
        ["2", "plain RoPE", "10", "11.00 ±0.00", "12.00 ±0.00", "7.00 ±0.00", "8.00 ±0.00",
         "50 ±10", "0.25 ±0.05"],
        ["2", "PI", "10", "9.50 ±0.50", "10.50 ±0.50", "7.00 ±0.00", "8.00 ±0.00",
         "200 ±0", "1.00 ±0.00"]]
    assert steps[1:] == (["s", "method", "0", "5", "10"],
                         [["2", "plain RoPE", "51.00", "13.50 ±0.50", "12.00 ±0.00"],
                          ["2", "PI", "18.00", "11.00 ±0.00", "10.50 ±0.50"]])
    assert k_max[2] == [["2", "plain RoPE", "0", "20 ±0", "50 ±10"],
                        ["2", "PI", "0", "180 ±0", "200 ±0"]]
    assert "| 2 | PI | 0 | 17.00 |" in markdown(*windows)
    figure = plot_sweep(json.loads(json.dumps(result)), tmp_path / "sweep.png")
    assert figure.stat().st_size > 10_000


def test_only_several_numbers_of_dimensions_make_a_figure_of_them(tmp_path):
    def width(*dims):
        rows = [made_up(f"dprope {n}", 2.0, 0, steps, 10.0 - steps, 100)
                | {"rope": {"rope_type": "dprope", "interpolated_dims": n}}
                for n in dims for steps in (0, 5)]
        rows += [made_up("linear", 2.0, 0, steps, 17.0 - steps, 0) for steps in (0, 5)]
        result = {"rows": rows, "lengths": [100, 200], "original_window": 100, "plan": "methods"}
        figure = plot_sweep(json.loads(json.dumps(result)), tmp_path / "sweep.png")
        return plt.imread(figure).shape[1]
    assert width() == width(40) == 3 * width(8, 40)


def test_a_blow_up_is_shown_as_such():
    """Also where another seed of the same training has none: its mean alone would hide it."""
    blown_up = {"perplexity": {"Python": {"100": None, "200": None}}}
    rows = [made_up("default", 2.0, 0, 0, 50.0, 0) | blown_up]
    by_window = sweep_tables({"rows": rows, "lengths": [100, 200]})[0]
    assert by_window[2][0][3:5] == ["inf", "inf"]
    assert math.isinf(float(cell([None], 2)))
    for steps in (5, 10):
        rows += [made_up("default", 2.0, seed, steps, 9.0, 40) for seed in (0, 1)]
    rows[-1] |= blown_up
    by_steps = sweep_tables({"rows": rows, "lengths": [100, 200]})[1]
    assert by_steps[2] == [["2", "plain RoPE", "inf", "10.00 ±0.00", "inf"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("error")  # an exception in a thread of the pool is a warning
def test_ctrl_c_saves_the_trainings_of_all_processes(base, corpus_folder, tmp_path, L):
    text = tmp_path / "prose.txt"
    text.write_text("A window in want of tokens.\n" * 900, encoding="utf-8")
    command = [sys.executable, str(sweep.__file__), "--model", str(base),
               "--corpus", str(corpus_folder), "--text", str(text), "--trials", "0",
               "--methods", "linear", "--factors", "2", "--seeds", "0", "1", "2",
               "--steps", "100000", "--step-tokens", str(2 * L), "--jobs", "2",
               "--lengths", str(L), "--max-tokens", "900", "--device", "cpu",
               "--folder", str(tmp_path), "--out", str(tmp_path / "out.json")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A test run in the background ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    runs = [tmp_path / "methods" / f"linear-x2-seed{n}" for n in range(3)]
    logs = [run / "metrics.jsonl" for run in runs[:2]]
    for _ in range(1200):
        if all(log.exists() and log.stat().st_size for log in logs) or process.poll() is not None:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the parent and its children
    try:
        _, error = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # leave nobody behind
    assert process.returncode == 130 and "Traceback" not in error, error
    for run in runs[:2]:
        state = torch.load(run / "state.pt", weights_only=True)
        assert 0 < state["step"] < 100000 and load_model(run).config.rope.rope_type == "linear"
    assert not runs[2].exists(), "nothing new begins"


def test_a_training_with_other_settings_is_neither_used_nor_replaced(command):
    command(*ONE, folder="lr")
    with pytest.raises(UserError, match="other settings: give another --folder"):
        command(*ONE, "--lr", "1e-4", folder="lr")


def test_rows_are_those_of_this_model_and_this_text(command, monkeypatch):
    before = numbers(command(*ONE, folder="same"))
    made = []

    def measure_run(c, run, steps, cache):
        made.append(steps)
        rows = {row["steps"]: row for row in before}
        return rows[steps] | {"training_seconds": 0}

    monkeypatch.setattr(sweep, "measure_run", measure_run)
    assert numbers(command(*ONE, folder="same")) == before and made == []
    monkeypatch.setattr(sweep, "weight_digest", lambda path: "another model")
    command(*ONE, folder="same")
    assert made == [0, 1]
