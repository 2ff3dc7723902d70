"""The papers' experiments in miniature: every method, by factor, seed and number of steps.

    python extras/sweep.py                    # data/tiny: all methods, s = 2 and 4, two seeds
    python extras/sweep.py --plan dprope      # DPRoPE: how many dimensions, and how many bins
    python extras/sweep.py --plan scratch     # trained from scratch: RoPE, ALiBi, xPos, NoPE, ...
    python extras/sweep.py --plan smollm2 --text book.txt    # on one GPU, 8192 -> 16384 tokens

It measures on two kinds of text, says beforehand how long it will take, and ends with tables and a
figure. All methods see the same rows in the same order at constant learning rate, as in the PI
paper, so that one training gives the model after every number of steps.

Every measurement is kept as soon as it is made, and every training saves itself: after an
interruption the same command goes on. With other measurements (--text, --lengths) it needs the
models in the middle of the trainings, which are not kept, and trains again.
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
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the core lies one folder up

import numpy as np
import torch
from tqdm import tqdm

from common.cache import ResultCache, weight_sample
from common.cli import field, parse, run_command
from common.device import choose_device, choose_dtype, describe_device
from common.environment import command_line, usable_cores, versions
from common.errors import UserError
from common.files import check_output, read_json, write_json
from data.corpus import ensure_corpus, read_documents, validation_documents
from data.passkey import PasskeyPrompts
from data.sources import read_text
from data.tokenizer import Tokenizer
from eval import CONVENTIONS, four_lengths, passkey, perplexity
from extras.sweep_tables import markdown, sweep_tables
from finetune import FinetuneConfig
from methods import ALIASES, METHODS, RopeConfig, depends_on_length, inv_freq, parse_rope_flag
from model import LLaMA, ModelConfig
from plot import plot_sweep
from rope import angle_bins, angle_disturbance
from train import fit
from training.extension import row_length, training_batches
from training.state import open_state, resumable_settings
from weights import load_config, load_model, load_tokenizer, with_rope
from weights.size import parameter_count


@dataclass
class SweepConfig:
    """The plan fills in None and []."""
    plan: str = field("methods", "which experiment; it fills in the flags that are not given",
                      choices=["methods", "dprope", "scratch", "smollm2"])
    model: str | None = field(None, "pretrained model [data/tiny]")
    methods: list[str] = field([], "names or JSON objects, to be measured and trained [by the "
                               "plan]; default is direct fine-tuning")
    zero_shot: list[str] = field([], "methods that are measured without training only")
    curves: list[str] = field([], "methods whose passkey retrieval at L' is measured after every "
                              "number of steps, with twice the keys")
    factors: list[float] = field([], "s = L'/L")
    seeds: list[int] = field([], "of the data's order and of the keys: a training each")
    steps: list[int] = field([], "after how many steps to measure; the largest is trained")
    step_tokens: int | None = field(None, "tokens of a step: rows = step tokens / tokens of a row, "
                                   "at least one")
    lr: float | None = field(None, "learning rate, constant after 20 steps of warm-up")
    lengths: list[int] = field([], "windows and prompt lengths [half, one, two and four times L]")
    stride: int | None = field(None, "of the perplexity [a quarter of each window]")
    max_tokens: int | None = field(None, "tokens of each kind of text to measure perplexity on")
    text: list[str] = field([], "UTF-8 files, each a kind of text beside the corpus [C++ headers "
                            "of the PyTorch installation]")
    distances: int = field(32, "passkey at L': distances of the key, evenly spaced")
    trials: int | None = field(None, "passkey: keys at each distance; 0 measures no passkey")
    passkey_share: float | None = field(None, "share of training rows that hold a passkey prompt, "
                                        "which is never longer than L")
    corpus: str = field("data/corpora/python", "token folder; the default one is made if missing")
    corpus_mb: float = field(32.0, "megabytes of Python source in the default corpus, if made")
    jobs: int | None = field(None, "processes [one a core; one on a GPU]")
    device: str = field("auto", "auto, cpu, cuda or mps")
    dtype: str = field("auto", "of the training's matrix products, and of evaluation on a GPU",
                       choices=["auto", "float32", "bfloat16"])
    compile: bool = field(False, "torch.compile every block in training")
    recompute: bool = field(False, "keep only each block's input in training")
    folder: str = field("out/sweep", "where the runs' models and measurements lie")
    out: str = field("", "tables, as JSON, with a figure beside it [out/sweep-PLAN.json]")
    dry_run: bool = field(False, "only say what would be run and for how long")


def dprope_flag(**settings: int) -> str:
    """DPRoPE with settings of its own, as --methods takes it."""
    return json.dumps({"rope_type": "dprope", **settings})


# Every method that stretches RoPE by a factor alone and trains on rows of L' tokens. Others need
# settings (longrope, proportional), train on other rows (clex, drope), or are for models that are
# not fine-tuned (distance maps): --methods names them.
BY_FACTOR = ["default"] + [
    name for name, method in METHODS.items()
    if name != "default" and method.extends_rope and method.trained_on == "target"
    and not method.needs_settings and not method.full_head and not method.distance_map]
DPROPE = dprope_flag(interpolated_dims=40)  # of 64, the paper's share; alone it goes by a threshold
PAPERS = ["default", "linear", "ntk", "yarn", DPROPE]
TINY = dict(model="data/tiny", step_tokens=2048, max_tokens=8192, trials=5)
PLANS = {
    "methods": dict(
        TINY, methods=[*BY_FACTOR, DPROPE], curves=["default", "linear"], factors=[2.0, 4.0],
        seeds=[0, 1], steps=[25, 50, 100, 200], lr=5e-4, passkey_share=1.0),
    "dprope": dict(
        TINY, methods=[dprope_flag(interpolated_dims=n) for n in (0, 16, 32, 48, 64)],
        zero_shot=[*(dprope_flag(interpolated_dims=n) for n in (8, 24, 40, 56)), "dprope",
                   *(dprope_flag(bins=n) for n in (4, 8, 16, 32, 64, 128, 256))],
        factors=[2.0, 4.0], seeds=[0], steps=[200], lr=5e-4, passkey_share=1.0),
    "scratch": dict(
        TINY, methods=["default", "alibi", "xpos", "nope",
                       json.dumps({"rope_type": "default", "no_rope_layer_interval": 4}),
                       json.dumps({"rope_type": "default", "random_positions": 2048})],
        factors=[1.0], seeds=[0, 1], steps=[2500], lr=3e-3, passkey_share=0.5),
    # About 10^16 operations a training, and 10^17 for all the keys: some twenty minutes on an H100.
    # --factors 4 is the second half.
    "smollm2": dict(
        model="out/smollm2/smollm2-135m-instruct.gguf", methods=PAPERS, curves=PAPERS,
        factors=[2.0], seeds=[0], steps=[50, 100, 200], step_tokens=16384, lr=2e-5,
        passkey_share=0.0, lengths=[2048, 4096, 8192, 16384, 32768], stride=256,
        max_tokens=34816, trials=5)}


# --------------------------------------------------------------------------------------------------
# The runs


@dataclass(frozen=True)
class Run:
    """One model through its steps; steps (0,) is measured without training."""
    method: str
    factor: float
    seed: int
    steps: tuple[int, ...]

    @property
    def name(self) -> str:
        method = self.method.replace('"', "").replace("rope_type: ", "")
        words = "".join(c if c.isalnum() or c in "-_." else "-" for c in method).strip("-")
        if len(words) > 60:
            words = f"{words[:40]}-{hashlib.sha256(self.method.encode()).hexdigest()[:8]}"
        untrained = "-untrained" if self.steps == (0,) else ""
        return f"{words}-x{self.factor:g}-seed{self.seed}{untrained}"


def plan_runs(c: SweepConfig) -> list[Run]:
    """Every method without training (where the seed changes only the keys), and with each seed."""
    runs = []
    for factor in c.factors:
        if c.plan != "scratch":
            runs += [Run(name, factor, c.seeds[0], (0,)) for name in [*c.methods, *c.zero_shot]]
        runs += [Run(name, factor, seed, tuple(c.steps)) for name in c.methods for seed in c.seeds]
    return list(dict.fromkeys(runs))


def original_and_target(c: SweepConfig, factor: float) -> tuple[int, int]:
    """The windows L and L' = s L."""
    L = load_config(c.model).original_window
    return L, round(L * factor)


