"""What distance maps need of PyTorch's compiler: flex_attention, a band at a time, their fast path
on a GPU; and that it leaves the rest of them alone."""
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.key_range import KeyRange


FLEX_BLOCK = 128  # queries, and keys: flex_attention skips blocks in which nothing is seen


def flex_part(q: Tensor, k: Tensor, v: Tensor, keys: KeyRange) -> tuple[Tensor, Tensor]:
    """Attention to a range of keys: q [B, H, T, D], k and v [B, K, S, D] -> out [B, H, T, D] and
    lse [B, H, T]."""
    from torch.nn.attention.flex_attention import AuxRequest
    mask = block_mask(keys, len(q), k.shape[2])
    out, aux = flex_kernel(q.is_cuda)(q, k, v, block_mask=mask, enable_gqa=True,
                                      return_aux=AuxRequest(lse=True))
    return out, aux.lse


def block_mask(keys: KeyRange, B: int, S: int) -> Any:
    """flex_attention's BlockMask of a KeyRange. Which blocks may hold anything follows from the
    least and the greatest ends; create_block_mask would store all T x S places to find out."""
    from torch.nn.attention.flex_attention import BlockMask
    first, stop = keys.first.expand(B, -1), keys.stop.expand(B, -1)                   # [B, T]

    def is_seen(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (first[b, t] <= s) & (s < stop[b, t])

    T, begin = first.shape[1], torch.arange(0, S, FLEX_BLOCK, device=first.device)
    # The last block of queries may be a short one: what fills it sees no key.
    low, high = in_blocks(keys.first, filler=S), in_blocks(keys.stop, filler=0)
    some = (low.amin(-1) < begin + FLEX_BLOCK) & (high.amax(-1) > begin)   # [1 or B, rows, columns]
    all_seen = (low.amax(-1) <= begin) & (high.amin(-1) >= begin + FLEX_BLOCK)
    return BlockMask.from_kv_blocks(*in_order(some & ~all_seen), *in_order(all_seen), FLEX_BLOCK,
                                    is_seen, seq_lengths=(T, S))


def in_blocks(ends: Tensor, filler: int) -> Tensor:
    """A number for each query, [T] or [B, T] -> [1 or B, ceil(T / 128), 1, 128]."""
    missing = -ends.shape[-1] % FLEX_BLOCK
    return F.pad(torch.atleast_2d(ends), (0, missing), value=filler).unflatten(
        -1, (-1, 1, FLEX_BLOCK))


def in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix of blocks [B, rows, columns] as BlockMask wants it: how many are true in each row,
    and their columns, which come first: int32 [B, 1, rows] and [B, 1, rows, columns]."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1)[:, None].int(), columns[:, None].int()


def never_compiled(function: Callable) -> Callable:
    """Like torch.compiler.disable, but the compiler (2 s, 70 MB) is imported only if it is used."""
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        run = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return run(*args, **kwargs)
    return call


@functools.cache
def flex_kernel(compiled: bool) -> Callable:
    """flex_attention. Compiled it is one fused kernel; as it is, for tests, it stores all
    scores."""
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
