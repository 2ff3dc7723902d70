"""bench.py: every row is there, both sides do the same work, and what is wrong is told before anything is timed. No time is tested."""
import importlib.util
import json
import sys

import pytest
import torch

import bench
from cli import UserError
from model import LLaMA, ModelConfig
from weights import save_model


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("bench")
    save_model(LLaMA(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tokenizer.vocab_size, multiple_of=16, max_seq_len=32)),
               folder / "model", tokenizer)
    (folder / "book.txt").write_text("It was the best of windows, it was the worst of windows.\n" * 20, encoding="utf-8")
    return folder


@pytest.fixture
def measured(place):
    def call(*flags):
        bench.main(["--model", str(place / "model"), "--text", str(place / "book.txt"), "--batch-size", "2", "--repeat", "1", "--lengths", "8", "16",
                    "--window", "24", "--stride", "8", "--tokens", "100", "--device", "cpu", "--out", str(place / "bench.json"), *flags])
        return json.loads((place / "bench.json").read_text(encoding="utf-8"))
    return call


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="the peer is transformers")
def test_both_sides_are_measured_and_have_the_same_perplexity(measured, monkeypatch):
    before, found = torch.get_float32_matmul_precision(), []
    for name in ("perplexity", "straightforward"):
        monkeypatch.setattr(bench, name, lambda *a, f=getattr(bench, name): found.append(torch.get_float32_matmul_precision()) or f(*a))
    rows = {r["name"]: r for r in measured("--what", *bench.WHAT, "--matmul", "highest", "medium")["bench"]}
    assert found == ["highest", "highest", "medium", "medium"] and torch.get_float32_matmul_precision() == before
    sides = ["ours", "transformers"]
    assert list(rows) == [*(f"attention, {n} tokens, {name}" for n in (8, 16) for name in ("naive", "tiled", "sdpa")),
                          *(f"training step, 2 x 24 tokens, {side}" for side in sides),
                          *(f"generation, 2 x 64 tokens after 16, {side}" for side in sides),
                          *(f"perplexity, window 24, stride 8, 100 tokens, {side}{more}" for more in ("", ", matmul medium") for side in sides)]
    assert all(r["seconds"] > 0 for r in rows.values())
    for name, r in rows.items():
        if ", ours" in name:
            assert r["ratio"] == rows[name.replace("ours", "transformers")]["seconds"] / r["seconds"]
    assert rows["attention, 8 tokens, sdpa"]["ratio"] == 1
    exact, medium = (rows[f"perplexity, window 24, stride 8, 100 tokens, ours{more}"] for more in ("", ", matmul medium"))
    assert abs(exact["difference"]) < 1e-5 and abs(medium["difference"]) < 1e-2  # medium is highest on a CPU without units for bfloat16


def test_without_the_peer_our_numbers_stand_alone(measured, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    rows = measured("--what", "generation", "perplexity")["bench"]
    assert len(rows) == 2 and all("ratio" not in r for r in rows) and "stand alone" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["--repeat", "0"], "--repeat"), (["--tokens", "-1"], "--tokens"), (["--what", "perplexity", "--text", "no.txt"], "no.txt"),
    (["--what", "perplexity", "--stride", "25"], "stride 25")])
def test_mistakes_are_told_before_the_peer_is_made(measured, monkeypatch, flags, words):
    monkeypatch.setattr(bench, "peer_of", None)
    with pytest.raises(UserError, match=words):
        measured(*flags)
