"""bench.py: every row is there, both sides do the same work, and what is wrong is told before
anything is timed. No time is tested."""
import importlib.util
import json
import math
import multiprocessing
import os
import sys
from functools import partial

import pytest
import torch

import bench
from common.errors import UserError
from extras.long_window import MAPS
from model import LLaMA, ModelConfig
from weights import save_model
from weights.size import flops_per_token


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("bench")
    config = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=16,
                         vocab_size=tokenizer.vocab_size, max_seq_len=32)
    save_model(LLaMA(config), folder / "model", tokenizer)
    text = "It was the best of windows, it was the worst of windows.\n" * 20
    (folder / "book.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def measured(place):
    def call(*flags):
        bench.main(["--model", str(place / "model"), "--text", str(place / "book.txt"),
                    "--batch-size", "2", "--repeat", "1", "--lengths", "8", "16", "--window", "24",
                    "--stride", "8", "--tokens", "100", "--device", "cpu",
                    "--out", str(place / "bench.json"), *flags])
        return json.loads((place / "bench.json").read_text(encoding="utf-8"))
    return call


needs_transformers = pytest.mark.skipif(not importlib.util.find_spec("transformers"),
                                        reason="needs transformers")


def note_precision(monkeypatch, name, found):
    """Have bench's function `name` append PyTorch's precision to `found` when it is called."""
    function = getattr(bench, name)

    def noting(*arguments):
        found.append(torch.get_float32_matmul_precision())
        return function(*arguments)
    monkeypatch.setattr(bench, name, noting)


@needs_transformers
def test_both_sides_are_measured_and_have_the_same_perplexity(measured, monkeypatch):
    before = torch.get_float32_matmul_precision()
    found = []
    note_precision(monkeypatch, "perplexity", found)
    note_precision(monkeypatch, "transformers_loop", found)
    monkeypatch.setattr(bench, "OwnProcess", Here)
    result = measured("--what", *(w for w in bench.WHAT if w != "maps"), "--matmul", "highest",
                      "medium")
    assert found == ["highest", "highest", "medium", "medium"]
    assert torch.get_float32_matmul_precision() == before
    rows = {r["name"]: r for r in result["bench"]}
    scored = "perplexity, window 24, stride 8, 100 tokens"
    assert list(rows) == [
        "attention, 8 tokens, naive", "attention, 8 tokens, tiled", "attention, 8 tokens, sdpa",
        "attention, 16 tokens, naive", "attention, 16 tokens, tiled", "attention, 16 tokens, sdpa",
        "training step, 2 x 24 tokens, float32, ours",
        "training step, 2 x 24 tokens, float32, transformers",
        "training step, 2 x 24 tokens, float32, as users run it, ours",
        "training step, 2 x 24 tokens, float32, as users run it, transformers",
        "generation, 2 x 64 tokens after 16, float32, ours",
        "generation, 2 x 64 tokens after 16, float32, transformers",
        f"{scored}, ours", f"{scored}, transformers",
        f"{scored}, ours, matmul medium", f"{scored}, transformers, matmul medium"]
    assert all(r["seconds"] > 0 for r in rows.values())
    grown = rows["attention, 16 tokens, tiled"]
    shorter = rows["attention, 8 tokens, tiled"]
    assert grown["growth"] == pytest.approx(math.log2(grown["bytes"] / shorter["bytes"]))
    assert "growth" not in shorter and 0 < shorter["bytes"] < grown["bytes"]
    decoding = rows["generation, 2 x 64 tokens after 16, float32, ours"]
    assert decoding["bandwidth"] > 0 and decoding["products"] > 0
    for name, r in rows.items():
        if ", ours" in name:
            peer = rows[name.replace("ours", "transformers")]
            assert r["ratio"] == peer["seconds"] / r["seconds"]
        if ", transformers" in name:
            assert "ratio" not in r
    assert rows["attention, 8 tokens, sdpa"]["ratio"] == 1
    exact = rows[f"{scored}, ours"]
    medium = rows[f"{scored}, ours, matmul medium"]
    assert abs(exact["difference"]) < 1e-5
    assert abs(medium["difference"]) < 1e-2  # on a CPU without units for bfloat16 it is highest


def test_every_distance_map_is_beside_plain_rope(measured, monkeypatch):
    monkeypatch.setattr(bench, "peer_loader", None)  # it is not asked for
    result = measured("--what", "maps", "--lengths", "40")
    names = [row["name"].split(", ")[2] for row in result["bench"]]
    assert names == ["default", *MAPS] and "rerope" in MAPS
    assert [row["ratio"] for row in result["bench"]][0] == 1
    assert all(row["seconds"] > 0 for row in result["bench"])


def test_the_pass_of_a_map_is_attention_in_its_bands(monkeypatch):
    """Every side computes what the model would."""
    seen = []
    monkeypatch.setattr(bench, "attention_in_bands", lambda q, k, v, bands, *more: seen.append(
        [int(band.keys.stop.max()) for band in bands]) or q)
    monkeypatch.setattr(bench, "time_sides", lambda sides, *_: {
        name: {"seconds": 1.0, "bytes": side() and None} for name, side in sides.items()})
    model = LLaMA(ModelConfig(dim=32, n_layers=1, n_heads=4, vocab_size=64, max_seq_len=32))
    bench.bench_maps(bench.BenchConfig(lengths=[40]), model, torch.float32)
    assert len(seen) == len(MAPS)
    assert all(len(ends) > 1 and ends[-1] == 40 for ends in seen), "and each of them folds"


def test_without_the_peer_our_numbers_stand_alone(measured, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    rows = measured("--what", "generation", "perplexity")["bench"]
    assert len(rows) == 2 and all("ratio" not in r for r in rows)
    assert "stand alone" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["--repeat", "0"], "--repeat"), (["--tokens", "-1"], "--tokens"),
    (["--what", "perplexity", "--text", "no.txt"], "no.txt"),
    (["--what", "perplexity", "--stride", "25"], "stride 25")])
