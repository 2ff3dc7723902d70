"""All of a training but the learning: its settings checked, its log and checkpoints, and how it
stops."""
import atexit
import contextlib
import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from common.cache import weight_sample
from common.device import choose_dtype, describe_device, matmul_precision
from common.distributed import (backend, is_sharded, join_process_group, of_all_ranks,
                                of_first_rank, on_any_rank, own_rows, shard_weights,
                                wait_for_all_ranks)
from common.environment import command_line, usable_cores, versions
from common.errors import Stopped, UserError
from common.files import remove, whole_file, write_json
from common.locks import locked
from model import LLaMA
from training.plan import planned_gpus
from training.state import newest_state, resumable_settings, resume_run, save_run
from weights.size import parameter_count


class TrainingRun:
    """The run in config.out: taken up where it was interrupted, then logged, validated and saved.

    config: a train.FitConfig. `step` is the number of steps done, `seconds` the time of all parts.
    """

    def __init__(self, model: LLaMA, optimizer: torch.optim.Optimizer, config: Any,
                 evaluate: Callable[[LLaMA], dict[str, float]] | None, tokenizer: Any,
                 progress: bool):
        self.model, self.optimizer, self.config = model, optimizer, config
        self.evaluate, self.tokenizer, self.progress = evaluate, tokenizer, progress
        self.out = Path(config.out)
        self.rank, self.world = join_process_group()
        self.readers = self.world // config.context_parallel    # ranks that read different rows
        settings = resumable_settings(config)
        if self.world > 1:
            settings["ranks"] = self.readers
        self.origin = {"settings": settings, "start": weight_sample(model)}
        self.step, self.seconds = 0, 0.0
        self.finite = torch.ones((), dtype=torch.bool, device=model.device)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.steps

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """For the time of the loop: no other process trains in this folder, and the state in it is
        loaded."""
        with self.lock():
            self.step, self.seconds = resume_run(self.model, self.optimizer, self.config,
                                                 self.origin)
            with contextlib.nullcontext() if self.finished else self.stepping():
                yield

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Rank 0 locks the folder for all. They ask again and again together: none may wait for
        long while others are at the next collective."""
        with contextlib.ExitStack() as stack:
            waited = False
            while refusal := self.lock_refused(stack):
                if not self.config.waits:
                    raise UserError(refusal)
                if self.rank == 0 and not waited:
                    print(f"waiting    {refusal}", flush=True)
                waited = True
                time.sleep(1)
            yield

    def lock_refused(self, stack: contextlib.ExitStack) -> str | None:
        """None, and the stack has the lock, or on every rank the words of the refusal."""
        refusal = None
        if self.rank == 0:
            try:
                stack.enter_context(locked(self.out / ".lock", f"--out {self.out}"))
            except UserError as error:
                refusal = str(error)
        return of_first_rank(refusal) if self.world > 1 else refusal

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Ctrl-C is noted, the log is open, and on a GPU the matrix products that autocast leaves
        in float32 use TF32."""
        on_gpu = self.model.device.type == "cuda"
        products = matmul_precision("high") if on_gpu else contextlib.nullcontext()
        show_bar = self.rank == 0 and self.progress
        bar = tqdm(total=self.config.steps, initial=self.step, desc=self.out.name, unit="step",
                   disable=None if show_bar else True)  # None: a bar only on a terminal
        with StopSignals() as self.signals, products, bar as self.bar:
            self.log = None
            if self.rank == 0:
                self.open_log()
            self.last_tick = time.perf_counter()
            self.started = self.last_tick - self.seconds
            self.model.train()
            yield
        self.model.eval()
        wait_for_all_ranks()  # every rank may now read the folder that rank 0 wrote

    def open_log(self) -> None:
        self.log = MetricsLog(self.out / "metrics.jsonl", self.step)
        for leftover in self.out.glob(".*.tmp"):  # of a save that was killed
            remove(leftover)
        if self.log.held is None:
            self.describe_run()

    def describe_run(self) -> None:
        write_json(self.out / "run.json", {
            "command": command_line(), "settings": dataclasses.asdict(self.config),
            "seed": self.config.seed, "parameters": parameter_count(self.model.config),
            "device": describe_device(self.model.device), "versions": versions()})

    def after_step(self, loss: Tensor, grad_norm: Tensor, lr: float, tokens: int) -> None:
        """Log, validate, save and stop where it is time. `tokens`: of the step, on this rank.

        A UserError if the loss, the gradient or the weights are not finite: the last checkpoint
        stands. Stopped after Ctrl-C.
        """
        c = self.config
        self.step += 1
        self.finite &= torch.isfinite(loss) & torch.isfinite(grad_norm)
        is_last = self.step == c.steps
        logs = (is_last or self.step == 1
                or any(self.step % n == 0 for n in (c.log_every, c.eval_every, c.save_every)))
        stops = on_any_rank(self.signals.pending)  # Ctrl-C or SIGTERM, agreed on at every step
        saves = is_last or stops or self.step % c.save_every == 0
        if saves:  # the loss was computed before this step: look at the new weights too
            finite = torch.stack([own_rows(p).isfinite().all() for p in self.model.parameters()])
            self.finite &= not on_any_rank(not finite.all())
        if logs or stops:  # so before every save too: raises if something is not finite
            self.write_log(loss, grad_norm, lr, tokens)
        self.bar.update()
        if self.evaluate and (is_last or self.step % c.eval_every == 0):
            self.validate()
        if saves:
            self.seconds = time.perf_counter() - self.started
            if self.log and self.log.held is not None:
                self.log.replace_old_log()
                self.describe_run()
            state = {**self.origin, "step": self.step, "seconds": self.seconds}
            save_run(self.model, self.optimizer, self.out, state, self.tokenizer)
        if stops and not is_last:
            fresh = ", without --fresh," if c.fresh else ""
            raise Stopped(f"stopped at step {self.step} of {c.steps} and saved in {self.out}: the "
                          f"same command{fresh} goes on from there")

    def write_log(self, loss: Tensor, grad_norm: Tensor, lr: float, tokens: int) -> None:
        """A line of metrics.jsonl. The host waits for the device only at steps that are logged."""
        if not self.finite:
            raise self.diverged()
        now = time.perf_counter()
        # Ranks without a log have a hidden bar, too: their speed goes nowhere.
        steps = self.step - self.log.last_step if self.log else 1
        speed = steps * tokens * self.readers / (now - self.last_tick)
        self.last_tick = now
        if self.log:
            self.log.write(step=self.step, loss=loss.item(), lr=lr, grad_norm=grad_norm.item(),
                           tokens_per_second=speed)
        self.bar.set_postfix_str(f"loss {loss.item():.3f}, lr {lr:.1e}, {speed:,.0f} tok/s",
                                 refresh=False)

    def validate(self) -> None:
        self.model.eval()
        dtype = choose_dtype(self.config.dtype, self.model.device)
        # FSDP gathers the weights of a block in this dtype; without it they are float32.
        mixed = is_sharded(self.model) and dtype != torch.float32
        with torch.autocast(self.model.device.type, dtype, enabled=mixed):
            measured = self.evaluate(self.model)
        if is_sharded(self.model):
            self.model.reshard()  # without a backward pass, weights outside the blocks stay whole
        self.model.train()
        if not all(map(math.isfinite, measured.values())):
            raise self.diverged()
        if self.log:
            self.log.write(step=self.step, **measured)
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
            self.bar.write(f"step {self.step}: {numbers}")
        self.last_tick = time.perf_counter()

    def diverged(self) -> UserError:
        kept = "nothing had been saved yet"
        if newest_state(self.out):
            kept = f"{self.out} holds the last good checkpoint"
        return UserError(f"the loss is not finite after step {self.step} ({kept}): lower --lr or "
                         "raise --warmup, and start again in another --out")


