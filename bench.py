"""Speed and memory of what this project does, beside what one would use instead, measured in the same run.

    python bench.py                                                        # attention, training, generation; two minutes on a laptop
    python bench.py --what perplexity --model M --text book.txt --window 2048 --stride 256 --tokens 16384 --matmul highest medium

The peer is the same model in Hugging Face transformers (pip install transformers safetensors), made from our weights by `weights.py export`;
without it our numbers stand alone. Times are medians of alternating repetitions, so that a slow moment of the machine meets both sides (of
perplexity: one repetition each, one after the other); what counts is the ratio. On a GPU the peak of its memory is measured too.
"""
import dataclasses
import math
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from cli import UserError, choose_device, choose_dtype, describe_device, field, matmul_precision, parse, run, write_json
from data.prepare import corpus_for, ensure_corpus
from eval import perplexity, texts, validation_documents, window_and_stride
from huggingface import export
from model import ATTENTION, LLaMA, attention, generate
from passes import result
from weights import load_model, load_tokenizer

WHAT = ["attention", "training", "generation", "perplexity"]


@dataclass
class BenchConfig:
    what: list[str] = field(["attention", "training", "generation"], f"what to measure: {', '.join(WHAT)}", choices=WHAT)
    model: str = field("data/tiny", "model folder or file")
    lengths: list[int] = field([512, 2048], "attention: tokens")
    batch_size: int = field(4, "training and generation: rows")
    repeat: int = field(5, "repetitions, of which the median counts")
    text: list[str] = field([], "perplexity: UTF-8 files, a document each, instead of the default corpus")
    window: int | None = field(None, "training and perplexity: tokens [the model's window]")
    stride: int | None = field(None, "perplexity: tokens by which the window moves on [window / 4]")
    tokens: int = field(4096, "perplexity: tokens of each document that are scored")
    matmul: list[str] = field(["highest"], "perplexity: how both sides multiply float32 matrices, see eval.py ppl -h",
                              choices=["highest", "high", "medium"])
    device: str = field("auto", "auto, cpu, cuda or mps")
    dtype: str = field("float32", "of weights and arithmetic; training has autocast over float32", choices=["auto", "float32", "bfloat16"])
    seed: int = field(0, "of random inputs")
    out: str = field("results/bench.json", "JSON file to write")


def measure(sides, device, repeat):
    """{name: function} -> {name: {"seconds": median, "bytes": peak of a GPU's memory above what lay there before, else None}}."""
    times, peak = {name: [] for name in sides}, dict.fromkeys(sides)
    for n in range(repeat + 1):
        for name, function in sides.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                peak[name] = torch.cuda.max_memory_allocated(device) - before
            if n:  # the first time is warm-up
                times[name].append(time.perf_counter() - started)
    return {name: {"seconds": float(np.median(t)), "bytes": peak[name]} for name, t in times.items()}


def bench_attention(c, model, device, dtype):
    """Our three attentions, forward and backward, on the heads of the model. FLOPs: 4 H D T(T+1)/2 forward, 2.5 times as many backward."""
    config, rows = model.config, []
    for T in c.lengths:
        generator = torch.Generator().manual_seed(c.seed)
        q, k, v = (torch.randn(1, heads, T, config.head_dim, generator=generator).to(device, dtype).requires_grad_()
                   for heads in (config.n_heads, config.n_kv_heads, config.n_kv_heads))

        def both_ways(name):
            attention(q, k, v, implementation=name).sum().backward()
        found = measure({name: lambda name=name: both_ways(name) for name in ATTENTION}, device, c.repeat)
        flops = 3.5 * 4 * config.n_heads * config.head_dim * T * (T + 1) / 2
        rows += [{"name": f"attention, {T} tokens, {name}", "gflops": flops / 1e9 / m["seconds"], **m,
                  "ratio": found["sdpa"]["seconds"] / m["seconds"], "peer": "sdpa"} for name, m in found.items()]
    return rows


def bench_training(c, model, peer, device, dtype):
    """Forward, backward and AdamW on rows of the window: ours, and the peer's with the same fused optimiser."""
    T, V = c.window or model.config.max_seq_len, model.config.vocab_size
    x = torch.from_numpy(np.random.default_rng(c.seed).integers(0, V, (c.batch_size, T + 1))).to(device)
    ours = LLaMA(model.config).to(device)
    ours.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    sides = {"ours": (ours, lambda: ours.loss(x[:, :-1], x[:, 1:]))}
    if peer is not None:
        theirs = peer().to(device, torch.float32).train()
        sides["transformers"] = theirs, lambda: theirs(x[:, :-1], labels=x[:, :-1]).loss

    def step(module, loss, optimizer):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    optimizers = {name: torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True) for name, (module, _) in sides.items()}
    found = measure({name: lambda name=name: step(*sides[name], optimizers[name]) for name in sides}, device, c.repeat)
    return [{"name": f"training step, {c.batch_size} x {T} tokens, {name}", "tokens_per_second": c.batch_size * T / m["seconds"], **m,
             **beside(found, name)} for name, m in found.items()]


