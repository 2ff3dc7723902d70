"""eval.py compare: every method that suits a model, each row as eval.py ppl and passkey would measure it."""
import dataclasses
import json
import math

import pytest
import torch

from cli import UserError
from data.passkey import PasskeyPrompts
from eval import Common, main, passkey, perplexity, rope_flags, validation_documents, variants
from model import LLaMA, ModelConfig
from rope import METHODS, RopeConfig, inv_freq
from weights import load_model, save_model, with_rope

def test_rope_flags_take_names_and_json():
    def flags(rope, factor=None):
        return rope_flags(Common(rope=rope, factor=factor))
    assert flags(None) is None
    assert flags("linear", 4.0) == {"rope_type": "linear", "factor": 4.0} and flags("default") == {"rope_type": "default", "factor": 1.0}
    assert flags("dynamic") == {"rope_type": "dynamic", "factor": 1.0}, "nothing to choose: s = l/L"
    assert flags('{"rope_type": "yarn", "factor": 2, "beta_fast": 16}') == {"rope_type": "yarn", "factor": 2, "beta_fast": 16}
    for rope, factor, words in [("yarn", None, "needs --factor"), (None, 2.0, "needs --rope"), ("lineer", 2.0, "unknown"), ("linear", math.nan, "factor"),
                                ('{"rope_type": "yarn"', 2.0, "neither a method's name nor a JSON object"), ('{"rope_type": "yarn", "beta": 1}', 2.0, "beta"),
                                ('{"rope_type": "yarn", "factor": 2}', 4.0, "contradict")]:
        with pytest.raises(UserError, match=words):
            load_model_rope = flags(rope, factor)
            RopeConfig.from_dict(load_model_rope)


def test_variants_are_every_method_that_suits_the_model():
    plain = ModelConfig(dim=32, n_layers=1, n_heads=2, vocab_size=9, max_seq_len=64)
    rows = variants(plain, [2.0, 4.0])
    names = [name for name, _ in rows]
    assert len(set(names)) == len(names) and names[0] == "default", "names tell the rows apart, and the model as it is comes first"
    tried = {rope["rope_type"] for _, rope in rows}
    assert tried == {name for name, m in METHODS.items() if m.rotary} - {"longrope"}, "whose factors have to be searched for"
    angles = [str(inv_freq(with_rope(plain, rope).rope, 16)) + ("grows" + rope["rope_type"]) * METHODS[rope["rope_type"]].grows for _, rope in rows]
    assert len(set(angles)) == len(rows), "no row is measured twice"
    assert "abf x2" in names and "abf x4" not in names, "whose base does not follow s"
    share = next(rope["partial_rotary_factor"] for _, rope in rows if rope["rope_type"] == "proportional")
    assert share == sum(64 * 1e4 ** (-2 * i / 16) >= 2 * math.pi for i in range(8)) / 8


def test_variants_of_other_models_and_of_what_is_chosen():
    plain = ModelConfig(dim=32, n_layers=1, n_heads=2, vocab_size=9, max_seq_len=64)
    own = dataclasses.replace(plain, rope=RopeConfig("alibi"))
    assert [name for name, _ in variants(own, [2.0])] == ["as it is", "alibi x2"], "no stretching of RoPE for a model without"
    yarn = dataclasses.replace(plain, rope=RopeConfig("yarn", 2.0, 32))
    first, second = variants(yarn, [2.0])[:2]
    assert first[0] == "as it is" and with_rope(yarn, first[1]).rope == yarn.rope and second[0] == "default"
    moved = dataclasses.replace(plain, rope=RopeConfig(random_positions=500))
    assert all(with_rope(moved, rope).rope.random_positions == 500 for _, rope in variants(moved, [2.0]))
    chosen = variants(plain, [2.0], ["pi", '{"rope_type": "yarn", "factor": 3}', '{"rope_type": "yarn", "factor": 3, "beta_fast": 2.5}', "dynamic"])
    assert [(name, rope.get("factor")) for name, rope in chosen[1:]] == [
        ("linear x2", 2.0), ("yarn x3", 3), ("yarn beta_fast=2.5 x3", 3), ("dynamic", None)]


