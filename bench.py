"""Speed and memory, beside the same model in Hugging Face transformers, measured in the same run.

    python bench.py             # attention, training and generation; two minutes on a laptop
    python bench.py --what maps --lengths 4096       # distance maps beside plain tiled attention
    python bench.py --what training --dtype bfloat16 --compile
    python bench.py --what generation --model M --batch-size 1 --prompt 2048
    python bench.py --what attention --attention tiled --lengths 2048 8192 32768 --repeat 1
    python bench.py --what perplexity --model M --text book.txt --window 2048 --stride 256 \\
        --tokens 16384 --matmul highest medium

Transformers (pip install transformers safetensors) gets our weights through `python -m weights
export`; without it our numbers stand alone. Times are medians of alternating repetitions, so that a
slow moment of the machine meets both sides. Perplexity runs once on each side, one after the other.
Compare the ratios. On a CPU, training beside transformers is measured twice: like for like, both
sides in this process; and as users run it, each in a process of its own, ours with train.py's use
of memory.
"""
import contextlib
import dataclasses
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common.cli import field, parse, run_command
from common.device import (choose_device, choose_dtype, describe_device, dtype_name,
                           keep_freed_memory, matmul_precision)
from common.errors import UserError
from common.files import check_output, write_json
from common.meter import peak_bytes
from common.results import result
from data.corpus import ensure_corpus, read_documents, validation_documents
from eval import perplexity, window_and_stride
from methods import METHODS, PositionInputs, RopeConfig, inv_freq, position_inputs
from methods.distance_maps import attention_in_bands
from model import ATTENTION, LLaMA, TiledAttention, attention, generate
from rope import apply_rope
from weights import load_model, load_tokenizer
from weights.export import export
from weights.size import flops_per_token, parameter_count

WHAT = ["attention", "training", "generation", "perplexity", "maps"]
PeerLoader = Callable[[], torch.nn.Module] | None  # None: transformers is not installed


@dataclass
class BenchConfig:
    what: list[str] = field(WHAT[:3], f"what to measure: {', '.join(WHAT)}", choices=WHAT)
    model: str = field("data/tiny", "model folder or file")
    lengths: list[int] = field([512, 2048], "attention and maps: tokens")
    attention: list[str] = field([*ATTENTION], "attention: which ones", choices=[*ATTENTION])
    compile: bool = field(False, "training: torch.compile every block, on both sides")
    prompt: int | None = field(None, "generation: tokens of the prompt [half the window, <= 1024]")
    batch_size: int = field(4, "training and generation: rows")
    repeat: int = field(5, "repetitions, of which the median counts")
    text: list[str] = field([], "perplexity: UTF-8 files, a document each, instead of the default "
                            "corpus")
    window: int | None = field(None, "training and perplexity: tokens [the model's window]")
    stride: int | None = field(None, "perplexity: tokens by which the window moves on [window / 4]")
    tokens: int = field(4096, "perplexity: tokens of each document that are scored; 0: all")
    matmul: list[str] = field(["highest"], "perplexity: how both sides multiply float32 matrices, "
                              "see eval.py ppl -h", choices=["highest", "high", "medium"])
    device: str = field("auto", "auto, cpu, cuda or mps")
    dtype: str = field("float32", "of weights and arithmetic; training has autocast over float32",
                       choices=["auto", "float32", "bfloat16"])
    seed: int = field(0, "of random inputs")
    out: str = field("out/bench.json", "JSON file to write")


def time_sides(sides: dict[str, Callable[[], Any]], device: torch.device, repeat: int,
               weigh: bool = False) -> dict[str, dict]:
    """{name: function} -> {name: {"seconds": median, "bytes": peak of memory above what lay there
    before}}. bytes: on a GPU; on a CPU only if asked to `weigh`, else None."""
    weigh = weigh or device.type == "cuda"
    times = {name: [] for name in sides}
    for n in range(repeat + 1):
        for name, function in sides.items():
            wait_for_device(device)
            started = time.perf_counter()
            function()
            wait_for_device(device)
            if n > 0:  # the first time is warm-up
                times[name].append(time.perf_counter() - started)
    return {name: {"seconds": float(np.median(times[name])),
                   "bytes": peak_bytes(function, device) if weigh else None}
            for name, function in sides.items()}


