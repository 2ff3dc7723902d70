"""The papers' experiments in miniature: every method, by factor, seed and number of steps, on two kinds of text. Tables and a figure.

    python extras/sweep.py                                    # data/tiny: all methods, s = 2 and 4, two seeds, up to 200 steps
    python extras/sweep.py --plan dprope                      # DPRoPE: how many dimensions to interpolate, and by how many bins
    python extras/sweep.py --plan scratch                     # RoPE, ALiBi, xPos, NoPE, random positions, from scratch
    python extras/sweep.py --plan smollm2 --text book.txt     # the real model on one GPU, 8192 -> 16384; --factors 4 for 32768

It says beforehand how long it will take. Every measurement is kept as soon as it is made and every training saves itself: the same command
takes up what an interruption left. (Asked for other measurements, by --text or --lengths, it keeps the trainings' ends, not their stages between:
to measure those it trains again.) All methods see the same rows in the same order at constant learning rate, as in the PI paper, so that
one training gives the model after every number of steps. Runs are shared among processes, one core each.
"""
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the core lies one folder up

import numpy as np
import torch
from tqdm import tqdm

from cli import (Kept, UserError, choose_device, choose_dtype, command_line, describe_device, field, parse, read_json, run, versions,
                 write_json)
from data.batches import Batches, TokenFile
from data.passkey import PasskeyPrompts
from data.prepare import corpus_for, ensure_corpus, read_text
from eval import CONVENTIONS, needs_settings, perplexity, texts, validation_documents
from finetune import FinetuneConfig
from model import LLaMA
from plot import plot_sweep
from positions import training_positions
from retrieval import passkey
from rope import ALIASES, METHODS, RopeConfig, depends_on_length, inv_freq, rope_argument
from theory import disturbance
from train import fit, resumable
from weights import load_config, load_model, load_tokenizer, original_window, some_weights, with_rope


@dataclass
class SweepConfig:
    """None and [] are filled in by the plan."""
    plan: str = field("methods", "which experiment; it fills in the flags that are not given",
                      choices=["methods", "dprope", "scratch", "smollm2"])
    model: str | None = field(None, "pretrained model [data/tiny]")
    methods: list[str] = field([], "names or JSON objects, to be measured and trained [by the plan]; default is direct fine-tuning")
    zero_shot: list[str] = field([], "methods that are measured without training only")
    curves: list[str] = field([], "methods whose passkey retrieval at L' is measured after every number of steps, with twice the keys")
    factors: list[float] = field([], "s = L'/L")
    seeds: list[int] = field([], "of the data's order and of the keys: a training each")
    steps: list[int] = field([], "after how many steps to measure; the largest is trained")
    step_tokens: int | None = field(None, "tokens of an optimiser step: rows = step tokens / L', at least one")
    lr: float | None = field(None, "learning rate, constant after 20 steps of warm-up")
    lengths: list[int] = field([], "windows and prompt lengths [half, one, two and four original windows]")
    stride: int | None = field(None, "of the perplexity [a quarter of each window]")
    eval_tokens: int | None = field(None, "tokens of each kind of text that a perplexity is measured on")
    text: list[str] = field([], "UTF-8 files, each a kind of text beside the corpus [C++ headers of the PyTorch installation]")
    distances: int = field(32, "passkey at L': distances of the key, evenly spaced")
    trials: int | None = field(None, "passkey: keys at each distance; 0 measures no passkey")
    passkey_share: float | None = field(None, "share of training rows with a passkey prompt, never longer than L, in them")
    corpus: str = field("data/corpora/python", "token folder; the default one is made if it is not there")
    corpus_mb: float = field(32.0, "megabytes of Python source in the default corpus, if it has to be made")
    jobs: int | None = field(None, "processes [one a core; one on a GPU]")
    device: str = field("auto", "auto, cpu, cuda or mps")
    dtype: str = field("auto", "of the training's matrix products, and of evaluation on a GPU", choices=["auto", "float32", "bfloat16"])
    compile: bool = field(False, "torch.compile every block in training")
    recompute: bool = field(False, "keep only each block's input in training")
    folder: str = field("out/sweep", "where the runs' models and measurements lie")
    out: str = field("", "tables, as JSON; a figure of the same name is drawn beside it [results/sweep-PLAN.json]")
    dry_run: bool = field(False, "only say what would be run and for how long")


