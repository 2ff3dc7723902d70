"""Many GPUs: one process (rank) for each, started by torchrun. Nothing here acts on a single GPU,
unless it offloads: then it is a group of one.

    torchrun --nproc-per-node 8 finetune.py --context-parallel 4 ...

The ranks form a grid of data x context, here 2 x 4:

                  context
                  0  1  2  3      the ranks of a line read the same rows, each a part of their
        data  0   0  1  2  3      tokens (ContextShard); another line reads other rows
              1   4  5  6  7

All eight share the weights: each rank holds an eighth of every matrix, of its gradient and of its
optimiser state, and a block's weights are put together only while it works (shard_weights: FSDP2,
PyTorch's fully_shard). Gradients are averaged, so every step is that of one GPU with all rows.
"""
import functools
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.environment import world_size
from common.errors import UserError

# ---- The ranks -----------------------------------------------------------------------------------

def join_process_group() -> tuple[int, int]:
    """(rank, world size). Joins the process group that torchrun's environment describes."""
    if world_size() == 1:
        return 0, 1
    if not dist.is_initialized():
        communication = backend()
        if torch.cuda.is_available():
            gpu, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if gpu >= gpus:
                raise UserError(f"more processes than GPUs: give torchrun --nproc-per-node {gpus}")
            torch.cuda.set_device(gpu)
        dist.init_process_group(communication)
    return dist.get_rank(), dist.get_world_size()


def backend() -> str:
    if not torch.cuda.is_available():
        return "gloo"
    if not dist.is_nccl_available():
        raise UserError("this PyTorch was built without NCCL, by which GPUs talk to each other: "
                        "install one that has it, or hide the GPUs with CUDA_VISIBLE_DEVICES=-1")
    return "cpu:gloo,cuda:nccl"     # gloo for what --offload keeps in the computer's memory


def wait_for_all_ranks() -> None:
    """Return when every process has come here. One process alone does not wait."""
    if join_process_group()[1] > 1:
        dist.barrier()


def on_any_rank(flag: bool) -> bool:
    """Whether `flag` is true in any process. Ranks have to stop after the same step: one that went
    on alone would wait for the others for ever."""
    return bool(mean_over_ranks(torch.tensor(float(flag))))


def mean_over_ranks(number: Tensor) -> Tensor:
    world = join_process_group()[1]
    if world == 1:
        return number
    total = number.clone()
    dist.all_reduce(total)
    return total / world


def of_all_ranks(value: Any) -> list[Any]:
    """What each rank has."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def of_first_rank(value: Any) -> Any:
    """What rank 0 has, on every rank."""
    return of_all_ranks(value)[0]


# ---- A text shared by several GPUs ---------------------------------------------------------------

class ContextShard:
    """The part of every text that this rank reads. (Llama 3, arXiv 2407.21783, section 3.3.2)

    A text of T tokens is cut into 2 R chunks for R ranks, and rank r has two of them, r and
    2R-1-r: late queries see more keys, and so every rank has as many pairs to compute as any other.
    With R = 2:

        chunk   0  1  2  3
        rank    0  1  1  0

    A rank computes everything for its own tokens alone, but for attention, which has to know the
    keys and values of all: they are gathered in each layer.
    """

    def __init__(self, rank: int, size: int, group: Any):
        self.rank, self.size, self.group = rank, size, group
        self.chunks = (rank, 2 * size - 1 - rank)

    def own(self, T: int) -> Tensor:
        """The places of this rank's tokens in a text of T, [T/R]."""
        assert T % (2 * self.size) == 0, "a text is cut into 2 R equal chunks"
        chunks = torch.arange(T).chunk(2 * self.size)
        return torch.cat([chunks[c] for c in self.chunks])

    def all_tokens(self, x: Tensor) -> Tensor:
        """Keys or values of this rank's tokens -> of all: [B, K, T/R, D] -> [B, K, T, D]."""
        parts = GatherParts.apply(x, self.group, self.size)                    # [R, B, K, T/R, D]
        heads, tails = parts.chunk(2, dim=3)
        return torch.cat([*heads, *reversed(tails.unbind())], dim=2)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks that share a text. Each goes backward through its own x
        alone: FSDP puts the gradients together."""
        total = x.detach().clone()
        dist.all_reduce(total, group=self.group)
        return x + (total - x.detach())


class GatherParts(torch.autograd.Function):
    """Every rank's x: [...] -> [R, ...]. Each rank used x, and so the gradients of all add up."""

    @staticmethod
    def forward(ctx, x, group, size):
        ctx.group, ctx.shape = group, x.shape
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, x.contiguous(), group)
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, dparts):
        dx = torch.empty(ctx.shape, dtype=torch.float32, device=dparts.device)
        dist.reduce_scatter(dx, list(dparts.float().unbind()), group=ctx.group)
        return dx.type_as(dparts), None, None