def test_compare_measures_what_ppl_and_passkey_measure(tmp_path, tokenizer, corpus_folder, capsys):
    """A row is the model with that RoPE, and nothing of the row before."""
    torch.manual_seed(0)
    L = 2 * PasskeyPrompts(tokenizer).shortest
    model = LLaMA(ModelConfig(dim=16, n_layers=2, n_heads=1, vocab_size=tokenizer.vocab_size, multiple_of=16, max_seq_len=L))
    for layer in model.layers:
        torch.nn.init.normal_(layer.attention.wq.weight, std=0.5)
        torch.nn.init.normal_(layer.attention.wk.weight, std=0.5)
    save_model(model, tmp_path / "model", tokenizer)
    out = tmp_path / "compare.json"
    main(["compare", "--model", str(tmp_path / "model"), "--corpus", str(corpus_folder), "--methods", "default", "linear", "dynamic", "--factors", "2",
          "--lengths", str(L), str(2 * L), "--eval-tokens", "900", "--depths", "2", "--trials", "1", "--out", str(out), "--device", "cpu"])
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert [row["name"] for row in result["methods"]] == ["default", "linear x2", "dynamic"] and result["lengths"] == [L, 2 * L]
    assert result["original_window"] == L and {"model", "rope", "seed", "device", "versions", "command", "documents", "tokens_scored"} <= set(result)
    documents = validation_documents(corpus_folder, 4 * L, 900, tokenizer)
    for row in result["methods"]:
        assert row["name"] in printed
        again = load_model(tmp_path / "model", rope=row["rope"])
        for n in (L, 2 * L):
            assert row["perplexity"][str(n)] == pytest.approx(perplexity(again, documents, window=n)["perplexity"], rel=1e-9)
            assert row["passkey"][str(n)] == passkey(again, tokenizer, [n], 2, 1)["accuracy"][n]
    values = {row["name"]: row["perplexity"] for row in result["methods"]}
    assert values["dynamic"][str(L)] == values["default"][str(L)] != values["linear x2"][str(L)]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags, words", [
    (["--methods", "lineer"], "unknown"), (["--methods", "longrope"], "short_factor"), (["--factors", "0.5"], "at least 1"), (["--lengths", "0"], "--lengths"),
    (["--rope", "linear"], "--methods"), (["--methods", '{"rope_type": "yarn", "ramp": "steep"}'], "ramp")])
def test_compare_refuses_before_it_measures(tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        main(["compare", "--out", str(tmp_path / "c.json"), *flags])
    assert not list(tmp_path.iterdir())


def test_no_passkey_if_none_is_asked_for(tmp_path, corpus_folder, tokenizer, capsys):
    """A column of dashes, null in the file, and a figure of perplexity alone; texts instead of the corpus."""
    torch.manual_seed(0)
    save_model(LLaMA(ModelConfig(dim=16, n_layers=1, n_heads=1, vocab_size=tokenizer.vocab_size, multiple_of=16, max_seq_len=20)), tmp_path, tokenizer)
    text, out = tmp_path / "text.txt", tmp_path / "c.json"
    text.write_text("def f(x):\n    return x + 1\n" * 40, encoding="utf-8")
    main(["compare", "--model", str(tmp_path), "--text", str(text), "--methods", "linear", "--factors", "2", "--lengths", "20", "40", "--trials", "0",
          "--eval-tokens", "120", "--out", str(out), "--device", "cpu"])
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert result["documents"] == 1 and result["tokens_scored"] == 120
    assert [row["passkey"] for row in result["methods"]] == [{"20": None, "40": None}] * 2
    assert all(value > 1 for row in result["methods"] for value in row["perplexity"].values())
    assert printed.splitlines()[-3].split()[-2:] == ["-", "-"] and out.with_suffix(".png").exists()