# Every method that stretches RoPE by a factor alone; what needs more to differ from these (longrope, proportional, resonance) has to be named.
EVERY = ["default", *(name for name, m in METHODS.items() if m.rotary and m.train_on == "target" and not needs_settings(m) and not m.whole_head
                      and name != "default")]
DPROPE = json.dumps({"rope_type": "dprope", "interpolated_dims": 40})  # of 64, the paper's share; the method alone goes by its threshold
PAPERS = ["default", "linear", "ntk", "yarn", DPROPE]
PLANS = {
    "methods": dict(model="data/tiny", methods=[*EVERY, DPROPE], curves=["default", "linear"], factors=[2.0, 4.0], seeds=[0, 1],
                    steps=[25, 50, 100, 200], step_tokens=2048, lr=5e-4, passkey_share=1.0, eval_tokens=8192, trials=5),
    "dprope": dict(model="data/tiny", methods=[json.dumps({"rope_type": "dprope", "interpolated_dims": n}) for n in (0, 16, 32, 48, 64)],
                   zero_shot=[*(json.dumps({"rope_type": "dprope", "interpolated_dims": n}) for n in (8, 24, 40, 56)), "dprope",
                              *(json.dumps({"rope_type": "dprope", "bins": n}) for n in (4, 8, 16, 32, 64, 128, 256))],
                   factors=[2.0, 4.0], seeds=[0], steps=[200], step_tokens=2048, lr=5e-4, passkey_share=1.0, eval_tokens=8192, trials=5),
    "scratch": dict(model="data/tiny", methods=["default", "alibi", "xpos", "nope",
                                                json.dumps({"rope_type": "default", "random_positions": 2048})],
                    factors=[1.0], seeds=[0, 1], steps=[2500], step_tokens=2048, lr=3e-3, passkey_share=0.5, eval_tokens=8192, trials=5),
    # About 10^16 operations a training, and 10^17 for all the keys: some twenty minutes on an H100. --factors 4 is the second half.
    "smollm2": dict(model="out/smollm2/smollm2-135m-instruct.gguf", methods=PAPERS, curves=PAPERS, factors=[2.0], seeds=[0],
                    steps=[50, 100, 200], step_tokens=16384, lr=2e-5, passkey_share=0.0, lengths=[2048, 4096, 8192, 16384, 32768],
                    stride=256, eval_tokens=34816, trials=5)}


# ---------------------------------------------------------------------------------------------------------------------
# The runs


@dataclass(frozen=True)
class Run:
    """One model through its steps; steps (0,) is measured without training."""
    method: str
    factor: float
    seed: int
    steps: tuple

    @property
    def name(self):
        words = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.method.replace('"', "").replace("rope_type: ", "")).strip("-")
        if len(words) > 60:
            words = f"{words[:40]}-{hashlib.sha256(self.method.encode()).hexdigest()[:8]}"
        return f"{words}-x{self.factor:g}-seed{self.seed}" + ("" if self.steps != (0,) else "-untrained")


def plan_runs(c):
    """Every method without training (only the keys depend on the seed there), and every method with each seed."""
    runs = []
    for factor in c.factors:
        if c.plan != "scratch":
            runs += [Run(method, factor, c.seeds[0], (0,)) for method in [*c.methods, *c.zero_shot]]
        runs += [Run(method, factor, seed, tuple(c.steps)) for method in c.methods for seed in c.seeds]
    return list(dict.fromkeys(runs))


def windows(c, factor):
    L = original_window(load_config(c.model))
    return L, round(L * factor)


def rope_of(c, method, factor):
    """The whole RoPE dict of a method at a factor, counted from the model's original window."""
    L, rope = windows(c, factor)[0], rope_argument(method)
    plain = rope["rope_type"] == "default"
    return {"original_max_position_embeddings": L, "factor": 1.0 if plain else factor} | rope


