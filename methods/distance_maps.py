"""Distance maps: near tokens keep their distance, far ones are folded into the trained range.

The other methods change by which angles the pairs turn. These change how far apart two tokens are
said to be: no pair turns further than in training (or by one step at most), and nothing has to be
trained. The price is the order of far tokens: most maps put several of them at one distance.

A map cuts the keys that a query sees into *bands*. In a band the query stands at a place q(m) and
each key at a place k(n), and they are rotated there: the model sees the distance q(m) - k(n).
ReRoPE, min(m - n, w), has two:

    n             0   1   2   3   4   5          the query is at m = 5, w = 3
    band          far far far near near near
    q(m), k(n)    3,0 3,0 3,0 5,3 5,4 5,5        far: the query at w, all keys at 0
    distance       3   3   3   2   1   0

    m  positions of the queries [T] or [B, T]    n  of all keys [S] or [B, S], ascending
    L  original_window                           s  factor = L'/L

k(n) may not depend on m: a band's keys are rotated once for all queries. A map takes (m, n, L, s)
and its settings, and returns its bands from far to near: each ends at or before the start of the
next, the last at m + 1. A key in none of them is not seen. The largest distance of all has to be
seen by the last query: checks.py looks at no other. To add one: a function here, a row in table.py.
"""
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.key_range import KeyRange
from methods.flex import flex_part, never_compiled
from rope import apply_rope


class Band(NamedTuple):
    """The keys at positions first <= n < stop of each query, and where both stand."""
    first: Tensor   # [T] or [B, T]; both may be negative, and where they cross it is empty
    stop: Tensor    # [T] or [B, T]
    q: Tensor       # [T] or [B, T]: q(m)
    k: Tensor       # [S] or [B, S]: k(n), of all keys


# ---- The maps ------------------------------------------------------------------------------------


def rerope(m: Tensor, n: Tensor, original_window: int, factor: float, window: int | None = None
           ) -> list[Band]:
    """min(m - n, w): all that is far stands at the distance w, by default L/2. It reads any length,
    whatever s is. (Su 2023, kexue.fm/archives/9708)"""
    w = original_window // 2 if window is None else window
    near = Band(m - w + 1, m + 1, m, n)
    far = Band(torch.zeros_like(m), m - w + 1, torch.full_like(m, w), torch.zeros_like(n))
    return [far, near]


def leaky_rerope(m: Tensor, n: Tensor, original_window: int, factor: float,
                 window: int | None = None, stretch: float | None = None) -> list[Band]:
    """w + (m - n - w) / r beyond w: far tokens stand r times closer together, and keep their order.
    By default w = L/2, and r (`stretch`) such that L' tokens reach up to L. (Su 2023)"""
    w = original_window // 2 if window is None else window
    r = least_stretch(original_window, factor, w) if stretch is None else stretch
    near = Band(m - w + 1, m + 1, m, n)
    far = Band(torch.zeros_like(m), m - w + 1, m / r + w - w / r, n / r)
    return [far, near]