class MetricsLog:
    """metrics.jsonl: a JSON object a line.

    Lines of steps that an interruption threw away are dropped, so that no step is there twice.
    """

    def __init__(self, path: Path, first_step: int):
        self.path = path
        self.last_step = first_step
        kept = []
        if path.exists() and first_step > 0:
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                # A line that a kill cut, or that is not ours, is dropped.
                with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                    if json.loads(line)["step"] <= first_step:
                        kept.append(line + "\n")
        self.held: list[str] | None = kept  # lines that are not written yet
        if first_step > 0 or not path.exists():
            self.replace_old_log()

    def replace_old_log(self) -> None:
        """From now on lines go to the file. The log of a run that --fresh replaces stays until the
        first save, as its state does; until then the new lines are held."""
        with whole_file(self.path, "w") as file:
            file.writelines(self.held)
        self.held = None

    def write(self, step: int, **numbers: float) -> None:
        self.last_step = step
        line = json.dumps({"step": step, **numbers}) + "\n"
        if self.held is not None:
            self.held.append(line)
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line)


class StopSignals:
    """Ctrl-C and SIGTERM let the step in hand finish and the run save itself (`pending`). A second
    Ctrl-C stops at once."""

    def __enter__(self) -> "StopSignals":
        self.pending = False
        self.handlers_before = {}
        with contextlib.suppress(ValueError):  # handlers belong to the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers_before[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.pending and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.pending = True

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)