def settings(c, run, steps, folder):
    """The training of a run as FinetuneConfig, which tells it from others in the same folder."""
    window = windows(c, run.factor)[1]
    return FinetuneConfig(model=c.model, rope=run.method, factor=run.factor, out=str(folder / run.name), steps=steps,
                          batch_size=max(1, c.step_tokens // window), lr=c.lr, schedule="cosine" if c.plan == "scratch" else "constant",
                          warmup=100 if c.plan == "scratch" else 20,
                          weight_decay=0.1 if c.plan == "scratch" else 0.0, seed=run.seed, passkey_share=c.passkey_share,
                          passkey_packed=c.plan == "scratch", corpus=c.corpus, device=c.device, dtype=c.dtype, compile=c.compile,
                          recompute=c.recompute, save_every=10**6 if steps < 200 else 200, eval_every=10**6, log_every=25)


def begin(c, run, device, dtype=torch.float32):
    """The model of a run before its first step."""
    L, window = windows(c, run.factor)
    if c.plan == "scratch":
        torch.manual_seed(run.seed)
        shape = load_config(c.model)
        rope = RopeConfig.from_dict({"original_max_position_embeddings": L, "rope_theta": shape.rope.base} | rope_argument(run.method))
        return LLaMA(dataclasses.replace(shape, rope=rope)).to(device)
    model = load_model(c.model, rope=rope_of(c, run.method, run.factor), device=device, dtype=dtype)
    model.config.max_seq_len = window
    return model


tokenizer_of = functools.cache(load_tokenizer)


def one_run(c, run):
    """Train and measure a run; nothing that is kept in its folder is done again. Returns its rows, one for each number of steps."""
    folder, device, tokenizer = Path(c.folder) / c.plan, choose_device(c.device), tokenizer_of(c.model)
    keep, rows = Kept(folder / f"{run.name}.json", quiet=True), []
    for steps in run.steps:
        how = resumable(settings(c, run, steps, folder)) | {"steps": steps}
        rows.append(keep(["row", how, conditions(c, run, device)], lambda: row(c, run, steps, folder, device, tokenizer, keep)))
    return rows


def conditions(c, run, device):
    """What a row depends on beside its training's settings: the model's weights, the texts themselves, the measurement, the arithmetic."""
    return [weights_of(c.model), read_json(Path(c.corpus) / "meta.json"), [hashlib.sha256(Path(t).read_bytes()).hexdigest() for t in c.text],
            c.lengths, c.stride, c.eval_tokens, c.distances, c.trials, run.method in c.curves, device.type, str(choose_dtype(c.dtype, device)),
            c.compile, c.recompute, versions()]


@functools.cache
def weights_of(path):
    """A model's weights, by four numbers of each tensor, and its shape as a short word."""
    model = load_model(path)
    return hashlib.sha256(some_weights(model).numpy().tobytes() + repr(model.config).encode()).hexdigest()


def row(c, run, steps, folder, device, tokenizer, keep):
    """What is measured of a run after so many steps: all windows and kinds of text at the beginning and at the end, L' between."""
    L, window = windows(c, run.factor)
    seconds, dtype = 0.0, choose_dtype(c.dtype, device) if device.type == "cuda" else torch.float32
    if steps:
        model, how = begin(c, run, device), settings(c, run, steps, folder)
        how = dataclasses.replace(how, fresh=again(how, steps))
        batches = Batches(TokenFile(c.corpus, "train"), tokenizer, how.batch_size, window, how.passkey_share, L, how.passkey_packed, how.seed,
                          training_positions(model.config.rope, L, window))
        seconds = fit(model, how, batches, None, tokenizer, progress=False)
        model = load_model(how.out, device=device, dtype=dtype)  # what is measured is what the folder gives
    else:
        model = begin(c, run, device, dtype)
    last, kinds = steps in (0, run.steps[-1]), documents(c, tokenizer)
    if not last:
        kinds = dict(list(kinds.items())[:1])
    measured = {"perplexity": {}, "passkey": {}, "accuracy_by_depth": {}}
    for kind, docs in kinds.items():
        measured["perplexity"][kind] = {n: perplexity(model, docs, n, c.stride, progress=False, keep=keep)["perplexity"]
                                        for n in (c.lengths if last else [window])}
    if c.trials and (last or run.method in c.curves):
        for n in (c.lengths if last else []):
            few = passkey(model, tokenizer, [n], 10, max(1, c.trials), run.seed, progress=False, keep=keep)
            measured["passkey"][n], measured["accuracy_by_depth"][n] = few["accuracy"][n], few["accuracy_by_depth"][n]
        trials = 2 * c.trials if run.method in c.curves else c.trials  # the PI paper has ten at each of 32 distances
        found = passkey(model, tokenizer, [window], c.distances, trials, run.seed, progress=False, keep=keep)
        measured |= {"k_max": found["k_max"], "accuracy_at_target": found["accuracy"][window]}
    rope = model.config.rope
    plain, _ = inv_freq(RopeConfig(rope_theta=rope.base), model.config.head_dim)
    if METHODS[rope.rope_type].rotary and run.factor > 1:
        new, _ = inv_freq(rope, model.config.head_dim, window)
        measured["disturbance"] = float(disturbance(plain.double().numpy(), new.double().numpy(), L, window,
                                                    bins=min(360, max(4, round(L * 360 / 4096)))).mean())
    return {"method": run.method, "factor": run.factor, "seed": run.seed, "steps": steps, "rope": rope.to_dict(), "window": window,
            "training_seconds": seconds, **measured}


def again(how, steps):
    """Whether a training has to begin again: it has gone further than the steps after which it is now to be measured, in another way. One
    with other settings is not replaced without a word."""
    path = Path(how.out) / "state.pt"
    if not path.exists():
        return False
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        there, step = state["settings"], state["step"]
    except Exception:  # damaged bytes raise anything
        return True
    if there != resumable(how):
        raise UserError(f"{how.out} holds a training with other settings: give another --folder, or delete {path.parent.parent}")
    return step > steps


def documents(c, tokenizer):
    """{kind of text: documents}, none of it in the training text, each longer than the longest window, twice as long if the tokens allow."""
    longest = max(c.lengths)
    length = max(longest + 1, min(2 * longest, c.eval_tokens))
    kinds = {kind_of(c.corpus): validation_documents(c.corpus, length, c.eval_tokens, tokenizer)}
    if c.text:
        return kinds | {Path(t).stem: document(tokenizer, t, c.eval_tokens, longest) for t in c.text}
    return kinds | {"C++ headers": headers(tokenizer, length, c.eval_tokens)}


def kind_of(corpus):
    """The name of a corpus in the tables."""
    return {"python": "Python"}.get(read_json(Path(corpus) / "meta.json")["source"], Path(corpus).name)


@functools.cache
def document(tokenizer, path, tokens, longest):
    return texts([path], tokenizer, tokens, longest)


@functools.cache
def headers(tokenizer, length, tokens):
    """Documents of `length` tokens from the C++ headers that come with PyTorch: text of a kind on which the tiny model was not trained."""
    found, place = [], Path(torch.__file__).parent
    for path in sorted((place / "include").rglob("*.h"), key=lambda p: p.relative_to(place).as_posix()):
        if path.stat().st_size > 2 * length and (text := read_text(path)):
            ids = tokenizer.encode(text[:8 * length], bos=True)
            found += [np.array(ids[:length])] if len(ids) >= length else []
        if len(found) * length >= tokens:
            break
    if not found:
        raise UserError(f"no C++ header of the PyTorch installation has {length} tokens: name another kind of text with --text")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The tables


def cell(values, digits):
    """Mean over the seeds, and half the range between them."""
    values = [math.inf if v is None else v for v in values]
    if not values:
        return ""
    mean = float(np.mean(values))
    digits = digits if mean < 100 else 0
    spread = f" ±{(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 and math.isfinite(mean) else ""
    return f"{mean:,.{digits}f}{spread}"


def tables(result):
    """[(title, header, rows of text)]: the papers' tables, as many as the rows of the result allow."""
    rows, lengths = result["rows"], [str(n) for n in result["lengths"]]
    kinds = list(rows[0]["perplexity"])
    last = {r["method"]: max(q["steps"] for q in rows if q["method"] == r["method"]) for r in rows}
    found = []

    def pick(method, factor, steps):
        return [r for r in rows if (r["method"], r["factor"], r["steps"]) == (method, factor, steps)]

    def full(group):
        kind_cells = [cell([r["perplexity"][k][n] for r in group], 2) for k in kinds for n in lengths]
        return [*kind_cells, cell([r["k_max"] for r in group if "k_max" in r], 0),
                cell([r["accuracy_at_target"] for r in group if "k_max" in r], 2)]

    header = ["s", "method", "steps", *(f"{k} {n}" for k in kinds for n in lengths), "k_max at L'", "passkey at L'"]
    body, seen = [], []
    for r in sorted(rows, key=lambda r: (r["factor"], r["steps"] > 0)):
        key = r["method"], r["factor"], r["steps"]
        if key not in seen and len(r["perplexity"]) == len(kinds) and r["steps"] in (0, last[r["method"]]):
            seen.append(key)
            body.append([f"{r['factor']:g}", short(r["method"]), str(r["steps"]), *full(pick(*key))])
    found.append(("Perplexity by window, and passkey retrieval at L' (PI Tables 1, 2 and 5; DPRoPE Tables 1 and 4)", header, body))

    steps = sorted({r["steps"] for r in rows})
    for title, value, digits in (("Perplexity at L' after so many steps (PI Table 3)", lambda r: r["perplexity"][kinds[0]].get(str(r["window"])), 2),
                                 ("k_max after so many steps (PI Table 4)", lambda r: r.get("k_max"), 0)):
        body = []
        for factor in sorted({r["factor"] for r in rows if r["steps"]}):
            for method in dict.fromkeys(r["method"] for r in rows if r["factor"] == factor):
                groups = [[value(r) for r in pick(method, factor, n) if value(r) is not None] for n in steps]
                if sum(map(bool, groups)) > 2:
                    body.append([f"{factor:g}", short(method), *(cell(g, digits) for g in groups)])
        if body:
            found.append((title, ["s", "method", *map(str, steps)], body))
    return found


def short(method):
    """A method as a name in a table."""
    if not method.startswith("{"):
        return {"default": "plain RoPE", "linear": "PI"}.get(method, method)
    rope = json.loads(method)
    return " ".join([rope.pop("rope_type"), *(f"{k}={v}" for k, v in rope.items())])


def markdown(title, header, body):
    lines = [f"\n{title}\n", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(r) + " |" for r in body)])


