"""Counts bytes and products while code runs: "memory grows linearly" and "masked tiles are skipped"
are measured with it."""
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Meter(TorchDispatchMode):
    """Inside `with Meter() as meter:` every tensor that an operation returns is watched until its
    memory is freed.

    peak      bytes of such tensors alive at the same time, at most; tensors that existed before do
              not count
    largest   bytes of the largest of them
    products  multiply-adds of mm, bmm and baddbmm; those of a fused kernel are not seen

    It sees what PyTorch allocates for results, forward and backward, not the scratch memory inside
    one kernel. The backward pass of the CPU runs in the caller's thread and is seen too; on CUDA
    see peak_bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.alive = {}, 0
        self.peak, self.largest, self.products = 0, 0, 0

    def __torch_dispatch__(self, function: Any, types: tuple, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        # a view or an in-place result is nothing new
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(out):
            if storage._cdata not in given:
                self.watch(storage)
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm", "baddbmm"):
            a, b = args[-2:]
            self.products += math.prod(a.shape) * b.shape[-1]
        return out

    def watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.live or storage.nbytes() == 0:
            return
        size = storage.nbytes()
        self.live[key] = weakref.ref(storage, lambda _: self.forget(key, size))
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self.largest = max(self.largest, size)

    def forget(self, key: int, size: int) -> None:
        del self.live[key]
        self.alive -= size


def storages(tree: Any) -> list[torch.UntypedStorage]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def peak_bytes(run: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Peak memory in bytes of run() above what is allocated before: by the Meter, or by CUDA's own
    counter where device is a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with Meter() as meter:
        run()
    return meter.peak
