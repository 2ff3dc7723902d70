"""extras/real_model.py on a random model: equal rows, what is kept, and what the tables say."""
import json
import math
import shutil

import pytest
import torch

from common.errors import UserError
from eval import perplexity
from extras import real_model
from extras.real_model import BANDS, by_band, tables
from model import LLaMA, ModelConfig
from weights import load_model, save_model

L = 256


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=tokenizer.vocab_size,
                         multiple_of=16, max_seq_len=L)
    save_model(LLaMA(config), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("\n".join(f"Sentence {i} of the prose." for i in range(200)))
    return path


@pytest.fixture
def command(base, text, corpus_folder, tmp_path, monkeypatch):
    """Run the command in a folder; returns the result. A figure takes longer than all else."""
    def run(*flags, figure=False):
        if not figure:
            monkeypatch.setattr(real_model, "plot_real_model", lambda result, path: path)
        real_model.main(["--model", str(base), "--corpus", str(corpus_folder), "--text", str(text),
                         "--row-length", "16", "--steps", "1", "3", "--folder",
                         str(tmp_path / "runs"), "--out", str(tmp_path / "r.json"), "--device",
                         "cpu", *flags])
        return json.loads((tmp_path / "r.json").read_text())
    return run


def test_rows_are_what_the_folders_measure(command, base, text, tokenizer, tmp_path):
    result = command("--keys", "2", figure=True)
    rows = result["rows"]
    assert [(row["method"], row["steps"]) for row in rows] == [
        ("default", 0), ("default", 1), ("default", 3), ("linear", 0), ("linear", 1), ("linear", 3)]
    assert [row["tokens_seen"] for row in rows[:3]] == [0, 64, 192]
    assert [row.get("keys", 0) for row in rows[:3]] == [2, 0, 2]
    ids = torch.tensor(tokenizer.encode(text.read_text(), bos=True)[:2 * L + 1]).numpy()
    trained = load_model(tmp_path / "runs" / "linear-x2-seed0")
    for row, model in ((rows[5], trained), (rows[0], load_model(base))):
        measured = perplexity(model, [ids], 2 * L, 2 * L, bins=16, progress=False)
        assert row["nll_by_position"]["prose"] == measured["nll_by_context"]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    losses = [rows[i]["nll_by_position"]["prose"][-1] for i in (3, 4, 5)]
    assert len(set(losses)) == 3, "training changes the model"


def test_zero_steps_train_nothing(command, monkeypatch, tmp_path):
    """The rows are those that a training begins with, measured once; the figure has no steps."""
    monkeypatch.setattr(real_model, "fit", lambda *given: pytest.fail("trained"))
    folds = '{"rope_type": "self_extend", "temperature": "log_n"}'
    rows = command("--steps", "0", "--methods", "default", "yarn", folds, "--keys", "2",
                   figure=True)["rows"]
    assert [(row["method"], row["steps"], row["keys"]) for row in rows] == [
        ("default", 0, 2), ("yarn", 0, 2), (folds, 0, 2)]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.undo()
    monkeypatch.setattr(real_model, "losses", lambda *given: pytest.fail("measured again"))
    monkeypatch.setattr(real_model, "passkey", lambda *given, **rest: pytest.fail("found again"))
    other = tmp_path / "other.json"
    command("--steps", "0", "--methods", "yarn", "--keys", "2", "--out", str(other))
    assert json.loads(other.read_text())["rows"] == rows[1:2]


def test_what_is_measured_is_kept_and_more_steps_go_on(command, monkeypatch, tmp_path):
    before = command()["rows"]
    trained = []
    fit = real_model.fit
    monkeypatch.setattr(real_model, "fit",
                        lambda model, config, *rest: trained.append(config.steps)
                        or fit(model, config, *rest))
    assert command()["rows"] == before
    assert trained == []
    more = command("--steps", "1", "3", "4", "--methods", "linear")["rows"]
    assert trained == [4]
    assert more[:3] == before[3:]
    fresh = command("--steps", "4", "--methods", "linear", "--folder", str(tmp_path / "fresh"))
    seconds = {"training_seconds": 0.0}
    assert fresh["rows"][1] | seconds == more[3] | seconds, "in one go it is the same"
    with pytest.raises(UserError, match="holds a training of more than 2 steps"):
        command("--steps", "2", "4", "--methods", "linear")
    with pytest.raises(UserError, match="other settings: give another --folder"):
        command("--lr", "1e-3")


def test_rows_of_a_result_that_is_there_are_not_measured_again(command, monkeypatch, tmp_path):
    """Not even where the folders of the trainings are gone."""
    before = command("--methods", "linear")["rows"]
    shutil.rmtree(tmp_path / "runs")
    measured = []
    measure = real_model.losses
    monkeypatch.setattr(real_model, "losses",
                        lambda *given: measured.append(1) or measure(*given))
    both = command("--methods", "linear", "default")["rows"]
    assert both[:3] == before
    assert len(measured) == 3, "those of the other method"
    alone = command("--methods", "default")["rows"]
    assert alone == both[3:] + both[:3], "an earlier piece stays in the file"
    assert len(measured) == 3
    command("--methods", "linear", "--lr", "1e-3", "--folder", str(tmp_path / "other"))
    assert len(measured) == 3 + 3, "other settings are another work"


def test_keys_join_the_rows_that_are_there(command, monkeypatch, tmp_path):
    """A row has its keys whenever they are asked for, before or after its losses; without --keys
    it keeps them."""
    before = command("--methods", "linear")["rows"]
    monkeypatch.setattr(real_model, "losses", lambda *given: pytest.fail("losses measured again"))
    rows = command("--methods", "linear", "--keys", "1")["rows"]
    assert [row.get("keys") for row in rows] == [1, None, 1]
    assert len(rows) == len(before)
    for row, earlier in zip(rows, before):
        assert earlier.items() <= row.items()
    assert command("--methods", "linear")["rows"] == rows
    monkeypatch.setattr(real_model, "passkey", lambda *given, **rest: pytest.fail("found again"))
    assert command("--methods", "linear", "--keys", "1")["rows"] == rows
    (_, _, found) = tables(json.loads((tmp_path / "r.json").read_text()))[1]
    assert [row[1] for row in found] == ["0", "3"]


def test_lora_beside_full_fine_tuning(command, monkeypatch, tmp_path):
    """Its rows say so and have a folder of their own. Those that are there stay, hash and all."""
    full = command("--methods", "linear")["rows"]
    measured = []
    measure = real_model.losses
    monkeypatch.setattr(real_model, "losses",
                        lambda *given: measured.append(1) or measure(*given))
    result = command("--methods", "linear", "--lora-rank", "0", "2", figure=True)
    rows = result["rows"]
    assert rows[:3] == full
    assert not any("lora_rank" in row for row in full)
    assert [(row["lora_rank"], row["steps"], row["tokens_seen"]) for row in rows[3:]] == [
        (2, 1, 64), (2, 3, 192)]
    assert len(measured) == 2, "untrained it is the same model"
    assert len({row["conditions"] for row in rows}) == 5
    assert len({row["perplexity"]["prose"] for row in rows}) == 5
    table = tables(result)[0][2]
    assert [row[0] for row in table] == ["PI"] * 3 + ["PI, LoRA r = 2"] * 2
    assert (tmp_path / "runs" / "linear-x2-seed0-lora2" / "adapter_config.json").exists()
    alone = command("--methods", "linear", "--lora-rank", "2")["rows"]
    assert sorted(row["conditions"] for row in alone) == sorted(row["conditions"] for row in rows)
    assert len(measured) == 2


def test_two_seeds_share_the_untrained_rows(command):
    result = command("--methods", "linear", "--seeds", "0", "1", "--steps", "2", "--keys", "1")
    assert [(row["seed"], row["steps"]) for row in result["rows"]] == [(0, 0), (0, 2), (1, 2)]
    (_, header, body), (_, lengths, found) = tables(result)
    assert header[3:] == ["32 to 128", "128 to 256", "256 to 384", "384 to 512"]
    assert lengths[3:] == ["128", "256", "384", "512"]
    assert [row[:3] for row in body] == [["PI", "0", "0"], ["PI", "2", "128"]]
    assert "±" in body[1][3]
    assert found[1][3].endswith(" of 2")


def test_methods_that_are_only_measured(command, base, text, tokenizer):
    rows = command("--methods", "linear", "--untrained", "yarn", "pi", "--steps", "1")["rows"]
    assert [(row["method"], row["steps"]) for row in rows] == [
        ("yarn", 0), ("linear", 0), ("linear", 1)]
    ids = torch.tensor(tokenizer.encode(text.read_text(), bos=True)[:2 * L + 1]).numpy()
    yarn = load_model(base, rope={"rope_type": "yarn", "factor": 2})
    measured = perplexity(yarn, [ids], 2 * L, 2 * L, bins=16, progress=False)
    assert rows[0]["nll_by_position"]["prose"] == measured["nll_by_context"]


def test_bands_are_means_of_losses():
    row = {"nll_by_position": {"x": [float(i) for i in range(16)]}}
    assert by_band(row, "x") == [math.exp(sum(range(a, b)) / (b - a)) for a, b in BANDS]


@pytest.mark.parametrize("flags, words", [
    (["--steps", "-1"], "--steps, --warmup, --keys, --seeds and --lora-rank have to be at least"),
    (["--warmup", "-1"], "--warmup, --keys"),
    (["--steps", "0", "--seeds", "0", "1"], "untrained there is one row a method"),
    (["--steps", "0", "--lora-rank", "8"], "no --lora-rank"),
    (["--row-length", "0"], "--row-length 0: has to be from 1 to L' = 512"),
    (["--row-length", "513"], "--row-length 513: has to be from 1"),
    (["--methods", "linear", "nosuch"], "nosuch"),
    (["--methods", '{"rope_type": "yarn", "factor": 4}'], "its own factor contradicts --factor 2"),
    (["--lora-rank", "-1"], "--lora-rank have to be at least 0"),
    (["--factor", "1"], "--factor 1.0: give a number above 1"),
    (["--text", "missing.txt"], "missing.txt: no such file")])
def test_wrong_input(command, flags, words):
    with pytest.raises(UserError, match=words):
        command(*flags)


def test_texts_of_every_python(base, corpus_folder, tmp_path):
    """Without --text: held-out documents of the corpus, and the language reference."""
    real_model.main(["--model", str(base), "--corpus", str(corpus_folder), "--row-length", "16",
                     "--steps", "1", "--methods", "linear", "--folder", str(tmp_path / "runs"),
                     "--out", str(tmp_path / "r.json"), "--device", "cpu"])
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result["documents"]) == ["held-out tokens", "language reference"]
    assert set(result["documents"].values()) == {2 * L + 1}
