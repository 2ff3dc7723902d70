"""extras/longppl.py: which tokens are key, what a model loses on them, and who may say so."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from common.cache import ResultCache
from common.cli import run_command
from common.errors import UserError
from data.tokenizer import train_tokenizer
from extras import longppl as module
from extras.longppl import (LongPPLFlags, key_tokens, list_judged, long_perplexity, longppl, main,
                            token_losses)
from model import LLaMA, ModelConfig
from small_models import VOCAB, random_documents, small_model
from weights import load_model, save_model


# ---- The measure ---------------------------------------------------------------------------------


@pytest.mark.parametrize("l_long, l_short, key", [
    (0.5, 3.0, True),        # the long context turns a surprise into a certainty
    (1.9, 4.0, True),
    (0.5, 2.5, False),       # it brings exactly 2 nats: more are wanted
    (0.5, 2.4, False),
    (2.0, 9.0, False),       # it brings much, and the loss is still not below 2
    (5.0, 9.0, False),
    (3.0, 0.5, False),       # it harms
    (0.1, 0.1, False)])
def test_key_tokens_of_a_table_by_hand(l_long, l_short, key):
    assert key_tokens(np.array([[l_long]]), np.array([[l_short]])).tolist() == [[key]]


def test_long_perplexity_of_a_table_by_hand():
    losses = np.array([[0.5, 9.0, 1.5], [7.0, 1.0, 8.0]])
    key = np.array([[True, False, True], [False, True, False]])
    value, error = long_perplexity(losses, key)
    assert value == pytest.approx(math.e)  # the mean of 0.5, 1.5 and 1.0
    assert error == pytest.approx(np.std([0.5, 1.5, 1.0]) / 3**0.5)


def test_a_uniform_model_has_the_size_of_its_vocabulary():
    model = small_model()
    torch.nn.init.zeros_(model.output.weight)
    pieces = random_documents(25, 25)
    losses = token_losses(model, pieces, 24, 24, progress=False)
    key = np.random.default_rng(0).random(losses.shape) < 0.2
    assert long_perplexity(losses, key)[0] == pytest.approx(VOCAB, rel=1e-6)


def naive_loss(model, context, token):
    with torch.no_grad():
        return -model(torch.from_numpy(context[None]))[0, -1].log_softmax(-1)[token].item()


def test_losses_with_the_whole_text_and_with_its_last_tokens():
    """Token by token from its definition: all that comes before, or exactly the last 5."""
    model, pieces = small_model(), random_documents(21, 21)
    whole = token_losses(model, pieces, 20, 20, progress=False)
    last = token_losses(model, pieces, 5, 1, progress=False)
    assert whole.shape == last.shape == (2, 20)
    for n, piece in enumerate(pieces):
        for t in range(1, 21):
            token, before = piece[t], piece[:t]
            assert whole[n, t - 1] == pytest.approx(naive_loss(model, before, token), abs=1e-4)
            assert last[n, t - 1] == pytest.approx(naive_loss(model, before[-5:], token), abs=1e-4)
    assert np.abs(whole - last)[:, :5].max() < 1e-5 < 0.01 < np.abs(whole - last)[:, 5:].max()


def test_a_stride_leaves_the_context_that_is_said():
    """K = 6, stride 3: from 4 to 6 tokens, and all of them where there are fewer."""
    model, [piece] = small_model(), random_documents(23)
    losses = token_losses(model, [piece], 6, 3, progress=False)[0]
    sizes = set()
    for t in range(1, 23):
        possible = range(4, 7) if t > 6 else [t]
        fits = [n for n in possible
                if abs(naive_loss(model, piece[t - n:t], piece[t]) - losses[t - 1]) < 1e-4]
        assert len(fits) == 1
        sizes.update(fits if t > 6 else [])
    assert sizes == {4, 5, 6}


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Two models with a window of 24 tokens, an evaluator with one of 96, one with another
    tokenizer, and texts."""
    place = tmp_path_factory.mktemp("longppl")
    shape = dict(dim=16, n_layers=1, n_heads=2, multiple_of=8, max_seq_len=24)
    torch.manual_seed(0)
    for name in ("base", "other"):
        save_model(LLaMA(ModelConfig(**shape, vocab_size=tokenizer.vocab_size)), place / name,
                   tokenizer)
    stretched = load_model(place / "other", rope={"rope_type": "yarn", "factor": 4})
    save_model(stretched, place / "long", tokenizer)
    foreign = train_tokenizer(["some other words " * 50], place / "other.model", 370)
    save_model(LLaMA(ModelConfig(**shape, vocab_size=foreign.vocab_size)), place / "foreign",
               foreign)
    (place / "a.txt").write_text("def f(x):\n    return x + 1\n" * 20, encoding="utf-8")
    (place / "short.txt").write_text("def f(x):\n", encoding="utf-8")
    return place


def words(folder, *flags):
    defaults = ["--model", "@base", "--evaluator", "@long", "--text", "@a.txt", "--device", "cpu"]
    return [flag.replace("@", f"{folder}/") for flag in [*defaults, *flags]]


@pytest.fixture
def every_token_is_key(monkeypatch):
    monkeypatch.setattr(module, "GAIN", -100)
    monkeypatch.setattr(module, "PREDICTED_WELL", 100)


