"""extras/compare.py: every method that suits a model, each row as eval.py ppl and passkey would
measure it; and the --rope flag."""
import dataclasses
import json
import math

import pytest
import torch

from common.errors import UserError
from data.corpus import validation_documents
from data.passkey import PasskeyPrompts
from eval import passkey, perplexity
from extras.compare import main, turning_share, variants
from methods import METHODS, RopeConfig, inv_freq
from model import LLaMA, ModelConfig
from weights import load_model, save_model, with_rope
from weights.flags import ModelFlags, rope_from_flags

PLAIN = ModelConfig(dim=32, n_layers=1, n_heads=2, vocab_size=9, max_seq_len=64)


def flags(rope, factor=None):
    return rope_from_flags(ModelFlags(rope=rope, factor=factor))


def test_rope_flags_take_names_and_json():
    assert flags(None) is None
    assert flags("linear", 4.0) == {"rope_type": "linear", "factor": 4.0}
    assert flags("default") == {"rope_type": "default", "factor": 1.0}
    assert flags("dynamic") == {"rope_type": "dynamic", "factor": 1.0}, "nothing to choose: s = l/L"
    assert flags('{"rope_type": "yarn", "factor": 2, "beta_fast": 16}') == {
        "rope_type": "yarn", "factor": 2, "beta_fast": 16}


@pytest.mark.parametrize("rope, factor, words", [
    ("yarn", None, "needs --factor"),
    (None, 2.0, "needs --rope"),
    ("lineer", 2.0, "unknown"),
    ("linear", math.nan, "factor"),
    ('{"rope_type": "yarn"', 2.0, "neither a method's name nor a JSON object"),
    ('{"rope_type": "yarn", "beta": 1}', 2.0, "beta"),
    ('{"rope_type": "yarn", "factor": 2}', 4.0, "contradict")])
def test_rope_flags_that_cannot_work_are_refused(rope, factor, words):
    with pytest.raises(UserError, match=words):
        given = flags(rope, factor)
        RopeConfig.from_dict(given)


# --------------------------------------------------------------------------------------------------
# The plan


@pytest.mark.parametrize("head_dim, window", [(64, 256), (88, 28), (88, 3000), (104, 60)])
def test_all_pairs_that_turn_in_the_window_go_on_turning(head_dim, window):
    """Not one less: 15 / 44 * 88 // 2 is 14 in floating-point numbers."""
    config = ModelConfig(dim=2 * head_dim, n_heads=2, max_seq_len=window)
    plain, _ = inv_freq(config.rope, head_dim)
    share = turning_share(config)
    rope = RopeConfig("proportional", 2.0, window, partial_rotary_factor=share)
    turning, _ = inv_freq(rope, head_dim)
    assert int((turning > 0).sum()) == int((plain * window >= 2 * math.pi).sum()) > 0


def test_variants_are_every_method_that_suits_the_model():
    rows = variants(PLAIN, [2.0, 4.0])
    names = [name for name, _ in rows]
    assert len(set(names)) == len(names), "names tell the rows apart"
    assert names[0] == "default", "the model as it is comes first"
    tried = {rope["rope_type"] for _, rope in rows}
    stretching = {name for name, m in METHODS.items() if m.extends_rope}
    assert tried == stretching - {"longrope"}, "whose factors have to be searched for"
    angles = []
    for _, rope in rows:
        method = METHODS[rope["rope_type"]]
        mark = str(rope) if method.length_dependent or method.distance_map else ""
        angles.append(str(inv_freq(with_rope(PLAIN, rope).rope, 16)) + mark)
    assert len(set(angles)) == len(rows), "no row is measured twice"
    assert "abf x2" in names and "abf x4" not in names, "whose base does not follow s"
    share = [rope["partial_rotary_factor"] for _, rope in rows
             if rope["rope_type"] == "proportional"]
    assert share[0] == sum(64 * 1e4 ** (-2 * i / 16) >= 2 * math.pi for i in range(8)) / 8


def test_variants_of_models_with_another_rope():
    own = dataclasses.replace(PLAIN, rope=RopeConfig("alibi"))
    assert [name for name, _ in variants(own, [2.0])] == ["as it is", "alibi x2"], (
        "no stretching of RoPE for a model without")
    yarn = dataclasses.replace(PLAIN, rope=RopeConfig("yarn", 2.0, 32))
    first, second = variants(yarn, [2.0])[:2]
    assert first[0] == "as it is" and with_rope(yarn, first[1]).rope == yarn.rope
    assert second[0] == "default"
    prope = dataclasses.replace(PLAIN, rope=RopeConfig("proportional", partial_rotary_factor=0.5))
    as_it_is = variants(prope, [2.0])[0][1]
    assert flags(json.dumps(as_it_is))["factor"] == 1, "trained at factor 1"
    moved = dataclasses.replace(PLAIN, rope=RopeConfig(random_positions=500))
    assert all(with_rope(moved, rope).rope.random_positions == 500
               for _, rope in variants(moved, [2.0]))


