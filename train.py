"""Pre-training from scratch, and fit(), the one training loop of the project.

    python train.py                                   # the tiny LLaMA: a window of 256 on Python source and passkey prompts -> out/base
    torchrun --nproc-per-node 8 train.py              # the same step shared by 8 GPUs

A run leaves in its folder the model (Meta's layout), metrics.jsonl (a line a log step), run.json (settings, command, versions) and
state.pt, from which the same command goes on after an interruption, bit for bit on a CPU.
"""
import contextlib
import dataclasses
import json
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from cli import (Stopped, UserError, choose_device, choose_dtype, command_line, describe_device, field, matmul_precision, parse, run, versions,
                 whole_file, write_json)
from data.batches import Batches, TokenFile
from data.prepare import corpus_for, ensure_corpus
from data.tokenizer import open_tokenizer
from model import LLaMA, ModelConfig
from positions import training_positions
from rope import RopeConfig, rope_argument
from weights import save_model, save_tensors, some_weights


@dataclass
class FitConfig:
    """What fit() reads. Learning rates and steps are those of the tiny model."""
    out: str = field("out/run", "folder of the model and of the run's state")
    steps: int = field(1000, "optimiser steps")
    batch_size: int = field(16, "rows per micro-batch and device")
    accumulate: int = field(1, "micro-batches per optimiser step")
    lr: float = field(3e-3, "peak learning rate")
    schedule: str = field("cosine", "after warm-up", choices=["cosine", "linear", "constant"])
    min_lr: float = field(0.0, "where cosine and linear end, as a share of the peak")
    warmup: int = field(100, "steps of linear warm-up, from 10 % of the peak")
    weight_decay: float = field(0.1, "AdamW weight decay, on matrices only")
    beta2: float = field(0.95, "AdamW's second beta (the first is 0.9)")
    clip: float = field(1.0, "largest norm of the gradient; 0 does not clip")
    seed: int = field(0, "of initialisation and batches")
    log_every: int = field(10, "steps between lines of metrics.jsonl")
    eval_every: int = field(500, "steps between validations")
    save_every: int = field(500, "steps between checkpoints")
    device: str = field("auto", "auto, cpu, cuda or mps")
    dtype: str = field("auto", "of the matrix products: bfloat16 is autocast over float32 weights", choices=["auto", "float32", "bfloat16"])
    attention: str = field("auto", "auto takes sdpa", choices=["auto", "naive", "tiled", "sdpa"])
    compile: bool = field(False, "torch.compile every block")
    recompute: bool = field(False, "keep only each block's input and compute the rest again in the backward pass: slower, far less memory")
    fresh: bool = field(False, "start again although --out holds a run, which is then replaced")
    dry_run: bool = field(False, "only say what it would take: parameters, memory, operations")
    free = {"out", "log_every", "eval_every", "save_every", "device", "attention", "compile", "recompute", "fresh", "dry_run"}  # see resumable


@dataclass
class TrainConfig(FitConfig):
    """The tiny LLaMA. Everything that makes it tiny is a flag."""
    out: str = field("out/base", "folder of the model and of the run's state")
    dim: int = field(128, "model width C")
    n_layers: int = field(4, "blocks")
    n_heads: int = field(2, "query heads H; two of 64, as many pairs a head as in a 3B LLaMA, rather than four of 32")
    n_kv_heads: int | None = field(None, "key/value heads K; fewer than n_heads is grouped-query attention [n_heads]")
    multiple_of: int = field(32, "the feed-forward width is rounded up to a multiple of this")
    max_seq_len: int = field(256, "window L in tokens")
    rope: str = field("default", "how the model knows positions: default (RoPE), alibi, xpos, nope, ..., or a JSON object")
    rope_theta: float = field(10000.0, "RoPE's base")
    tokenizer: str = field("data/tiny/tokenizer.model", "SentencePiece model, tokenizer.json or GGUF file")
    corpus: str = field("data/corpora/python", "token folder (data/prepare.py); the default one is made if it is not there")
    corpus_mb: float = field(96.0, "megabytes of Python source in the default corpus")
    passkey_share: float = field(0.5, "share of the rows that are passkey prompts of all lengths up to the window")
    steps: int = field(14000, "optimiser steps")
    batch_size: int = field(8, "rows per micro-batch and device")


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def learning_rate(config, step):
    """The learning rate of step 0, 1, 2, ...: lr * (0.1 + 0.9 step / warmup) during warm-up, then the schedule down to min_lr * lr."""
    if step < config.warmup:
        return config.lr * (0.1 + 0.9 * step / config.warmup)
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr + (1 - config.min_lr) * fall)


