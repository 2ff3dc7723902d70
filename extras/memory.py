"""Is the arithmetic of --dry-run right? Peak memory of a training's processes, measured beside it.

    python extras/memory.py                               # 300M parameters; 1, 2 and 4 processes
    python extras/memory.py --dim 256 --n-layers 8 --processes 1 --row-length 1024 --recompute
    python extras/memory.py --model out/smollm2/smollm2-135m-instruct.gguf --lora-rank 8 \\
        --processes 1 --batch-size 4 --row-length 1024 --dtype bfloat16

Two steps on random tokens. The second is measured: it has AdamW's moments, and no process holds the
whole model any more, as before it is shared. On a CPU the resident memory counts (VmHWM, Linux
only), without what a tiny training in the same process leaves; on CUDA what PyTorch allocates at
most. A positive error is an estimate that is too high.
"""
import contextlib
import dataclasses
import io
import os
import re
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the core lies one folder up

import torch
import torch.multiprocessing as mp
from torch import Tensor

from common.cli import field, parse, run_command
from common.device import choose_device, choose_dtype, describe_device, dtype_name
from common.distributed import join_process_group, wait_for_all_ranks
from common.environment import command_line, versions
from common.errors import UserError
from common.files import check_output, write_json
from finetune import FinetuneConfig
from methods.lora import add_lora, lora_of_flags
from model import LLaMA, ModelConfig
from train import fit
from training.memory import GIB, training_memory
from training.plan import plan_of
from training.run import validate_settings
from weights import load_config
from weights.size import parameter_count

PROC_STATUS = Path("/proc/self/status")


@dataclass
class MemoryConfig:
    processes: list[int] = field([1, 2, 4], "numbers of processes, one after another")
    model: str = field("", "take the shape of this model, in place of the five flags that follow")
    dim: int = field(1024, "model width C")
    n_layers: int = field(18, "blocks")
    n_heads: int = field(16, "query heads H")
    n_kv_heads: int | None = field(None, "key/value heads K [n_heads]")
    vocab_size: int = field(32000, "tokens that the model knows")
    lora_rank: int = field(0, "train by LoRA with this rank; 0 trains everything")
    row_length: int = field(512, "tokens of a row")
    batch_size: int = field(1, "rows per micro-batch and device")
    accumulate: int = field(2, "micro-batches per optimiser step")
    context_parallel: int = field(1, "processes that share the tokens of a row")
    recompute: bool = field(False, "as in training")
    attention: str = field("auto", "as in training", choices=["auto", "naive", "tiled", "sdpa"])
    dtype: str = field("float32", "of the matrix products", choices=["float32", "bfloat16"])
    device: str = field("auto", "auto, cpu or cuda")
    out: str = field("out/memory.json", "JSON file to write")


class Measured(Exception):
    """Ends a training before it is saved: to write gigabytes is not what is measured."""


def shape_of(c: MemoryConfig) -> ModelConfig:
    if c.model:
        return dataclasses.replace(load_config(c.model), max_seq_len=c.row_length)
    return ModelConfig(dim=c.dim, n_layers=c.n_layers, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads,
                       vocab_size=c.vocab_size, max_seq_len=c.row_length)


def settings_of(c: MemoryConfig) -> FinetuneConfig:
    """The settings that training and arithmetic share."""
    return FinetuneConfig(steps=2, lr=1e-4, warmup=0, eval_every=1, batch_size=c.batch_size,
                          accumulate=c.accumulate, context_parallel=c.context_parallel,
                          recompute=c.recompute, attention=c.attention, dtype=c.dtype,
                          device=c.device, lora_rank=c.lora_rank)