def test_variants_of_chosen_methods():
    chosen = variants(PLAIN, [2.0], ["pi", '{"rope_type": "yarn", "factor": 3}',
                                     '{"rope_type": "yarn", "factor": 3, "beta_fast": 2.5}',
                                     "dynamic"])
    assert [(name, rope.get("factor")) for name, rope in chosen[1:]] == [
        ("linear x2", 2.0), ("yarn x3", 3), ("yarn beta_fast=2.5 x3", 3), ("dynamic", None)]


def test_variants_with_the_same_angles_differ_by_what_else_the_model_computes():
    """ALiBi, xPos and random positions leave the frequencies as they are."""
    moved = '{"rope_type": "default", "random_positions": 500}'
    names = [name for name, _ in variants(PLAIN, [2.0, 4.0], [
        "alibi", "nope", moved, "xpos", "alibi", "none", "pi", "linear"])]
    assert names == ["default", "alibi x2", "alibi x4", "nope x2", "default random_positions=500",
                     "xpos x2", "xpos x4", "linear x2", "linear x4"]


# --------------------------------------------------------------------------------------------------
# The command


def test_compare_measures_what_ppl_and_passkey_measure(tmp_path, tokenizer, corpus_folder, capsys):
    """A row is the model with that RoPE, and nothing of the row before."""
    torch.manual_seed(0)
    L = 2 * PasskeyPrompts(tokenizer).shortest
    model = LLaMA(ModelConfig(dim=16, n_layers=2, n_heads=1, vocab_size=tokenizer.vocab_size,
                              multiple_of=16, max_seq_len=L))
    for layer in model.layers:
        torch.nn.init.normal_(layer.attention.wq.weight, std=0.5)
        torch.nn.init.normal_(layer.attention.wk.weight, std=0.5)
    save_model(model, tmp_path / "model", tokenizer)
    out = tmp_path / "compare.json"
    main(["--model", str(tmp_path / "model"), "--corpus", str(corpus_folder),
          "--methods", "default", "linear", "dynamic", "--factors", "2",
          "--lengths", str(L), str(2 * L), "--max-tokens", "900", "--depths", "2", "--trials", "1",
          "--out", str(out), "--device", "cpu"])
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert [row["name"] for row in result["methods"]] == ["default", "linear x2", "dynamic"]
    assert result["lengths"] == [L, 2 * L] and result["original_window"] == L
    assert {"model", "rope", "seed", "device", "versions", "command", "documents",
            "tokens_scored"} <= set(result)
    documents = validation_documents(corpus_folder, 4 * L, 900, tokenizer)
    for row in result["methods"]:
        assert row["name"] in printed
        again = load_model(tmp_path / "model", rope=row["rope"])
        for n in (L, 2 * L):
            expected = perplexity(again, documents, window=n)["perplexity"]
            assert row["perplexity"][str(n)] == pytest.approx(expected, rel=1e-9)
            assert row["passkey"][str(n)] == passkey(again, tokenizer, [n], 2, 1)["accuracy"][n]
    values = {row["name"]: row["perplexity"] for row in result["methods"]}
    assert values["dynamic"][str(L)] == values["default"][str(L)] != values["linear x2"][str(L)]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags, words", [
    (["--methods", "lineer"], "unknown"),
    (["--methods", "longrope"], "short_factor"),
    (["--factors", "0.5"], "at least 1"),
    (["--lengths", "0"], "--lengths"),
    (["--rope", "linear"], "--methods"),
    (["--text", "x.txt", "--max-tokens", "500", "--lengths", "256", "512"],
     "--max-tokens 500 is below"),
    (["--methods", '{"rope_type": "yarn", "ramp": "steep"}'], "ramp"),
    (["--methods", '{"rope_type": "linear", "factor": "x"}'], "factor"),
    (["--methods", '{"rope_type": "linear", "factor": [2]}'], "factor")])
def test_compare_refuses_before_it_measures(tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        main(["--out", str(tmp_path / "c.json"), *flags])
    assert not list(tmp_path.iterdir())


def test_no_passkey_if_none_is_asked_for(tmp_path, corpus_folder, tokenizer, capsys):
    """A column of dashes, null in the file, and a figure of perplexity alone; texts instead of the
    corpus."""
    torch.manual_seed(0)
    model = LLaMA(ModelConfig(dim=16, n_layers=1, n_heads=1, vocab_size=tokenizer.vocab_size,
                              multiple_of=16, max_seq_len=20))
    save_model(model, tmp_path, tokenizer)
    text, out = tmp_path / "text.txt", tmp_path / "c.json"
    text.write_text("def f(x):\n    return x + 1\n" * 40, encoding="utf-8")
    main(["--model", str(tmp_path), "--text", str(text), "--methods", "linear", "--factors", "2",
          "--lengths", "20", "40", "--trials", "0", "--max-tokens", "120", "--out", str(out),
          "--device", "cpu"])
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert result["documents"] == 1 and result["tokens_scored"] == 120
    assert [row["passkey"] for row in result["methods"]] == [{"20": None, "40": None}] * 2
    assert all(value > 1 for row in result["methods"] for value in row["perplexity"].values())
    assert printed.splitlines()[-3].split()[-2:] == ["-", "-"]
    assert out.with_suffix(".png").exists()
