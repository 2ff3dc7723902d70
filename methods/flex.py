"""The fast path of distance maps on a GPU: PyTorch's flex_attention, a band at a time."""
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from common.key_range import KeyRange


def flex_part(q: Tensor, k: Tensor, v: Tensor, keys: KeyRange) -> tuple[Tensor, Tensor]:
    """Attention to a range of keys: q [B, H, T, D], k and v [B, K, S, D] -> out [B, H, T, D] and
    lse [B, H, T]. Blocks of the score matrix in which nothing is seen cost nothing."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask
    first, stop = keys.first.expand(len(q), -1), keys.stop.expand(len(q), -1)         # [B, T]

    def is_seen(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (first[b, t] <= s) & (s < stop[b, t])

    rows = len(q) if keys.first.dim() == 2 else None                # None: one mask for the batch
    mask = create_block_mask(is_seen, rows, None, q.shape[2], k.shape[2], device=str(q.device))
    out, aux = flex_kernel(q.is_cuda)(q, k, v, block_mask=mask, enable_gqa=True,
                                      return_aux=AuxRequest(lse=True))
    return out, aux.lse


@functools.cache
def flex_kernel(compiled: bool) -> Callable:
    """flex_attention. Compiled it is one fused kernel; as it is, for tests, it stores all
    scores."""
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