def validate_settings(config: Any) -> None:
    """Settings of a train.FitConfig that cannot work, each in one line."""
    for name in ("steps", "batch_size", "accumulate", "log_every", "eval_every", "save_every"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: has to be at "
                            "least 1")
    if not (config.lr > 0 and math.isfinite(config.lr)):
        raise UserError(f"--lr {config.lr}: has to be a positive number")
    below = {"warmup": math.inf, "weight_decay": math.inf, "clip": math.inf, "beta2": 1,
             "seed": 2**63}
    for name, limit in below.items():
        value = getattr(config, name)
        if not 0 <= value < limit:
            wanted = "at least 0" if limit == math.inf else f"between 0 and {limit}"
            raise UserError(f"--{name.replace('_', '-')} {value}: has to be {wanted}")
    if not 0 <= config.min_lr <= 1:
        raise UserError(f"--min-lr {config.min_lr}: has to be between 0 and 1")
    if config.gpus is not None and not config.dry_run:
        raise UserError(f"--gpus {config.gpus}: plans with --dry-run only; a training takes "
                        f"torchrun --nproc-per-node {config.gpus}")
    if config.gpus is not None and config.gpus < 1:
        raise UserError(f"--gpus {config.gpus}: has to be at least 1")


def check_ranks(config: Any, row: int) -> None:
    """A UserError, on every process, if the processes cannot share rows of so many tokens."""
    C, gpus = config.context_parallel, planned_gpus(config)
    require_same(dataclasses.asdict(config))
    if C < 1 or gpus % C:
        raise UserError(f"--context-parallel {C}: has to divide the number of processes, {gpus}: "
                        "start more with torchrun --nproc-per-node, or give another number")
    if row % (2 * C) and C > 1:
        raise UserError(f"--context-parallel {C}: a row of {row} tokens cannot be cut into {2 * C} "
                        "equal chunks, two for each process: give another number")
    if config.optimizer == "adamw8bit" and (join_process_group()[1] > 1 or config.offload):
        raise UserError("--optimizer adamw8bit: keeps its moments on one GPU: leave out torchrun "
                        "and --offload, or take adamw")


def require_same(settings: dict[str, Any]) -> None:
    """A UserError, on every rank, if one was started with other settings."""
    if join_process_group()[1] == 1:
        return
    ours = of_first_rank(settings)
    for other, theirs in enumerate(of_all_ranks(settings)):
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise UserError(f"process {other} was started with {name} {theirs.get(name)}, "
                                f"process 0 with {value}: start all with the same command")


def trains_sharded(config: Any) -> bool:
    """Whether weights are gathered where they are used: from other GPUs, or with --offload from the
    computer's memory."""
    return join_process_group()[1] > 1 or config.offload


def shard_for_training(model: LLaMA, config: Any, device: torch.device) -> torch.device:
    """shard_weights, as a train.FitConfig asks for it."""
    if config.offload:
        prepare_offload(device)
    dtype = choose_dtype(config.dtype, device)
    return shard_weights(model, device, dtype, offload=config.offload)


def prepare_offload(device: torch.device) -> None:
    """Start the process group that FSDP needs, also of one GPU alone. Give AdamW the CPU's cores:
    torchrun leaves each process one thread."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.set_num_threads(max(1, usable_cores() // ranks_here))
    elif device.type == "mps":
        raise UserError("--offload: for NVIDIA's GPUs. A Mac's has the computer's memory anyway: "
                        "leave it out")
    if dist.is_initialized():
        return
    if torch.__version__ < (2, 13):     # its FSDP for one GPU is younger than the rest
        raise UserError(f"--offload on one GPU needs PyTorch 2.13, and this is "
                        f"{torch.__version__}: pip install --upgrade torch")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(dist.destroy_process_group)