def make_optimizer(model, config):
    """AdamW (0.9, beta2); matrices are decayed, norm gains are not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)


def fit(model, config, batches, evaluate=None, tokenizer=None, progress=True):
    """Train `model` as a FitConfig says, or take up the run that config.out holds. Returns the seconds of training, of all its parts.

    batches: a data.batches.Batches of config.batch_size * config.accumulate * ranks rows; evaluate(model) -> dict of numbers, logged every
    eval_every steps. The model's weights are float32; a bfloat16 dtype means autocast. A UserError: settings that do not fit the run in
    config.out, or a loss that is not finite, in which case the last checkpoint stands.
    """
    check(config)
    rank, world = distributed()
    device, out = model.device, Path(config.out)
    dtype = choose_dtype(config.dtype, device)
    model.attention, model.recompute = config.attention, config.recompute
    optimizer = make_optimizer(model, config)
    origin = {"settings": resumable(config) | ({"ranks": world} if world > 1 else {}), "start": some_weights(model)}
    first, seconds = resume(model, optimizer, config, origin)
    if first >= config.steps:
        return seconds
    precision = "high" if device.type == "cuda" else torch.get_float32_matmul_precision()  # TF32 for what autocast leaves in float32
    if config.compile:
        for layer in model.layers:
            layer.compile()  # one graph serves all blocks
    log = Metrics(out / "metrics.jsonl", first) if rank == 0 else None
    if rank == 0:
        for left in out.glob(".*.tmp"):  # of a save that was killed
            left.unlink()
        write_json(out / "run.json", {"command": command_line(), "settings": dataclasses.asdict(config), "seed": config.seed,
                                      "parameters": model.config.parameters(), "device": describe_device(device), "versions": versions()})
    model.train()
    rows = config.batch_size * config.accumulate
    tick = time.perf_counter()
    started = tick - seconds
    finite = torch.ones((), dtype=torch.bool, device=device)
    with Interrupts() as interrupts, ThreadPoolExecutor(1) as pool, matmul_precision(precision), \
            tqdm(total=config.steps, initial=first, desc=out.name, unit="step", disable=None if rank == 0 and progress else True) as bar:
        following = pool.submit(batches, first, rank * rows, (rank + 1) * rows)  # the next batch is cut while this one is computed
        for step in range(first, config.steps):
            batch = following.result()  # tokens, targets [rows, T], and positions if they are not 0, 1, 2, ...
            if step + 1 < config.steps:
                following = pool.submit(batches, step + 1, rank * rows, (rank + 1) * rows)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            loss = torch.zeros((), device=device)
            for part in zip(*(tensor.split(config.batch_size) for tensor in batch)):
                part = [tensor.to(device, non_blocking=True) for tensor in part]
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    part = model.loss(*part) / config.accumulate
                part.backward()
                loss += part.detach()
            loss = average_over_ranks(model, loss, world)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)  # the norm before clipping
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            finite &= torch.isfinite(loss) & torch.isfinite(norm)

            done, last = step + 1, step + 1 == config.steps
            logging = last or done == 1 or any(done % n == 0 for n in (config.log_every, config.eval_every, config.save_every))
            stop = interrupts.pending if world == 1 else logging and on_any_rank(interrupts.pending, device)
            saving = last or stop or done % config.save_every == 0
            logging = logging or stop
            if saving:  # the loss was that of the weights before this step
                finite &= torch.stack([p.isfinite().all() for p in model.parameters()]).all()
            if logging:
                if not finite:  # the only place where the host waits for the device
                    raise diverged(out, done)
                now = time.perf_counter()
                speed = (done - log.last if log else 1) * rows * world * batch[0].shape[1] / (now - tick)
                tick = now
                if log:
                    log.write(step=done, loss=loss.item(), lr=learning_rate(config, step), grad_norm=norm.item(), tokens_per_second=speed)
                bar.set_postfix_str(f"loss {loss.item():.3f}, lr {learning_rate(config, step):.1e}, {speed:,.0f} tok/s", refresh=False)
            bar.update()
            if evaluate and (last or done % config.eval_every == 0):
                model.eval()
                measured = evaluate(model)
                model.train()
                if not all(map(math.isfinite, measured.values())):
                    raise diverged(out, done)
                if log:
                    log.write(step=done, **measured)
                    bar.write(f"step {done}: " + ", ".join(f"{k} {v:.4g}" for k, v in measured.items()))
                tick = time.perf_counter()
            if saving:
                seconds = time.perf_counter() - started
                if rank == 0:
                    save(model, optimizer, out, {**origin, "step": done, "seconds": seconds}, tokenizer)
            if stop and not last:
                raise Stopped(f"stopped at step {done} of {config.steps} and saved in {out}: the same command"
                              f"{', without --fresh,' if config.fresh else ''} goes on from there")
    model.eval()
    if world > 1:
        dist.barrier()  # every rank may now read the folder that rank 0 wrote
    return seconds


def diverged(out, step):
    """The error of a run whose loss or weights are not finite."""
    kept = f"{out} holds the last good checkpoint" if (out / "state.pt").exists() else "nothing had been saved yet"
    return UserError(f"the loss is not finite after step {step} ({kept}): lower --lr or raise --warmup, and start again in another --out")


def check(config):
    """Settings that cannot work, each in one line."""
    for name in ("steps", "batch_size", "accumulate", "log_every", "eval_every", "save_every"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: has to be at least 1")
    if not (config.lr > 0 and math.isfinite(config.lr)):
        raise UserError(f"--lr {config.lr}: has to be a positive number")
    for name, high in (("warmup", math.inf), ("weight_decay", math.inf), ("clip", math.inf), ("min_lr", 1), ("beta2", 1), ("seed", 2**63)):
        value = getattr(config, name)
        if not (0 <= value < high or name == "min_lr" and value == 1):
            limit = "at least 0" if high == math.inf else f"between 0 and {high}"
            raise UserError(f"--{name.replace('_', '-')} {value}: has to be {limit}")


class Metrics:
    """metrics.jsonl: a JSON object a line. Lines of steps that an interruption threw away are dropped, so that no step is there twice."""

    def __init__(self, path, first):
        self.path, self.last, self.started = path, first, time.perf_counter()
        kept = []
        if path.exists() and first > 0:
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a line that SIGKILL cut
                    if json.loads(line)["step"] <= first:
                        kept.append(line)
        with whole_file(path, "w") as file:
            file.writelines(line + "\n" for line in kept)

    def write(self, step, **numbers):
        self.last = step
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")


class Interrupts:
    """Ctrl-C and SIGTERM let the step in hand finish and the run save itself; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.pending = False
        self.before = {}
        with contextlib.suppress(ValueError):  # handlers belong to the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        if self.pending and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.pending = True

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: the model's folder for those who use it, state.pt (whole in itself) for those who go on