# ---------------------------------------------------------------------------------------------------------------------
# The command


def estimate(c, runs, tokenizer, device):
    """Seconds that all runs would take in one process, from a timed step and a timed pass at each factor."""
    total = 0.0
    for factor in c.factors:
        run = Run(c.methods[0], factor, 0, (1,))
        L, window = windows(c, factor)
        model, how = begin(c, run, device), settings(c, run, 1, Path(c.folder))
        model.recompute = c.recompute
        x = torch.randint(0, model.config.vocab_size, (how.batch_size, window + 1), device=device)
        speeds = []
        for _ in range(3):  # the first is slower, and does not count
            started = time.perf_counter()
            with torch.autocast(device.type, choose_dtype(c.dtype, device), enabled=choose_dtype(c.dtype, device) != torch.float32):
                loss = model.loss(x[:, :-1], x[:, 1:])
            loss.backward()
            loss.item()
            middle = time.perf_counter()
            with torch.inference_mode():
                model.hidden(x[:, :-1]).sum().item()
            speeds.append((middle - started, (time.perf_counter() - middle) / x[:, 1:].numel()))
        step, token = min(s for s, _ in speeds[1:]), min(t for _, t in speeds[1:])
        for r in (r for r in runs if r.factor == factor):
            strides = [n / (c.stride or n / 4) for n in c.lengths]
            rope = RopeConfig.from_dict(rope_of(c, r.method, factor))
            passes = len(PasskeyPrompts(tokenizer).answer("12345")) + 1 if depends_on_length(rope) else 1  # such answers are generated
            keys = passes * c.trials * c.distances * (2 if r.method in c.curves else 1)
            whole = 2 * c.eval_tokens * sum(strides) + passes * c.trials * 10 * sum(c.lengths) + keys * window
            between = c.eval_tokens * window / (c.stride or window / 4) + (keys * window if r.method in c.curves else 0)
            total += max(r.steps) * step + token * (whole + between * (len(r.steps) - 1))
    return total