def join_ranks(rank: int, world: int, port: int) -> None:
    """What torchrun does for a process, here for one of this computer's."""
    os.environ.update(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(max(1, torch.get_num_threads() // world))
    join_process_group()


def measure(rank: int, c: MemoryConfig, world: int, port: int, folder: str) -> None:
    """Train in one of `world` processes, and write its peak in bytes to FOLDER/peak-RANK."""
    join_ranks(rank, world, port)
    device = choose_device(c.device)
    tiny = dataclasses.replace(c, model="", dim=64, n_layers=1, n_heads=1, n_kv_heads=1,
                               vocab_size=64, row_length=16 * world)
    second_step_peak(tiny, device, folder)     # loads what PyTorch loads at its first use
    before = memory_in_use(device)
    peak = second_step_peak(c, device, folder) - before
    Path(folder, f"peak-{rank}").write_text(str(peak), encoding="utf-8")
    wait_for_all_ranks()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def second_step_peak(c: MemoryConfig, device: torch.device, folder: str) -> int:
    """Bytes that this process holds at most during the second step of a training."""
    shape = shape_of(c)

    def random_rows(step: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * step + first)
        tokens = torch.randint(shape.vocab_size, (last - first, c.row_length + 1),
                               generator=generator)
        return tokens[:, :-1], tokens[:, 1:]

    peaks = []

    def after_step(model: LLaMA) -> dict[str, float]:
        wait_for_all_ranks()
        peaks.append(peak_memory(device))
        if len(peaks) == 2:
            raise Measured
        forget_peak(device)
        return {"peak_gib": peaks[0] / GIB}

    model = LLaMA(shape).to(device)
    config = dataclasses.replace(settings_of(c), out=str(Path(folder, f"run-{shape.dim}")))
    if c.lora_rank:
        add_lora(model, lora_of_flags(config))
    with contextlib.suppress(Measured), contextlib.redirect_stdout(io.StringIO()):
        fit(model, config, random_rows, after_step, progress=False)
    return peaks[1]


def memory_in_use(device: torch.device) -> int:
    """Bytes now: resident, or on CUDA allocated."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return kilobytes("VmRSS") * 1024


def forget_peak(device: torch.device) -> None:
    """The peak is looked for from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")    # see man 5 proc


def peak_memory(device: torch.device) -> int:
    """Bytes at most since then."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return kilobytes("VmHWM") * 1024


def kilobytes(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", PROC_STATUS.read_text(encoding="utf-8"))[1])


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def measure_processes(c: MemoryConfig, world: int) -> list[int]:
    """The peak of each of `world` processes, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, args=(c, world, free_port(), folder), nprocs=world)
        return [int(Path(folder, f"peak-{rank}").read_text("utf-8")) for rank in range(world)]


def check(c: MemoryConfig, device: torch.device) -> None:
    """A UserError for what cannot be measured here."""
    check_output(c.out)
    if device.type == "mps" or device.type == "cpu" and not PROC_STATUS.exists():
        raise UserError("memory is measured on Linux (/proc/self/status) and on CUDA only")
    validate_settings(settings_of(c))
    if c.lora_rank < 0:
        raise UserError(f"--lora-rank {c.lora_rank}: has to be at least 1; 0 is no LoRA")
    chunks = 2 * c.context_parallel if c.context_parallel > 1 else 1
    if min(c.context_parallel, c.row_length) < 1 or c.row_length % chunks:
        raise UserError(f"--context-parallel {c.context_parallel}, --row-length {c.row_length}: "
                        "give numbers from 1 on, and rows that can be cut into two chunks for each "
                        "process that shares them")
    if min(c.processes) < 1:
        raise UserError(f"--processes {min(c.processes)}: has to be at least 1")
    if device.type == "cuda" and max(c.processes) > torch.cuda.device_count():
        raise UserError(f"--processes {max(c.processes)}: here are {torch.cuda.device_count()} "
                        "GPUs, one for each process")
    for world in c.processes:
        if world % c.context_parallel:
            raise UserError(f"--context-parallel {c.context_parallel} does not divide --processes "
                            f"{world}")


def compare_with_estimate(c: MemoryConfig, dtype: torch.dtype, world: int) -> dict[str, Any]:
    config = dataclasses.replace(settings_of(c), gpus=world)
    memory = training_memory(shape_of(c), plan_of(shape_of(c), config, dtype, c.row_length))
    peaks = measure_processes(c, world)
    return {"processes": world, "estimate": memory.peak, "measured": max(peaks), "peaks": peaks,
            "error": memory.peak / max(peaks) - 1, "parts": dataclasses.asdict(memory)}


def main(argv: Sequence[str] | None = None) -> None:
    c = parse(MemoryConfig, __doc__, argv)
    device = choose_device(c.device)
    check(c, device)
    dtype = choose_dtype(c.dtype, device)
    print(f"device     {describe_device(device)}, {dtype_name(dtype)}\n"
          f"model      {parameter_count(shape_of(c)):,} parameters, {c.accumulate} x "
          f"{c.batch_size} rows x {c.row_length} tokens a step")
    # Without it glibc keeps freed tensors of up to 32 MiB, which then count as resident.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    rows = []
    for world in c.processes:
        row = compare_with_estimate(c, dtype, world)
        print(f"{world} process{'es' if world > 1 else '':<4} estimate "
              f"{row['estimate'] / GIB:6.2f} GiB   measured {row['measured'] / GIB:6.2f} GiB   "
              f"error {row['error']:+.1%}", flush=True)
        rows.append(row)
    write_json(c.out, {"memory": rows, "settings": dataclasses.asdict(c),
                       "parameters": parameter_count(shape_of(c)),
                       "device": describe_device(device), "versions": versions(),
                       "command": command_line()})
    print(f"wrote {c.out}")


if __name__ == "__main__":
    run_command(main)