def wait_for_device(device: torch.device) -> None:
    """Until a GPU has done what was queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def make_rows(title: str, unit: str, amount: float, found: dict[str, dict], peer: str
              ) -> list[dict]:
    """A row for each side: `amount` per second, and how many times as fast as the peer it is."""
    rows = []
    for side, measured in found.items():
        row = {"name": f"{title}, {side}", unit: amount / measured["seconds"], **measured}
        if peer in found and side != "transformers":
            row["ratio"] = found[peer]["seconds"] / measured["seconds"]
            row["peer"] = peer
        rows.append(row)
    return rows


# ---- Attention -----------------------------------------------------------------------------------


def bench_attention(c: BenchConfig, model: LLaMA, dtype: torch.dtype) -> list[dict]:
    """Our three attentions, forward and backward, with the heads of the model. growth: the exponent
    with which memory grows from the length before, 1 if linear, ln(bytes ratio) / ln(T ratio)."""
    rows, before = [], {}
    H, D = model.config.n_heads, model.config.head_dim
    for T in sorted(set(c.lengths)):
        q, k, v = random_heads(c, model, T, dtype)
        sides = {name: partial(attention_step, name, q, k, v) for name in c.attention}
        found = time_sides(sides, model.device, c.repeat, weigh=model.device.type == "cpu")
        for name, measured in found.items():
            if name in before and measured["bytes"]:
                shorter, size = before[name]
                measured["growth"] = math.log(measured["bytes"] / size) / math.log(T / shorter)
            before[name] = T, measured["bytes"]
        # Forward has 2 products a pair, backward 5, as it computes the scores again. Naive stores
        # them, and is counted alike.
        flops = 3.5 * 4 * H * D * T * (T + 1) / 2
        rows += make_rows(f"attention, {T} tokens", "gflops", flops / 1e9, found, "sdpa")
    return rows


def random_heads(c: BenchConfig, model: LLaMA, T: int, dtype: torch.dtype) -> list[Tensor]:
    """q [1, H, T, D], k and v [1, K, T, D]."""
    generator = torch.Generator().manual_seed(c.seed)
    H, K, D = model.config.n_heads, model.config.n_kv_heads, model.config.head_dim
    drawn = [torch.randn(1, heads, T, D, generator=generator) for heads in (H, K, K)]
    return [x.to(model.device, dtype).requires_grad_() for x in drawn]


def bench_maps(c: BenchConfig, model: LLaMA, dtype: torch.dtype) -> list[dict]:
    """Rotation and attention under each distance map, at four times its window, beside those of
    plain RoPE: all tiled, forward and backward."""
    rows = []
    maps = [name for name, method in METHODS.items() if method.distance_map]
    for T in c.lengths:
        q, k, v = random_heads(c, model, T, dtype)
        sides = {}
        for name in ["default", *maps]:
            rope = RopeConfig(name, 4.0, max(8, T // 4))
            theta, _ = inv_freq(rope, model.config.head_dim)
            positions = torch.arange(T, device=model.device)
            inputs = position_inputs(rope, model.config.n_heads, theta.to(model.device), 1.0,
                                     positions, positions)
            sides[name] = partial(map_step, inputs, q, k, v)
        found = time_sides(sides, model.device, c.repeat)
        rows += make_rows(f"distance map, {T} tokens", "tokens_per_second", T, found, "default")
    return rows


def map_step(inputs: PositionInputs, q: Tensor, k: Tensor, v: Tensor) -> None:
    if inputs.bands is None:
        q, k = apply_rope(q, *inputs.q_rope), apply_rope(k, *inputs.k_rope)
        out = attention(q, k, v, implementation="tiled")
    else:
        out = attention_in_bands(q, k, v, inputs.bands, "tiled", attention, TiledAttention.apply)
    out.sum().backward()


def attention_step(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    attention(q, k, v, implementation=name).sum().backward()


# ---- Training ------------------------------------------------------------------------------------


def training_step(loss_function: Callable[[], Tensor], optimizer: torch.optim.Optimizer,
                  device: torch.device, dtype: torch.dtype) -> None:
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = loss_function()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def bench_training(c: BenchConfig, model: LLaMA, load_peer: PeerLoader, dtype: torch.dtype
                   ) -> list[dict]:
    """Forward, backward and a fused AdamW on rows of the window. On a CPU also with each side in a
    process of its own: in one process, memory that one side freed would serve the other.

    tflops: operations of the model a second. MFU = tflops / those that the device does at most.
    """
    T = c.window or model.config.max_seq_len
    compiled = ", compiled" if c.compile else ""
    title = f"training step, {c.batch_size} x {T} tokens, {dtype_name(dtype)}{compiled}"
    peers = {"ours": None, "transformers": load_peer} if load_peer else {"ours": None}
    steps = {name: partial(training_side, c, T, peer, model.device, dtype)
             for name, peer in peers.items()}
    found = time_sides({name: step() for name, step in steps.items()}, model.device, c.repeat)
    rows = make_rows(title, "tokens_per_second", c.batch_size * T, found, "transformers")
    if load_peer is not None and model.device.type == "cpu":
        alone = {name: OwnProcess(partial(step, as_users_run=True)) for name, step in steps.items()}
        found = time_sides(alone, model.device, c.repeat)
        for side in alone.values():
            side.end()
        rows += make_rows(f"{title}, as users run it", "tokens_per_second", c.batch_size * T, found,
                          "transformers")
    for row in rows:
        row["tflops"] = row["tokens_per_second"] * flops_per_token(model.config, T) / 1e12
    return rows


def training_side(c: BenchConfig, T: int, load_peer: PeerLoader, device: torch.device,
                  dtype: torch.dtype, as_users_run: bool = False) -> Callable[[], None]:
    """A training step of the peer, or of ours where there is none."""
    if load_peer is None:
        if as_users_run:
            keep_freed_memory()     # as train.py does
        model = load_model(c.model, device=device)
    else:
        model = load_peer().to(device, torch.float32).train()
    ids = np.random.default_rng(c.seed).integers(0, model.config.vocab_size, (c.batch_size, T + 1))
    x = torch.from_numpy(ids).to(device)

    def loss() -> Tensor:
        if load_peer is None:
            return model.loss(x[:, :-1], x[:, 1:])
        return model(x[:, :-1], labels=x[:, :-1]).loss      # it shifts the labels itself
    if c.compile:
        for block in model.layers if load_peer is None else model.model.layers:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    return partial(training_step, loss, optimizer, device, dtype)


class OwnProcess:
    """build()() in a process of its own: it builds at once, and works whenever it is called."""

    def __init__(self, build: Callable[[], Callable[[], None]]):
        start = multiprocessing.get_context("spawn")
        self.work, there = start.Pipe()
        self.process = start.Process(target=work_when_told, args=(there, build), daemon=True)
        self.process.start()

    def __call__(self) -> None:
        try:
            self.work.send("once")
            self.work.recv()
        except (EOFError, OSError):
            raise UserError("the process of one side has ended; what it printed says why") from None

    def end(self) -> None:
        """Free its memory for what is measured next."""
        self.process.terminate()
        self.process.join()


def work_when_told(orders: Connection, build: Callable[[], Callable[[], None]]) -> None:
    function = build()
    with contextlib.suppress(EOFError):     # the other side has ended
        while orders.recv():
            function()
            orders.send("done")


# ---- Generation ----------------------------------------------------------------------------------


def bench_generation(c: BenchConfig, model: LLaMA, load_peer: PeerLoader, dtype: torch.dtype,
                     new: int = 64) -> list[dict]:
    """Greedy tokens after a prompt, with the key/value cache. The time of the prompt and of the
    first token is measured alone, and taken off.

        products    seconds of a product of each matrix and a vector / seconds of a token
        bandwidth   seconds of a sum over all weights / seconds of a token
    """
    T = c.prompt or max(1, min(model.config.max_seq_len // 2, 1024))
    ids = np.random.default_rng(c.seed).integers(3, model.config.vocab_size, (c.batch_size, T))
    prompt = torch.from_numpy(ids).to(model.device)
    sides = {"ours": lambda n: generate(model, prompt, n)}
    if load_peer is not None:
        peer = load_peer().to(model.device, dtype).eval()
        peer.generation_config.eos_token_id = None
        sides["transformers"] = lambda n: peer.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, min_new_tokens=n,
            do_sample=False, pad_token_id=0)
    calls = {(name, n): partial(side, n) for name, side in sides.items() for n in (1, 1 + new)}
    table = None if model.config.tied else model.tok_embeddings.weight      # only looked up
    weights = [p for p in model.parameters() if p is not table]
    vectors = {p.shape[-1]: torch.ones(c.batch_size, p.shape[-1]).to(p) for p in weights}
    calls["sum"] = lambda: [p.sum() for p in weights]
    calls["products"] = lambda: [F.linear(vectors[p.shape[-1]], p) for p in weights if p.dim() == 2]
    with torch.inference_mode():
        found = time_sides(calls, model.device, c.repeat)
    decoding = {}
    for name in sides:
        seconds = found[name, 1 + new]["seconds"] - found[name, 1]["seconds"]
        decoding[name] = found[name, 1 + new] | {
            "seconds": seconds, "bandwidth": new * found["sum"]["seconds"] / seconds,
            "products": new * found["products"]["seconds"] / seconds}
    title = f"generation, {c.batch_size} x {new} tokens after {T}, {dtype_name(dtype)}"
    return make_rows(title, "tokens_per_second", c.batch_size * new, decoding, "transformers")


# ---- Perplexity ----------------------------------------------------------------------------------


def held_out_documents(c: BenchConfig, model: LLaMA) -> tuple[list[np.ndarray], int, int]:
    """What bench_perplexity scores: documents, window, stride."""
    tokenizer = load_tokenizer(c.model, model.config.vocab_size)
    window, stride = window_and_stride(model, c.window, c.stride)
    if c.text:
        longest = c.tokens + 1 if c.tokens else 0
        return read_documents(c.text, tokenizer, longest, window), window, stride
    corpus = ensure_corpus("data/corpora/python", tokenizer.path)
    return validation_documents(corpus, 2 * window, c.tokens or 2**62, tokenizer), window, stride


def bench_perplexity(c: BenchConfig, model: LLaMA, load_peer: PeerLoader, dtype: torch.dtype,
                     documents: list[np.ndarray], window: int, stride: int) -> list[dict]:
    """Sliding-window perplexity, once on each side at each precision of float32 matrices."""
    rows = []
    peer = None if load_peer is None else load_peer().to(model.device, dtype).eval()
    for precision in c.matmul:
        with matmul_precision(precision):
            sides = {"ours": perplexity(model, documents, window, stride)}
            if peer is not None:
                sides["transformers"] = transformers_loop(peer, documents, window, stride)
        found = {side: {"perplexity": measured["perplexity"], "seconds": measured["seconds"],
                        "bytes": None, "matmul": precision} for side, measured in sides.items()}
        tokens = sides["ours"]["tokens"]
        new = make_rows(f"perplexity, window {window}, stride {stride}, {tokens} tokens",
                        "tokens_per_second", tokens, found, "transformers")
        if peer is not None:
            new[0]["difference"] = new[0]["perplexity"] / new[1]["perplexity"] - 1
        if precision != "highest":
            for row in new:
                row["name"] += f", matmul {precision}"
        rows += new
    return rows


@torch.inference_mode()
def transformers_loop(model: torch.nn.Module, documents: list[np.ndarray], window: int, stride: int
                      ) -> dict:
    """Perplexity by the loop that transformers' documentation shows: a window, its labels, the
    loss. Only its count of tokens is put right."""
    nll = 0.0
    tokens = 0
    started = time.perf_counter()
    for document in documents:
        ids = torch.from_numpy(np.asarray(document, np.int64))
        scored = 0
        for begin in tqdm(range(0, len(ids) - 1, stride), desc="transformers", unit="window",
                          leave=False, disable=None):
            end = min(begin + window, len(ids) - 1)
            x = ids[None, begin:end + 1].to(model.device)
            labels = x.clone()
            labels[:, :scored - begin + 1] = -100  # scored before: context only
            nll += model(x, labels=labels).loss.item() * (end - scored)
            tokens += end - scored
            scored = end
            if end == len(ids) - 1:
                break
    return {"perplexity": math.exp(nll / tokens), "tokens": tokens,
            "seconds": time.perf_counter() - started}


def peer_loader(path: str, folder: str) -> PeerLoader:
    """Export the model at `path` to `folder`, for transformers to load it from there."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        print("transformers is not installed: our numbers stand alone (pip install transformers "
              "safetensors)")
        return None
    exported = Path(folder) / "model"
    export(path, "hf", exported)
    return partial(AutoModelForCausalLM.from_pretrained, exported, dtype=torch.float32)