def self_extend(m: Tensor, n: Tensor, original_window: int, factor: float,
                window: int | None = None, group: int | None = None) -> list[Band]:
    """m//g + w - w//g - n//g beyond w: g neighbours share a place. It reaches (L - w) g + w tokens,
    where g divides w. By default w = L/4, and g such that L' tokens reach up to L. (Jin et al.
    2024, arXiv 2401.01325)"""
    w = original_window // 4 if window is None else window
    g = math.ceil(least_stretch(original_window, factor, w)) if group is None else group
    near = Band(m - w + 1, m + 1, m, n)
    far = Band(torch.zeros_like(m), m - w + 1, m // g + w - w // g, n // g)
    return [far, near]


def dca(m: Tensor, n: Tensor, original_window: int, factor: float, chunk: int | None = None,
        local: int | None = None) -> list[Band]:
    """Dual Chunk Attention: c distances (`chunk`, by default 3L/4), the nearest w of them exact
    (`local`, by default L/4, in the authors' code L/16). The text is cut into chunks of h = c - w
    tokens, and a key stands at n mod h. A query stands at m mod h for its own chunk; for the one
    before h further, but at most at c - 1; for all earlier ones at c - 1. (An et al. 2024, arXiv
    2402.17463)"""
    c = 3 * original_window // 4 if chunk is None else chunk
    w = original_window // 4 if local is None else local
    h = c - w
    start = m // h * h                                             # of the query's own chunk
    own = Band(start, m + 1, m % h, n % h)
    next_to_it = Band(start - h, start, (m % h + h).clamp(max=c - 1), n % h)
    earlier = Band(torch.zeros_like(m), start - h, torch.full_like(m, c - 1), n % h)
    return [earlier, next_to_it, own]


def streaming(m: Tensor, n: Tensor, original_window: int, factor: float, sinks: int = 4,
              window: int | None = None) -> list[Band]:
    """StreamingLLM: the first tokens (the sinks, on which attention rests) and the last w, as if
    nothing had been between them; by default w = L - sinks. It reads without end, and forgets.
    (Xiao et al. 2023, arXiv 2309.17453)"""
    w = max(1, original_window - sinks) if window is None else window
    recent = Band(m - w + 1, m + 1, m, n)
    end = (m - w + 1).clamp(max=sinks)        # a sink among the recent tokens is not counted twice
    sink = Band(torch.zeros_like(m), end, m.clamp(max=sinks + w - 1), n)
    return [sink, recent]


def least_stretch(original_window: int, factor: float, w: int) -> float:
    """The least r with w + (L' - w) / r <= L: the farthest of L' tokens stands at L - 1/r."""
    target = round(original_window * factor)
    return max(1.0, (target - w) / max(1, original_window - w))


# ---- From a map to what attention needs ----------------------------------------------------------


def without_idle_bands(bands: Sequence[Band], n: Tensor) -> list[Band]:
    """Drop bands in which no query sees a key, and join neighbours that use the same places: a map
    that folds nothing is then plain RoPE, bit for bit."""
    kept: list[Band] = []
    for band in bands:
        first = band.first.clamp(min=n[..., :1])
        if not (first < band.stop).any():
            continue
        before = kept[-1] if kept else None
        if before and goes_on(before, band):
            first = torch.where(before.first < before.stop, before.first, first)
            kept.pop()
        kept.append(band._replace(first=first))
    return kept


def goes_on(before: Band, band: Band) -> bool:
    """Whether a band begins, for each query, where the one before ends, and at the same places."""
    adjacent = (before.stop == band.first) | (before.first >= before.stop)
    return bool(adjacent.all() and (before.q == band.q).all() and (before.k == band.k).all())


# ---- Attention over bands: one softmax for all ---------------------------------------------------


class BandInputs(NamedTuple):
    """What attention needs of a band: its rotations, and its keys by their index."""
    q_rope: tuple[Tensor, Tensor]   # cos and sin of the queries, [T, D/2] or [B, T, D/2]
    k_rope: tuple[Tensor, Tensor]   # and of the keys in `held`
    held: slice                     # of the text: the keys that any query sees in this band
    keys: KeyRange                  # those that each query sees, counted from the first one held


@never_compiled  # its tiles depend on numbers in tensors; flex_attention compiles itself
def attention_in_bands(q: Tensor, k: Tensor, v: Tensor, bands: Sequence[BandInputs],
                       implementation: str, attention: Callable, tiled: Callable) -> Tensor:
    """q [B, H, T, D], k and v [B, K, S, D], not yet rotated -> [B, H, T, D]. auto: tiled on a CPU,
    flex_attention on a GPU (as is sdpa). `attention` and `tiled` are handed in by model.py."""
    if len(bands) == 1 and bands[0].keys.is_causal(k.shape[2]):                # nothing is folded
        return attention(*in_band(q, k, v, bands[0]), None, implementation)
    if implementation == "naive":
        return naive_in_bands(q, k, v, bands)
    assert implementation != "sdpa" or q.is_cuda, "sdpa merges no bands on a CPU: choose tiled"
    if q.is_cuda and implementation != "tiled":
        parts = [flex_part(*in_band(q, k, v, band), band.keys) for band in bands]
    else:
        block_k = 256 * 256 // min(q.shape[2], 256)                            # few queries: wide
        parts = [tiled(*in_band(q, k, v, band), None, band.keys, 256, block_k) for band in bands]
    return merge_outputs(*zip(*parts))


def in_band(q: Tensor, k: Tensor, v: Tensor, band: BandInputs) -> tuple[Tensor, Tensor, Tensor]:
    """q and k as the band rotates them, k and v as far as it holds them."""
    k, v = k[:, :, band.held], v[:, :, band.held]
    return apply_rope(q, *band.q_rope), apply_rope(k, *band.k_rope), v


def naive_in_bands(q: Tensor, k: Tensor, v: Tensor, bands: Sequence[BandInputs]) -> Tensor:
    """The definition: each pair of query and key has the score of its band, -inf if it is in none.
    """
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    scores = torch.full((B, H, T, S), -torch.inf, device=q.device)
    for band in bands:
        q_band, k_band, _ = in_band(q, k, v, band)
        k_band = k_band.repeat_interleave(H // K, dim=1)
        of_band = (q_band @ k_band.transpose(-2, -1)).float() / math.sqrt(D)   # [B, H, T, held]
        masked = band.keys.masked(slice(0, T), slice(0, of_band.shape[-1]))
        if masked is not None:
            of_band = of_band.where(~masked, scores[..., band.held])
        scores = scores.slice_scatter(of_band, -1, band.held.start, band.held.stop)
    return scores.softmax(dim=-1).type_as(v) @ v.repeat_interleave(H // K, dim=1)


def merge_outputs(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
    """One softmax over all bands from that of each: its output out_b [B, H, T, D] and lse_b
    [B, H, T], the logarithm of its denominator:

        out = sum_b exp(lse_b - lse) out_b        lse = ln sum_b exp(lse_b)
    """
    shares = torch.stack(list(lses)).softmax(dim=0)                            # [bands, B, H, T]
    weighted = [share[..., None] * out.float() for share, out in zip(shares, outputs)]
    return sum(weighted).type_as(outputs[0])