def scaled_rope(c: SweepConfig, method: str, factor: float) -> dict:
    """The whole rope dict of a method at a factor, counted from the model's original window."""
    rope = parse_rope_flag(method)
    L, _ = original_and_target(c, factor)
    if rope["rope_type"] == "default":
        factor = 1.0
    return {"original_max_position_embeddings": L, "factor": factor} | rope


def run_folder(c: SweepConfig, run: Run) -> Path:
    return Path(c.folder) / c.plan / run.name


def training_settings(c: SweepConfig, run: Run, steps: int) -> FinetuneConfig:
    """The settings of a run's training, which tell it from others in the same folder."""
    scratch = c.plan == "scratch"
    settings = FinetuneConfig(
        model=c.model, rope=run.method, factor=run.factor, out=str(run_folder(c, run)),
        steps=steps, lr=c.lr,
        schedule="cosine" if scratch else "constant", warmup=100 if scratch else 20,
        weight_decay=0.1 if scratch else 0.0, seed=run.seed, passkey_share=c.passkey_share,
        passkey_packed=scratch, corpus=c.corpus, device=c.device, dtype=c.dtype,
        compile=c.compile, recompute=c.recompute, save_every=10**6 if steps < 200 else 200,
        eval_every=10**6, log_every=25)
    row = row_length(settings, parse_rope_flag(run.method), *original_and_target(c, run.factor))
    settings.batch_size = max(1, c.step_tokens // row)
    return settings


def starting_model(c: SweepConfig, run: Run, device: torch.device,
                   dtype: torch.dtype = torch.float32) -> LLaMA:
    """The model of a run before its first step."""
    L, window = original_and_target(c, run.factor)
    if c.plan == "scratch":
        torch.manual_seed(run.seed)
        shape = load_config(c.model)
        rope = RopeConfig.from_dict({"original_max_position_embeddings": L,
                                     "rope_theta": shape.rope.base} | parse_rope_flag(run.method))
        return LLaMA(dataclasses.replace(shape, rope=rope)).to(device)
    rope = scaled_rope(c, run.method, run.factor)
    model = load_model(c.model, rope=rope, device=device, dtype=dtype)
    model.config.max_seq_len = window
    # Also where nothing is scaled: the folder of a direct fine-tuning has to know L.
    model.config.rope = dataclasses.replace(model.config.rope, original_max_position_embeddings=L)
    return model


load_tokenizer_once = functools.cache(load_tokenizer)


def one_run(c: SweepConfig, run: Run) -> list:
    """Train and measure a run, as far as its folder does not hold it: a row a number of steps."""
    cache = ResultCache(f"{run_folder(c, run)}.json", quiet=True)
    rows = []
    for steps in run.steps:
        settings = resumable_settings(training_settings(c, run, steps)) | {"steps": steps}
        measure = functools.partial(measure_run, c, run, steps, cache)
        rows.append(cache.get(["row", settings, row_conditions(c, run)], measure))
    return rows


def row_conditions(c: SweepConfig, run: Run) -> list:
    """Everything that a row depends on, but for the settings of the training."""
    device = choose_device(c.device)
    return [weight_digest(c.model), read_json(Path(c.corpus) / "meta.json"),
            [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in c.text],
            c.lengths, c.stride, c.max_tokens, c.distances, c.trials, run.method in c.curves,
            device.type, str(choose_dtype(c.dtype, device)), c.compile, c.recompute, versions()]


@functools.cache
def weight_digest(path: str) -> str:
    """A sample of a model's weights, and its shape, as a short word."""
    model = load_model(path)
    content = weight_sample(model).numpy().tobytes() + repr(model.config).encode()
    return hashlib.sha256(content).hexdigest()


def measure_run(c: SweepConfig, run: Run, steps: int, cache: ResultCache) -> dict:
    """A row: at the beginning and the end all windows and texts, between L' and the corpus."""
    L, window = original_and_target(c, run.factor)
    model, seconds = trained_model(c, run, steps)
    tokenizer = load_tokenizer_once(c.model)
    kinds, lengths = documents_by_kind(c, tokenizer), c.lengths
    at_an_end = steps in (0, run.steps[-1])
    if not at_an_end:
        label = corpus_label(c.corpus)
        kinds, lengths = {label: kinds[label]}, [window]
    row = {"method": run.method, "factor": run.factor, "seed": run.seed, "steps": steps,
           "rope": model.config.rope.to_dict(), "window": window, "training_seconds": seconds,
           "perplexity": {}, "passkey": {}, "accuracy_by_depth": {}}

    for kind, documents in kinds.items():
        row["perplexity"][kind] = {}
        for n in lengths:
            measured = perplexity(model, documents, n, c.stride, progress=False, cache=cache)
            row["perplexity"][kind][n] = measured["perplexity"]
    if c.trials and at_an_end:
        for n in lengths:
            measured = passkey(model, tokenizer, [n], 10, c.trials, run.seed, progress=False,
                               cache=cache)
            row["passkey"][n] = measured["accuracy"][n]
            row["accuracy_by_depth"][n] = measured["accuracy_by_depth"][n]
    if c.trials and (at_an_end or run.method in c.curves):
        trials = 2 * c.trials if run.method in c.curves else c.trials  # PI: ten at each of 32
        measured = passkey(model, tokenizer, [window], c.distances, trials, run.seed,
                           progress=False, cache=cache)
        row |= {"k_max": measured["k_max"], "accuracy_at_target": measured["accuracy"][window]}
    if METHODS[model.config.rope.rope_type].extends_rope and run.factor > 1:
        row["disturbance"] = mean_disturbance(model.config, L, window)
    return row


def trained_model(c: SweepConfig, run: Run, steps: int) -> tuple[LLaMA, float]:
    """The model of a run after so many steps, and the seconds of its training so far."""
    device = choose_device(c.device)
    dtype = choose_dtype(c.dtype, device) if device.type == "cuda" else torch.float32
    if steps == 0:
        return starting_model(c, run, device, dtype), 0.0
    tokenizer = load_tokenizer_once(c.model)
    model = starting_model(c, run, device)
    settings = training_settings(c, run, steps)
    settings.fresh = is_past(settings, steps)
    batches = training_batches(settings, model.config.rope.to_dict(), model.config, tokenizer,
                               ranks=1)
    seconds = fit(model, settings, batches, None, tokenizer, progress=False)
    del model  # its trained weights are in the folder: one model at a time
    return load_model(settings.out, device=device, dtype=dtype), seconds  # as the folder gives it


def is_past(settings: FinetuneConfig, steps: int) -> bool:
    """Whether the training in settings.out has gone further than `steps`, so that it has to begin
    again. A UserError if it had other settings: nothing is replaced without a word."""
    path = Path(settings.out) / "state.pt"
    if not path.exists():
        return False
    try:
        state = open_state(path)
        there = state["settings"]
        steps_done = state["step"]
    except Exception:  # damaged bytes raise anything
        return True
    if there != resumable_settings(settings):
        raise UserError(f"{settings.out} holds a training with other settings: give another "
                        f"--folder, or delete {path.parent.parent}")
    return steps_done > steps


def mean_disturbance(config: ModelConfig, L: int, window: int) -> float:
    """DPRoPE's disturbance of the angles at L' against plain RoPE's at L, in nats."""
    plain, _ = inv_freq(RopeConfig(rope_theta=config.rope.base), config.head_dim)
    scaled, _ = inv_freq(config.rope, config.head_dim, window)
    return float(angle_disturbance(plain.double().numpy(), scaled.double().numpy(), L, window,
                                   bins=angle_bins(L)).mean())


# --------------------------------------------------------------------------------------------------
# The texts


def documents_by_kind(c: SweepConfig, tokenizer: Tokenizer) -> dict[str, list[np.ndarray]]:
    """{kind of text: documents}, none of it in the training text. Each is longer than the longest
    window, twice as long if the tokens allow."""
    longest, tokens = max(c.lengths), c.max_tokens
    length = max(longest + 1, min(2 * longest, tokens))
    kinds = {corpus_label(c.corpus): validation_documents(c.corpus, length, tokens, tokenizer)}
    for path in c.text:
        kinds[Path(path).stem] = read_document_once(path, tokenizer, tokens, longest)
    if not c.text:
        kinds["C++ headers"] = header_documents(tokenizer, length, tokens)
    return kinds


@functools.cache
def read_document_once(path: str, tokenizer: Tokenizer, tokens: int,
                       window: int) -> list[np.ndarray]:
    return read_documents([path], tokenizer, tokens, window)


def corpus_label(corpus: str) -> str:
    """The name of a corpus in the tables."""
    source = read_json(Path(corpus) / "meta.json")["source"]
    return "Python" if source == "python" else Path(corpus).name


@functools.cache
def header_documents(tokenizer: Tokenizer, length: int, tokens: int) -> list[np.ndarray]:
    """Documents of `length` tokens from the C++ headers that come with PyTorch: text of a kind on
    which the tiny model was not trained."""
    documents = []
    for path in sorted(Path(torch.__file__).parent.glob("include/**/*.h"), key=Path.as_posix):
        text = read_text(path) if path.stat().st_size > 2 * length else None
        if text:
            ids = tokenizer.encode(text[:8 * length], bos=True)
            if len(ids) >= length:
                documents.append(np.array(ids[:length]))
        if len(documents) * length >= tokens:
            break
    if not documents:
        raise UserError(f"no C++ header of the PyTorch installation has {length} tokens: name "
                        "another kind of text with --text")
    return documents


# --------------------------------------------------------------------------------------------------
# The command


def estimate(c: SweepConfig, runs: Sequence[Run], tokenizer: Tokenizer,
             device: torch.device) -> float:
    """Seconds that all runs would take in one process."""
    seconds = 0.0
    answer = len(PasskeyPrompts(tokenizer).answer("12345")) + 1
    for factor in c.factors:
        _, window = original_and_target(c, factor)
        step_seconds, token_seconds = timed_step(c, factor, device)
        for run in [run for run in runs if run.factor == factor]:
            rope = RopeConfig.from_dict(scaled_rope(c, run.method, factor))
            passes = answer if depends_on_length(rope) else 1  # such answers are generated
            curve = run.method in c.curves
            keys = passes * c.trials * c.distances * window * (2 if curve else 1)
            texts = [2 * c.max_tokens * n / (c.stride or n / 4) for n in c.lengths]
            whole = sum(texts) + keys + passes * c.trials * 10 * sum(c.lengths)
            between = c.max_tokens * window / (c.stride or window / 4) + (keys if curve else 0)
            tokens = whole + between * (len(run.steps) - 1)
            seconds += max(run.steps) * step_seconds + tokens * token_seconds
    return seconds


def timed_step(c: SweepConfig, factor: float, device: torch.device) -> tuple[float, float]:
    """Seconds of a training step at a factor, and of a token in evaluation."""
    model = starting_model(c, Run(c.methods[0], factor, 0, (1,)), device)
    model.recompute = c.recompute
    dtype = choose_dtype(c.dtype, device)
    _, window = original_and_target(c, factor)
    rows = max(1, c.step_tokens // window)
    x = torch.randint(0, model.config.vocab_size, (rows, window + 1), device=device)
    steps, tokens = [], []
    for _ in range(3):
        started = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model.loss(x[:, :-1], x[:, 1:])
        loss.backward()
        loss.item()
        trained = time.perf_counter()
        with torch.inference_mode():
            model.hidden(x[:, :-1]).sum().item()
        steps.append(trained - started)
        tokens.append((time.perf_counter() - trained) / (rows * window))
    return min(steps[1:]), min(tokens[1:])  # the first is slower, and does not count


def start_process() -> None:
    """A process has one core, and leaves Ctrl-C to its parent, which ends its children in order."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def one_run_in_process(c: SweepConfig, run: Run) -> list:
    """one_run() in a process that ends when it is stopped. Its work is on the disk."""
    try:
        return one_run(c, run)
    except KeyboardInterrupt:
        os._exit(130)


def run_in_processes(c: SweepConfig, runs: Sequence[Run], jobs: int, bar: tqdm
                     ) -> dict[Run, list[dict]]:
    """{run: its rows}"""
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_process)
    todo, running, rows = list(reversed(runs)), {}, {}
    try:
        while todo or running:
            while todo and len(running) < jobs:  # what waits in a pool cannot be called back
                run = todo.pop()
                running[pool.submit(one_run_in_process, c, run)] = run
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                rows[running.pop(future)] = future.result()
                bar.update()
    except BrokenProcessPool:
        raise UserError("a process was killed, for want of memory most likely: the same command "
                        "goes on; give it fewer --jobs") from None
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()  # a training then saves itself
            child.join()
        raise
    pool.shutdown()
    return rows


def fill_in(c: SweepConfig) -> SweepConfig:
    """The plan's flags where none are given, each value once."""
    plan = PLANS[c.plan]
    given = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
    for name in ("methods", "zero_shot", "curves"):
        given[name] = [ALIASES.get(method, method) for method in given[name]]
    unknown = sorted(set(given["curves"]) - set(given["methods"]))
    if given["methods"] and unknown:
        raise UserError(f"--curves {' '.join(unknown)}: not among the --methods")
    for name, value in plan.items():
        if given[name] in (None, []):
            given[name] = value
    base = load_config(given["model"])
    if c.lr is None and given["model"] != plan["model"] and parameter_count(base) > 5e7:
        raise UserError(f"--lr is needed for a model of this size: the plan's {plan['lr']:g} is "
                        f"for {plan['model']}; the PI paper has 2e-5 for 7B and 13B")
    if not all(map(math.isfinite, given["factors"])):
        raise UserError("--factors: give numbers above 1")
    targets = [round(base.original_window * factor) for factor in given["factors"]]
    given["lengths"] = sorted({*(given["lengths"] or four_lengths(base)), *targets})
    given["steps"] = sorted(set(given["steps"]))
    for name in ("methods", "factors", "seeds"):
        given[name] = list(dict.fromkeys(given[name]))
    given["out"] = given["out"] or f"out/sweep-{c.plan}.json"
    return SweepConfig(**given)


def check_sweep(c: SweepConfig) -> None:
    """A UserError for settings that cannot work, before any work."""
    scratch = c.plan == "scratch"
    if scratch and len(c.steps) > 1:
        raise UserError("--steps: give one number; from scratch the learning rate falls to zero at "
                        "the end, so that each needs its own training")
    if c.steps[0] < 1 or min(c.factors) < 1 or min(c.factors) == 1 and not scratch:
        raise UserError("--steps have to be at least 1, and --factors above 1: what is untrained "
                        "or unscaled is measured anyway")
    jobs = 1 if c.jobs is None else c.jobs
    if c.trials < 0 or min(c.distances, c.max_tokens, c.step_tokens, jobs) < 1:
        raise UserError("--trials has to be at least 0; --distances, --max-tokens, --step-tokens "
                        "and --jobs at least 1")
    if c.lengths[0] < 1 or min(c.seeds) < 0 or not (c.lr > 0 and math.isfinite(c.lr)):
        raise UserError("--lengths have to be at least 1, --seeds at least 0, --lr above 0")
    if c.stride is not None and not 1 <= c.stride <= c.lengths[0]:
        raise UserError(f"--stride {c.stride}: has to be from 1 to the shortest window, "
                        f"{c.lengths[0]}")
    if not 0 <= (c.passkey_share or 0) <= 1:
        raise UserError(f"--passkey-share {c.passkey_share}: give a share from 0 to 1")
    if len({Path(path).stem for path in c.text}) < len(c.text):
        raise UserError("--text: two files have the same name, which is that of their column: "
                        "rename one of them")
    base = load_config(c.model)
    for method in [*c.methods, *c.zero_shot]:
        rope = parse_rope_flag(method)
        fixed = not METHODS[rope["rope_type"]].length_dependent     # dynamic NTK's is no stretch
        if fixed and any(rope.get("factor", factor) != factor for factor in c.factors):
            raise UserError(f"{method}: its own factor contradicts --factors {listed(c.factors)}: "
                            "give one of them")
        for factor in c.factors:
            with_rope(base, scaled_rope(c, method, factor))


def check_texts(c: SweepConfig, tokenizer: Tokenizer) -> None:
    """A UserError for texts and prompts that do not fit."""
    label = corpus_label(c.corpus)
    if label in [Path(path).stem for path in c.text]:
        raise UserError(f"--text: the name {label} is that of the corpus in the tables: rename the "
                        "file")
    if c.text:
        read_documents(c.text, tokenizer, 1, 0)
    shortest = PasskeyPrompts(tokenizer).shortest
    if c.trials and shortest > c.lengths[0]:
        raise UserError(f"--lengths {c.lengths[0]}: a passkey prompt needs {shortest} tokens: give "
                        "longer ones, or --trials 0")


def listed(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def main(argv: Sequence[str] | None = None) -> None:
    c = fill_in(parse(SweepConfig, __doc__, argv))
    check_output(c.out, beside=[".png"])
    check_sweep(c)
    device = choose_device(c.device)
    tokenizer = load_tokenizer_once(c.model)
    c.corpus = str(ensure_corpus(c.corpus, tokenizer.path, c.corpus_mb))
    check_texts(c, tokenizer)
    base = load_config(c.model)
    runs = plan_runs(c)
    jobs = c.jobs or (usable_cores() if device.type == "cpu" else 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if jobs > 1 else threads)
    seconds = estimate(c, runs, tokenizer, device) / min(jobs, len(runs))
    print(f"device     {describe_device(device)}, processes: {jobs}\n"
          f"model      {c.model}, window {base.original_window}, factors {listed(c.factors)}\n"
          f"runs       {len(runs)}: {len(c.methods)} methods, seeds {listed(c.seeds)}, measured "
          f"after {listed(c.steps)} steps of {c.step_tokens:,} tokens\n"
          f"time       about {seconds / 60:.0f} minutes, less what is there already", flush=True)
    if c.dry_run:
        return

    kinds = documents_by_kind(c, tokenizer)
    started = time.perf_counter()
    with tqdm(total=len(runs), desc="sweep", unit="run", disable=None) as bar:
        if jobs > 1:
            rows = run_in_processes(c, runs, jobs, bar)
        else:
            rows = {}
            for run in runs:
                rows[run] = one_run(c, run)
                bar.update()
    torch.set_num_threads(threads)
    write_json(c.out, {
        "model": c.model, "rope": base.rope.to_dict(), "plan": c.plan,
        "rows": [row for run in runs for row in rows[run]],
        "original_window": base.original_window, "lengths": c.lengths,
        "stride": c.stride or "window / 4", **CONVENTIONS,
        "documents": {kind: len(documents) for kind, documents in kinds.items()},
        "tokens_scored": {kind: sum(len(document) - 1 for document in documents)
                          for kind, documents in kinds.items()},
        "settings": dataclasses.asdict(c), "seed": c.seeds[0],
        "seconds": time.perf_counter() - started, "device": describe_device(device),
        "versions": versions(), "command": command_line()})
    result = read_json(c.out)
    for table in sweep_tables(result):
        print(markdown(*table))
    figure = plot_sweep(result, Path(c.out).with_suffix(".png"))
    print(f"\n(mean over seeds {listed(c.seeds)}, ± half the range; {c.max_tokens:,} tokens of "
          f"each text; passkey: {c.distances} distances x {c.trials} keys, twice as many for "
          f"methods measured after every number of steps)\nwrote {c.out} and {figure}")


if __name__ == "__main__":
    run_command(main)