def print_row(row: dict) -> None:
    rate = f"{row.get('tokens_per_second', 0):,.0f} tok/s"
    if "gflops" in row:
        rate = f"{row['gflops']:.0f} GFLOP/s"
    line = f"{row['name']:<80}{1e3 * row['seconds']:>10,.1f} ms   {rate:>16}"
    if row["bytes"] is not None:
        line += f"   {row['bytes'] / 2**20:,.1f} MiB"
    if "growth" in row:
        line += f" (grows by T^{row['growth']:.3f})"
    if "tflops" in row:
        line += f"   {row['tflops']:.3f} TFLOP/s"
    if "bandwidth" in row:
        line += f"   products {row['products']:.0%}, {row['bandwidth']:.0%} of a sum's bandwidth"
    if "ratio" in row:
        line += f"   {row['ratio']:.2f} x {row['peer']}"
    if "perplexity" in row:
        line += f"   perplexity {row['perplexity']:.5f}"
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    c = parse(BenchConfig, __doc__, argv)
    counts = [c.repeat, c.batch_size, *c.lengths]
    counts += [n for n in (c.window, c.prompt) if n is not None]
    if min(counts) < 1 or c.tokens < 0:
        raise UserError("--repeat, --batch-size, --lengths, --window and --prompt have to be at "
                        "least 1, --tokens at least 0 (all)")
    check_output(c.out)
    device = choose_device(c.device)
    dtype = choose_dtype(c.dtype, device)
    model = load_model(c.model, device=device, dtype=dtype)
    print(f"device     {describe_device(device)}, {dtype_name(dtype)}\n"
          f"model      {c.model}, {parameter_count(model.config):,} parameters", flush=True)
    # A mistake in the text is told before the peer is made.
    scored = held_out_documents(c, model) if "perplexity" in c.what else None
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        load_peer = peer_loader(c.model, folder) if set(c.what) - {"attention", "maps"} else None
        for what in c.what:
            if what == "attention":
                new = bench_attention(c, model, dtype)
            elif what == "maps":
                new = bench_maps(c, model, dtype)
            elif what == "training":
                new = bench_training(c, model, load_peer, dtype)
            elif what == "generation":
                new = bench_generation(c, model, load_peer, dtype)
            else:
                new = bench_perplexity(c, model, load_peer, dtype, *scored)
            for row in new:
                print_row(row)
            rows += new
    report = result(model, c.seed, bench=rows, settings=dataclasses.asdict(c))
    if "perplexity" in c.what:
        report["matmul"] = c.matmul
    if load_peer is not None:
        report["versions"] = report["versions"] | {"transformers": metadata.version("transformers")}
    write_json(c.out, report)
    print(f"wrote {c.out}")


if __name__ == "__main__":
    run_command(main)