def test_mistakes_are_told_before_the_peer_is_made(measured, monkeypatch, flags, words):
    monkeypatch.setattr(bench, "peer_loader", None)
    with pytest.raises(UserError, match=words):
        measured(*flags)


def test_work_is_counted_per_second(monkeypatch):
    """FLOPs of causal attention, 4 H D T(T+1)/2 forward and 2.5 times as many backward. The prompt
    and the first token, here 0.1 s, are no part of a generation's time."""
    seconds = {("ours", 1): 0.1, ("ours", 65): 0.6}     # of a generation; all else takes 0.5
    monkeypatch.setattr(bench, "time_sides", lambda sides, *_, **__: {
        name: {"seconds": seconds.get(name, 0.5), "bytes": None} for name in sides})
    model = LLaMA(ModelConfig(dim=32, n_layers=1, n_heads=4, vocab_size=64, max_seq_len=32))
    rows = bench.bench_attention(bench.BenchConfig(lengths=[10]), model, torch.float32)
    assert all(r["gflops"] == pytest.approx(14 * 4 * 8 * 55 / 0.5 / 1e9) for r in rows)
    row, = bench.bench_training(bench.BenchConfig(batch_size=3), model, None, torch.float32)
    assert row["tokens_per_second"] == 3 * 32 / 0.5
    assert row["tflops"] == row["tokens_per_second"] * flops_per_token(model.config, 32) / 1e12
    row, = bench.bench_generation(bench.BenchConfig(batch_size=3), model, None, torch.float32)
    assert row["tokens_per_second"] == pytest.approx(3 * 64 / 0.5)
    assert row["bandwidth"] == row["products"] == pytest.approx(64 * 0.5 / 0.5)


def test_each_side_in_a_process_of_its_own():
    """It works only when it is called, and then in turns."""
    here, there = multiprocessing.Pipe()
    sides = [bench.OwnProcess(partial(sending, there, n)) for n in range(2)]
    for n in (0, 1, 1, 0):
        assert not here.poll(0.05)
        sides[n]()
        number, pid = here.recv()
        assert number == n and pid == sides[n].process.pid != os.getpid()
    for side in sides:
        side.end()
        assert not side.process.is_alive()
        with pytest.raises(UserError, match="process of one side has ended"):
            side()


class Here:
    """OwnProcess without a process, which would import transformers once more."""

    def __init__(self, build):
        self.function = build()

    def __call__(self):
        self.function()

    def end(self):
        pass


def sending(pipe, number):
    return lambda: pipe.send((number, os.getpid()))


@needs_transformers
def test_compiled_on_both_sides(measured, monkeypatch):
    """Every block of both; nothing is compiled in this test."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    monkeypatch.setattr(bench, "OwnProcess", Here)
    rows = measured("--what", "training", "--compile")["bench"]
    names = [kind.__name__ for kind in compiled]
    sides = ["Block"] * 2 + ["LlamaDecoderLayer"] * 2
    assert names == sides + sides, "like for like, and as users run it"
    assert rows[0]["name"] == "training step, 2 x 24 tokens, float32, compiled, ours"