def save(model, optimizer, out, state, tokenizer=None):
    """Write the model's folder, then state.pt, each whole or not at all. The model is then never older than the state: a run that dies
    between the two repeats some steps, and one whose state says that it is finished has its model."""
    save_model(model, out, tokenizer)
    state = {**state, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    save_tensors(out / "state.pt", state)


def resume(model, optimizer, config, origin):
    """Load state.pt of config.out into model and optimizer. Returns the step to go on from and the seconds so far, zeros if there
    is no run. origin: what the run that is asked for begins with, its settings and some weights; a run with others is refused."""
    path = Path(config.out) / "state.pt"
    if not path.exists() or config.fresh:
        return 0, 0.0
    remedy = "choose another --out, or replace it with --fresh"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        here, there, other_start = origin["settings"], state["settings"], not torch.equal(state["start"], origin["start"])
        other = [f"{k} {there.get(k)} there, {here.get(k)} here" for k in sorted(here | there) if here.get(k) != there.get(k)]
    except Exception as error:  # damaged bytes raise anything
        raise UserError(f"{path}: the state of this run cannot be read ({type(error).__name__}): {remedy}") from None
    if other:
        raise UserError(f"{config.out} holds a run with other settings ({'; '.join(other)}): give the same ones to go on, {remedy}")
    if state["step"] > config.steps:
        raise UserError(f"{config.out} holds a run of {state['step']} steps, more than the {config.steps} asked for: {remedy}")
    if other_start:
        raise UserError(f"{config.out} holds a run that began with other weights, a model that is no longer there: {remedy}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return state["step"], state["seconds"]


def resumable(config):
    """The settings that decide the weights. The others (where, how fast, how often looked at) may change between the parts of a run; and so
    may the number of steps where no step depends on it, at constant learning rate: a finished run is then taken further."""
    free = config.free | ({"steps"} if config.schedule == "constant" else set())
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in free}


# ---------------------------------------------------------------------------------------------------------------------
# Several GPUs: torchrun starts a process for each; every process computes its rows of the step, and gradients are averaged


def distributed():
    """(rank, world size); joins the process group that torchrun's environment describes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def on_any_rank(flag, device):
    """Whether `flag` is true in any process: they have to stop after the same step, or one would wait for the others for ever."""
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def average_over_ranks(model, loss, world):
    """Average gradients and loss over the processes: every rank then takes the same step, as one process with all rows would."""
    if world == 1:
        return loss
    for tensor in [p.grad for p in model.parameters() if p.grad is not None] + [loss]:  # CLEX has none at t = 1, on all ranks alike
        dist.all_reduce(tensor)
        tensor /= world
    return loss


# ---------------------------------------------------------------------------------------------------------------------
# Pre-training


def describe(c, config, device, row=None):
    """The header that every training run prints first. c: the ModelConfig; row: tokens of a row, if not the window."""
    dtype, world = choose_dtype(config.dtype, device), distributed()[1]
    rows = config.batch_size * config.accumulate * world
    original = c.rope.original_max_position_embeddings or c.max_seq_len
    print(f"device     {describe_device(device)}, {str(dtype).removeprefix('torch.')}, attention {config.attention}"
          f"{' (sdpa, the fused kernels)' if config.attention == 'auto' else ''}{', compiled' if config.compile else ''}")
    print(f"model      {c.parameters():,} parameters, window {original} -> {c.max_seq_len}, rope {c.rope.to_dict()}")
    row = row or c.max_seq_len
    print(f"step       {rows} rows x {row} = {rows * row:,} tokens, {config.steps} steps, "
          f"{config.steps * rows * row / 1e6:.1f}M tokens, {c.flops_per_token(row) / 1e6:.1f} MFLOP a token")
    memory = c.training_bytes(config.batch_size, row, dtype, config.recompute, config.attention)
    print(f"memory     about {memory / 2**20:,.0f} MiB a process")
    if config.dry_run:
        flops = config.steps * rows * row * c.flops_per_token(row) * (4 / 3 if config.recompute else 1)
        cache = 2 * c.n_layers * c.n_kv_heads * c.head_dim * c.max_seq_len
        reading = c.flops_per_token(c.max_seq_len, training=False) * c.max_seq_len
        print(f"in all     {flops:.2e} floating-point operations, {flops / 1e14 / 3600:,.3g} hours at 100 TFLOP/s\n"
              f"then       to read {c.max_seq_len} tokens in bfloat16: weights {2 * c.parameters() / 2**20:,.0f} MiB, keys and values "
              f"{2 * cache / 2**20:,.0f} MiB, {reading:.2e} operations")


def validation(corpus, tokenizer, rows, seq_len, steps=8):
    """evaluate() for fit(): the mean loss and perplexity over fixed random rows of the validation split."""
    batches = Batches(corpus, tokenizer, rows, seq_len, seed=1)

    @torch.no_grad()
    def evaluate(model):
        loss = sum(model.loss(*(t.to(model.device) for t in batches(step))).item() for step in range(steps)) / steps
        return {"val_loss": loss, "val_perplexity": math.exp(loss) if loss < 700 else math.inf}
    return evaluate


def main(argv=None):
    config = parse(TrainConfig, __doc__, argv)
    check(config)
    rank, world = distributed()
    device = choose_device(config.device)
    tokenizer = open_tokenizer(config.tokenizer)
    config = dataclasses.replace(config, corpus=str(corpus_for(config.corpus, tokenizer)))
    given = rope_argument(config.rope)
    if "rope_theta" in given and given["rope_theta"] != config.rope_theta:
        raise UserError(f"--rope-theta {config.rope_theta:g} and rope_theta {given['rope_theta']} in --rope: give it as --rope-theta")
    if given.get("original_max_position_embeddings", config.max_seq_len) != config.max_seq_len:
        raise UserError("--rope original_max_position_embeddings: it is the window of this training, --max-seq-len")
    rope = RopeConfig.from_dict({"rope_theta": config.rope_theta} | ({} if given == {"rope_type": "default"} else {
        "original_max_position_embeddings": config.max_seq_len}) | given)
    shape = ModelConfig(
        dim=config.dim, n_layers=config.n_layers, n_heads=config.n_heads, n_kv_heads=config.n_kv_heads, vocab_size=tokenizer.vocab_size,
        multiple_of=config.multiple_of, max_seq_len=config.max_seq_len, rope=rope)
    if rank == 0:
        describe(shape, config, device)
    if config.dry_run:
        return
    torch.manual_seed(config.seed)
    model = LLaMA(shape).to(device)
    if rank == 0:
        corpus = ensure_corpus(config.corpus, config.tokenizer, config.corpus_mb)
    if world > 1:
        dist.barrier()
    corpus = Path(config.corpus)
    batches = Batches(TokenFile(corpus, "train"), tokenizer, config.batch_size * config.accumulate * world, config.max_seq_len,
                      config.passkey_share, seed=config.seed, positions=training_positions(rope, config.max_seq_len, config.max_seq_len))
    evaluate = validation(TokenFile(corpus, "val"), tokenizer, config.batch_size, config.max_seq_len)
    seconds = fit(model, config, batches, evaluate, tokenizer)
    if rank == 0:
        print(f"wrote {config.out} in {seconds:.0f} s; next: python finetune.py --model {config.out}")


if __name__ == "__main__":
    run(main)
