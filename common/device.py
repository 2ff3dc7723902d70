"""The device, its precision, and how both are named in headers and results."""
import contextlib
import ctypes
import math
import os
from collections.abc import Iterator

import torch

from common.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. A missing device is a UserError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if not available.get(name.split(":")[0], False):
        here = ", ".join(kind for kind in ("cpu", "cuda", "mps") if available[kind])
        raise UserError(f"--device {name}: this machine has {here}; use one of them")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no name of a device; write cpu, cuda, cuda:1 or mps") \
            from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, the "
                        "first of which is cuda:0")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a CUDA device that computes in it, else float32."""
    if name == "auto":
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        name = "bfloat16" if bfloat16 else "float32"
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def memory_per_rank(device: torch.device) -> float:
    """Bytes that this process may use: its GPU's, or an equal share of the machine's. Infinite
    where it cannot be asked for (Windows)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return math.inf
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one.

    By default it returns large blocks to the kernel, and each step has to fault them in again, page
    by page: 100,000 page faults, a tenth to a fifth of a step in bfloat16, less in float32. Kept,
    they take up to a tenth more memory.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)          # a large tensor gets no mapping of its own
        library.mallopt(M_TRIM_THRESHOLD, -1)   # and the heap never shrinks


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> 'float32'"""
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """torch.set_float32_matmul_precision(highest, high or medium) for the block only."""
    before = None
    # RuntimeError: somebody set PyTorch's newer switches, one for each backend. They stay.
    with contextlib.suppress(RuntimeError):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        if before:
            torch.set_float32_matmul_precision(before)


def describe_device(device: torch.device) -> str:
    """'cuda (NVIDIA H100 80GB HBM3)' or 'cpu (2 threads)'"""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({torch.get_num_threads()} threads)"
