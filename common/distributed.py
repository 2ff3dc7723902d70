"""Several GPUs: torchrun starts a process for each. Every process computes its rows of a step, and
the gradients are averaged."""
import os

import torch
import torch.distributed as dist


def join_process_group() -> tuple[int, int]:
    """(rank, world size). Joins the process group that torchrun's environment describes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def wait_for_all_ranks() -> None:
    """Return when every process has come here. One process alone does not wait."""
    if join_process_group()[1] > 1:
        dist.barrier()


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true in any process. Ranks have to stop after the same step: one that went
    on alone would wait for the others for ever."""
    number = torch.tensor(float(flag), device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return bool(number)


def average_over_ranks(model: torch.nn.Module, loss: torch.Tensor, world: int) -> None:
    """Average gradients and loss over the processes, in place: every rank then takes the same step
    as one process with all rows would."""
    if world == 1:
        return
    # A trained RoPE method has no gradient where it changes nothing (CLEX at t = 1): on all ranks.
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for tensor in [*gradients, loss]:
        dist.all_reduce(tensor)
        tensor /= world