def one_core():
    """What a process begins with: one thread, and Ctrl-C left to the parent, which ends its children in order."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def in_child(c, run):
    """one_run() in a process of its own, which ends when it is stopped: what it has done is on the disk."""
    try:
        return one_run(c, run)
    except KeyboardInterrupt:
        os._exit(130)


def fill_in(c):
    """The plan's flags where none are given, and mistakes refused before any work."""
    plan, lr = PLANS[c.plan], c.lr
    c = dataclasses.replace(c, **{name: [ALIASES.get(m, m) for m in getattr(c, name)] for name in ("methods", "zero_shot", "curves")})
    if c.curves and c.methods and (strange := set(c.curves) - set(c.methods)):
        raise UserError(f"--curves {' '.join(sorted(strange))}: not among the --methods")
    c = dataclasses.replace(c, **{k: v for k, v in plan.items() if getattr(c, k) in (None, [])}, out=c.out or f"results/sweep-{c.plan}.json")
    base = load_config(c.model)
    L = original_window(base)
    if lr is None and c.model != plan["model"] and base.parameters() > 5e7:
        raise UserError(f"--lr is needed for a model of this size: the plan's {c.lr:g} is for {plan['model']}; the PI paper has 2e-5 for 7B and "
                        "13B")
    if not all(map(math.isfinite, c.factors)):
        raise UserError("--factors: give numbers above 1")
    c = dataclasses.replace(c, **{name: list(dict.fromkeys(getattr(c, name))) for name in ("methods", "factors", "seeds")})
    c = dataclasses.replace(c, lengths=sorted({*(c.lengths or [max(L // 2, 1), L, 2 * L, 4 * L]), *(round(L * f) for f in c.factors)}),
                            steps=sorted(set(c.steps)))
    if c.plan == "scratch" and len(c.steps) > 1:
        raise UserError("--steps: give one number; from scratch the learning rate falls to zero at the end, so that each needs its own training")
    if c.steps[0] < 1 or min(c.factors) < 1 or c.plan != "scratch" and min(c.factors) <= 1:
        raise UserError("--steps have to be at least 1, and --factors above 1: what is untrained or unscaled is measured anyway")
    if c.trials < 0 or c.distances < 1 or c.eval_tokens < 1 or c.step_tokens < 1 or c.jobs is not None and c.jobs < 1:
        raise UserError("--trials has to be at least 0; --distances, --eval-tokens, --step-tokens and --jobs at least 1")
    if c.lengths[0] < 1 or min(c.seeds) < 0 or not (c.lr > 0 and math.isfinite(c.lr)):
        raise UserError("--lengths have to be at least 1, --seeds at least 0, --lr above 0")
    if c.stride is not None and not 1 <= c.stride <= c.lengths[0]:
        raise UserError(f"--stride {c.stride}: has to be from 1 to the shortest window, {c.lengths[0]}")
    names = [Path(t).stem for t in c.text]
    if len(set(names)) < len(names):
        raise UserError("--text: two files have the same name, which is that of their column: rename one of them")
    for method in [*c.methods, *c.zero_shot]:
        if len(c.factors) > 1 and "factor" in rope_argument(method):
            raise UserError(f"{method}: its own factor contradicts --factors {' '.join(f'{f:g}' for f in c.factors)}: give one of them")
        for factor in c.factors:
            with_rope(base, rope_of(c, method, factor))
    return c


def main(argv=None):
    c = fill_in(parse(SweepConfig, __doc__, argv))
    device = choose_device(c.device)
    tokenizer = tokenizer_of(c.model)
    c = dataclasses.replace(c, corpus=str(corpus_for(c.corpus, tokenizer)))
    jobs = c.jobs or (1 if device.type != "cpu" else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    ensure_corpus(c.corpus, tokenizer.path, c.corpus_mb)
    if kind_of(c.corpus) in (Path(t).stem for t in c.text):
        raise UserError(f"--text: the name {kind_of(c.corpus)} is that of the corpus in the tables: rename the file")
    runs, threads = plan_runs(c), torch.get_num_threads()
    torch.set_num_threads(1 if jobs > 1 else threads)
    seconds = estimate(c, runs, tokenizer, device) / min(jobs, len(runs))
    print(f"device     {describe_device(device)}, {jobs} process{'es' if jobs > 1 else ''}\n"
          f"model      {c.model}, window {original_window(load_config(c.model))}, factors {' '.join(f'{f:g}' for f in c.factors)}\n"
          f"runs       {len(runs)}: {len(c.methods)} methods, {len(c.seeds)} seed{'s' if len(c.seeds) > 1 else ''}, "
          f"measured after {' '.join(map(str, c.steps))} steps of {c.step_tokens:,} tokens\n"
          f"time       about {seconds / 60:.0f} minutes, less what is there already", flush=True)
    if c.dry_run:
        return
    kinds, started, rows = documents(c, tokenizer), time.perf_counter(), {}
    shortest = PasskeyPrompts(tokenizer).shortest
    if c.trials and shortest > c.lengths[0]:
        raise UserError(f"--lengths {c.lengths[0]}: a passkey prompt needs {shortest} tokens: give longer ones, or --trials 0")
    with tqdm(total=len(runs), desc="sweep", unit="run", disable=None) as bar:
        if jobs == 1:
            for r in runs:
                rows[r] = one_run(c, r)
                bar.update()
        else:
            pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=one_core)
            try:
                todo, waiting = list(reversed(runs)), {}
                while todo or waiting:
                    while todo and len(waiting) < jobs:  # no more than are at work: what waits in the pool could not be called back
                        r = todo.pop()
                        waiting[pool.submit(in_child, c, r)] = r
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        rows[waiting.pop(future)] = future.result()
                        bar.update()
            except BrokenProcessPool:
                raise UserError("a process was killed, for want of memory most likely: the same command goes on; give it fewer --jobs") from None
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in multiprocessing.active_children():
                    child.terminate()  # a training then saves itself
                    child.join()
                raise
            pool.shutdown()
    torch.set_num_threads(threads)
    result = {"model": c.model, "rope": load_config(c.model).rope.to_dict(), "plan": c.plan, "rows": [row for r in runs for row in rows[r]],
              "original_window": original_window(load_config(c.model)), "lengths": c.lengths, "stride": c.stride or "window / 4", **CONVENTIONS,
              "documents": {k: len(d) for k, d in kinds.items()},
              "tokens_scored": {k: sum(len(d) - 1 for d in docs) for k, docs in kinds.items()},
              "settings": dataclasses.asdict(c), "seed": c.seeds[0], "seconds": time.perf_counter() - started,
              "device": describe_device(device), "versions": versions(), "command": command_line()}
    write_json(c.out, result)
    result = read_json(c.out)
    for title, header, body in tables(result):
        print(markdown(title, header, body))
    figure = plot_sweep(result, Path(c.out).with_suffix(".png"))
    print(f"\n(mean of {len(c.seeds)} seed{'s' if len(c.seeds) > 1 else ''}, ± half the range between them; {c.eval_tokens:,} tokens of each kind "
          f"of text; passkey: {c.distances} distances x {c.trials} keys, twice as many for methods measured after every number of steps)\n"
          f"wrote {c.out} and {figure}")


if __name__ == "__main__":
    run(main)