def test_the_command_judges_all_on_the_same_tokens(folder, tokenizer, capsys, every_token_is_key):
    """Every token is key: LongPPL is perplexity, that of one pass over each piece."""
    out = folder / "result.json"
    main(words(folder, "--model", "@base", "@other", "--rope", "linear", "--out", str(out)))
    found, printed = json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out
    assert {"model", "rope", "seed", "device", "versions", "command", "evaluator"} <= set(found)
    assert (found["length"], found["short"], found["stride"]) == (96, 12, 3)
    assert found["short_context"] == [10, 12] and found["key_share"] == 1
    assert found["tokens"] == found["key_tokens"] == 96 * found["pieces"] > 96
    names = [row["name"] for row in found["judged"]]
    assert names == [f"{model}, {name}" for model in ("base", "other")
                     for name in ("default", "default, in its window", "linear x4")]
    text = tokenizer.encode((folder / "a.txt").read_text(encoding="utf-8"))
    pieces = [np.array([tokenizer.bos_id, *text[start:start + 96]])
              for start in range(0, len(text) - 95, 96)]
    assert len(pieces) == found["pieces"]
    for row in found["judged"]:
        model = load_model(row["model"], rope=row["rope"])
        losses = token_losses(model, pieces, row["window"], row["stride"], progress=False)
        assert row["perplexity"] == pytest.approx(np.exp(losses.mean()))
        assert row["longppl"] == pytest.approx(row["perplexity"])
        assert row["name"] in printed
    windows = [(row["window"], row["stride"]) for row in found["judged"]]
    assert windows == [(96, 96), (24, 6), (96, 96)] * 2
    assert found["judged"][2]["rope"]["factor"] == 4
    assert len({row["perplexity"] for row in found["judged"]}) == 6
    assert found["evaluator"]["perplexity_long"] != found["evaluator"]["perplexity_short"]


def test_an_interrupted_command_goes_on(folder, tmp_path, monkeypatch, every_token_is_key):
    def flags():
        return LongPPLFlags(model=[f"{folder}/base"], evaluator=f"{folder}/long", device="cpu",
                            text=[f"{folder}/a.txt"], out=str(tmp_path / "r.json"))
    first = longppl(flags(), ResultCache(tmp_path / "r.json"))
    assert (tmp_path / "r.json.partial").exists()
    monkeypatch.setattr(module, "window_nll", None)  # nothing is computed again
    again = longppl(flags(), ResultCache(tmp_path / "r.json"))
    assert first.pop("seconds") and again.pop("seconds") and first == again


def test_the_corpus_is_cut_into_pieces(folder, corpus_folder, tokenizer):
    flags = LongPPLFlags(corpus=str(corpus_folder), length=300, max_tokens=3000)
    pieces = module.read_pieces(flags, tokenizer)
    assert [len(piece) for piece in pieces] == [301] * 10
    assert all(piece[0] == tokenizer.bos_id for piece in pieces)
    assert not any((piece[1:] == tokenizer.bos_id).any() for piece in pieces)
    assert len({piece.tobytes() for piece in pieces}) == 10
    flags.max_tokens = 0
    assert len(module.read_pieces(flags, tokenizer)) > 10


def test_rows_are_the_model_as_it_is_and_with_every_rope(folder):
    flags = LongPPLFlags(model=[f"{folder}/long"], rope=["default", "pi"], factor=2.0, length=96)
    rows = list_judged(flags)
    assert [(row.name, row.window) for row in rows] == [
        ("as it is", 96), ("default", 96), ("linear x2", 96)]
    flags = LongPPLFlags(model=[f"{folder}/long"], length=96)
    assert [row.name for row in list_judged(flags)] == ["as it is"]


@pytest.mark.parametrize("flags, words_of_it", [
    ("--evaluator @base", "has a window of 24 tokens: it cannot say what 96 are good for"),
    ("--evaluator @base --evaluator-rope yarn --rope yarn", "is itself judged (as 'yarn x4')"),
    ("--model @base @long", "is itself judged (as 'long, as it is')"),
    ("--model @long/../long", "choose what flatters it"),
    ("--evaluator @none", "--rope yarn --factor 4"),
    ("--model @foreign", "has another tokenizer than the evaluator"),
    ("--short 96", "--short 96: has to be from 1 to below the --length, 96"),
    ("--short 0", "--short 0"), ("--stride 0", "--stride 0"), ("--stride 13", "--short, 12"),
    ("--max-tokens 95", "at least a piece of 96"), ("--length 0", "below the --length"),
    ("--factor 0.5", "at least 1"), ("--rope rotten", "unknown"),
    ('--rope {"rope_type":"linear","factor":"2"}', "factor"),
    ("--text @short.txt", "no file has 96 tokens"), ("--text @none.txt", "no such file"),
    ("", "no token needs the long context")])
def test_a_mistake_is_one_line_and_exit_code_2(folder, capsys, flags, words_of_it):
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main(words(folder, *flags.split())))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: "), error
    assert error.count("\n") == 1 and words_of_it in error, error


@pytest.mark.parametrize("broken", ["base", "long"])
def test_a_broken_model_is_no_result(folder, tmp_path, every_token_is_key, monkeypatch, broken):
    load = module.load_from_flags

    def load_broken(flags, **more):
        model, tokenizer = load(flags, **more)
        if Path(flags.model).name == broken:
            torch.nn.init.constant_(model.output.weight, math.nan)
        return model, tokenizer

    monkeypatch.setattr(module, "load_from_flags", load_broken)
    with pytest.raises(UserError, match="the loss is not a number"):
        main(words(folder, "--out", str(tmp_path / "r.json")))
    assert not (tmp_path / "r.json").exists()


def test_the_same_weights_may_choose_with_another_rope(folder, every_token_is_key):
    main(words(folder, "--evaluator", "@base", "--evaluator-rope", "yarn", "--rope", "linear"))