@functools.cache
def context_shard(size: int) -> ContextShard | None:
    """This rank's part of a text that `size` ranks share; None if none is shared. Every rank has to
    make every group, in the same order, and once only."""
    rank, world = join_process_group()
    if size == 1:
        return None
    groups = [dist.new_group(range(first, first + size)) for first in range(0, world, size)]
    return ContextShard(rank % size, size, groups[rank // size])


# ---- Weights shared by all GPUs ------------------------------------------------------------------

def shard_weights(model: torch.nn.Module, device: torch.device, dtype: torch.dtype,
                  called: str = "loss", offload: bool = False) -> torch.device:
    """Each rank keeps its rows of every weight: of N ranks, rank r has the r-th of N equal pieces.

    A block's weights are gathered for its forward pass, thrown away, and gathered again for its
    backward pass; those outside the blocks (embedding, last norm, output) stay from the one to the
    other. dtype: of a block's gathered weights; gradients are averaged in float32. called: the
    method used in place of forward(), for which FSDP gathers. offload: rows, gradients and moments
    wait in the computer's memory, and AdamW runs there. Returns the device that rows have to be on.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy,
                                        fully_shard, register_fsdp_forward_method)
    policy, kept_on = OffloadPolicy(), device
    if offload:     # pinned: copied to the GPU without a wait of the CPU
        policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        model.offloaded_from, kept_on = device, torch.device("cpu")
    mesh = init_device_mesh(device.type, (join_process_group()[1],))    # those of a row, too
    # States between blocks stay float32, as under autocast: nothing is cast on the way in.
    outside = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    in_blocks = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=in_blocks, offload_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=outside, offload_policy=policy)
    register_fsdp_forward_method(model, called)
    return kept_on


def own_rows(tensor: Tensor) -> Tensor:
    """What this rank has of a weight: all, if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all ranks, on each of them."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_sharded(model: torch.nn.Module) -> bool:
    """FSDP gives a model this method."""
    return hasattr(model, "unshard")


def own_part(weight: Tensor, place: tuple[slice, ...], stored: Tensor) -> tuple[Tensor, Tensor]:
    """(destination, source): `stored` is weight[place], and this rank may have some rows of the
    weight only. Of 8 rows, rank 1 of 2 has 4:8; of place 2:6 it copies stored[2:] to own[:2]."""
    own, rows = own_rows(weight), len(weight)
    if own is weight:
        return weight[place], stored
    rank, world = join_process_group()
    first = min(rank * math.ceil(rows / world), rows)           # of this rank
    place_start, place_stop, _ = (place[0] if place else slice(None)).indices(rows)
    start, stop = max(place_start, first), min(place_stop, first + len(own))
    if start >= stop:
        return own[:0], stored[:0]
    part = own[(slice(start - first, stop - first), *place[1:])]
    return part, stored[start - place_start:stop - place_start]


def share_rows(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Give each rank its rows of the weights that rank 0 has; the others pass {}."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True,
                                                                  broadcast_from_rank0=True))


# ---- Checkpoints ---------------------------------------------------------------------------------

def save_shards(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write weights and optimiser into a new folder, each rank what it holds."""
    import torch.distributed.checkpoint as checkpoint
    checkpoint.save(shards(model, optimizer), checkpoint_id=folder)


def load_shards(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read what save_shards wrote, with any number of ranks, one included."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
    state = shards(model, optimizer)
    checkpoint.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"], options=StateDictOptions(strict=False))


def shards(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    options = StateDictOptions(ignore_frozen_params=True)       # LoRA's base is no part of the run
    weights, state = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": state}