def bench_generation(c, model, peer, device, dtype, new=64):
    """64 greedy tokens after prompts of half the window, with the key/value cache."""
    T = max(1, min(model.config.max_seq_len // 2, 1024))
    prompt = torch.from_numpy(np.random.default_rng(c.seed).integers(3, model.config.vocab_size, (c.batch_size, T))).to(device)
    sides = {"ours": lambda: generate(model, prompt, new)}
    if peer is not None:
        theirs = peer().to(device, dtype).eval()
        theirs.generation_config.eos_token_id = None
        sides["transformers"] = torch.inference_mode()(lambda: theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0))
    found = measure(sides, device, max(1, c.repeat // 2))
    return [{"name": f"generation, {c.batch_size} x {new} tokens after {T}, {name}", "tokens_per_second": c.batch_size * new / m["seconds"], **m,
             **beside(found, name)} for name, m in found.items()]


def held_out(c, model):
    """The documents of bench_perplexity, its window and stride."""
    tokenizer = load_tokenizer(c.model, model.config.vocab_size)
    window, stride = window_and_stride(model, c.window, c.stride)
    if c.text:
        return texts(c.text, tokenizer, c.tokens + 1 if c.tokens else 0, window), window, stride
    corpus = ensure_corpus(corpus_for("data/corpora/python", tokenizer), tokenizer.path)
    return validation_documents(corpus, 2 * window, c.tokens or 2**62, tokenizer), window, stride


def bench_perplexity(c, model, peer, device, dtype, documents, window, stride):
    """Sliding-window perplexity once over all windows: eval.perplexity, and the loop of transformers' documentation, both at each precision.
    ratio and difference: of ours to theirs at the same precision."""
    def row(side, precision, measured):
        return {"name": f"perplexity, window {window}, stride {stride}, {measured['tokens']} tokens, "
                        + side + ("" if precision == "highest" else f", matmul {precision}"),
                "perplexity": measured["perplexity"], "tokens_per_second": measured["tokens"] / measured["seconds"],
                "seconds": measured["seconds"], "bytes": None, "matmul": precision}
    rows, theirs = [], None if peer is None else peer().to(device, dtype).eval()
    for precision in c.matmul:
        with matmul_precision(precision):
            ours = row("ours", precision, perplexity(model, documents, window, stride))
            rows.append(ours)
            if theirs is not None:
                other = row("transformers", precision, straightforward(theirs, documents, window, stride, device))
                ours |= {"ratio": other["seconds"] / ours["seconds"], "peer": "transformers",
                         "difference": ours["perplexity"] / other["perplexity"] - 1}
                rows.append(other)
    return rows


@torch.inference_mode()
def straightforward(model, documents, window, stride, device):
    """Perplexity by the loop that transformers' documentation shows, with its count of tokens put right: a window, its labels, the loss."""
    nll, tokens, started = 0.0, 0, time.perf_counter()
    for document in documents:
        ids, scored = torch.from_numpy(np.asarray(document, np.int64)), 0
        for begin in tqdm(range(0, len(ids) - 1, stride), desc="transformers", unit="window", leave=False, disable=None):
            end = min(begin + window, len(ids) - 1)
            x = ids[None, begin:end + 1].to(device)
            labels = x.clone()
            labels[:, :scored - begin + 1] = -100                                  # what was scored before is context only
            nll += model(x, labels=labels).loss.item() * (end - scored)
            tokens, scored = tokens + end - scored, end
            if end == len(ids) - 1:
                break
    return {"perplexity": math.exp(nll / tokens), "tokens": tokens, "seconds": time.perf_counter() - started}


def beside(found, name):
    """How many times as fast as the peer, where there is one."""
    if name != "ours" or "transformers" not in found:
        return {}
    return {"ratio": found["transformers"]["seconds"] / found["ours"]["seconds"], "peer": "transformers"}


def peer_of(path, folder):
    """A function that loads `path` in transformers, through our export; None where transformers is not installed."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        print("transformers is not installed: our numbers stand alone (pip install transformers safetensors)")
        return None
    export(path, "hf", f"{folder}/model")
    return lambda: AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)


def main(argv=None):
    c = parse(BenchConfig, __doc__, argv)
    if min(c.repeat, c.batch_size, *c.lengths, 1 if c.window is None else c.window) < 1 or c.tokens < 0:
        raise UserError("--repeat, --batch-size, --lengths and --window have to be at least 1, --tokens at least 0 (all)")
    device = choose_device(c.device)
    dtype, rows = choose_dtype(c.dtype, device), []
    model = load_model(c.model, device=device, dtype=dtype)
    print(f"device     {describe_device(device)}, {str(dtype).removeprefix('torch.')}\n"
          f"model      {c.model}, {model.config.parameters():,} parameters", flush=True)
    scored = held_out(c, model) if "perplexity" in c.what else ()  # a mistake in it is told before the peer is made
    with tempfile.TemporaryDirectory() as folder:
        peer = peer_of(c.model, folder) if set(c.what) != {"attention"} else None
        for what in c.what:
            started = {"attention": lambda: bench_attention(c, model, device, dtype),
                       "training": lambda: bench_training(c, model, peer, device, dtype),
                       "generation": lambda: bench_generation(c, model, peer, device, dtype),
                       "perplexity": lambda: bench_perplexity(c, model, peer, device, dtype, *scored)}[what]()
            for r in started:
                rate = f"{r['gflops']:.0f} GFLOP/s" if "gflops" in r else f"{r['tokens_per_second']:,.0f} tok/s"
                print(f"{r['name']:<72}{1e3 * r['seconds']:>10,.1f} ms   {rate:>16}"
                      + (f"   {r['bytes'] / 2**20:,.0f} MiB" if r["bytes"] is not None else "")
                      + (f"   {r['ratio']:.2f} x {r['peer']}" if "ratio" in r else "")
                      + (f"   perplexity {r['perplexity']:.5f}" if "perplexity" in r else ""), flush=True)
            rows += started
    write_json(c.out, result(model, c.seed, bench=rows, settings=dataclasses.asdict(c)) | {"matmul": c.matmul})
    print(f"wrote {c.out}")


if __name__ == "__main__":
    run(main)
