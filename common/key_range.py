"""Which keys a query sees, and the tiles of the score matrix that hold any of them.

    B  batch    T  queries    S  keys
"""
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class KeyRange(NamedTuple):
    """Query t sees the keys first[t] <= s < stop[t], which are none where the two are equal."""
    first: Tensor   # [T] or [B, T]
    stop: Tensor    # [T] or [B, T]

    def last(self, n: int) -> "KeyRange":
        """The same for the last n queries alone."""
        return KeyRange(self.first[..., -n:], self.stop[..., -n:])

    def held(self) -> tuple[slice, "KeyRange"]:
        """All keys that some query sees, perhaps more, and this range counted from the first."""
        start, end = int(self.first.min()), int(self.stop.max())
        return slice(start, end), KeyRange(self.first - start, self.stop - start)

    def is_causal(self, S: int) -> bool:
        """Whether each query sees its own key, all before it, and none after it."""
        T = self.first.shape[-1]
        own = torch.arange(S - T, S, device=self.stop.device)
        return bool((self.first == 0).all() and (self.stop == own + 1).all())

    def masked(self, rows: slice, keys: slice) -> Tensor | None:
        """True where a query of these rows does not see a key, for all heads: [1, rows, keys] or
        [B, 1, rows, keys]. None if each of them sees all, so that most tiles need no mask."""
        first, stop = self.first[..., None, rows, None], self.stop[..., None, rows, None]
        if int(first.max()) <= keys.start and keys.stop <= int(stop.min()):
            return None
        s = torch.arange(keys.start, keys.stop, device=first.device)
        return (s < first) | (s >= stop)

    def tiles(self, block_q: int, block_k: int) -> Iterator[tuple[slice, list[slice]]]:
        """All tiles in which anything is seen, perhaps more: yields (rows of q, [columns of k])."""
        T = self.first.shape[-1]
        for t in range(0, T, block_q):
            rows = slice(t, min(t + block_q, T))
            start, end = int(self.first[..., rows].min()), int(self.stop[..., rows].max())
            yield rows, [slice(s, min(s + block_k, end)) for s in range(start, end, block_k)]


class CausalRange(NamedTuple):
    """The T queries are the last of the S positions, and none sees what comes after it. The same
    as KeyRange in plain numbers, so that torch.compile knows them."""
    T: int
    S: int
    device: torch.device

    def masked(self, rows: slice, keys: slice) -> Tensor | None:
        first = self.S - self.T + rows.start                       # position of the first row
        if keys.stop - 1 <= first:                                 # on or below the diagonal
            return None
        positions = torch.arange(first, self.S - self.T + rows.stop, device=self.device)
        return (torch.arange(keys.start, keys.stop, device=self.device) > positions[:, None])[None]

    def tiles(self, block_q: int, block_k: int) -> Iterator[tuple[slice, list[slice]]]:
        for t in range(0, self.T, block_q):
            rows = slice(t, min(t + block_q, self.T))
            end = self.S - self.T + rows.stop                      # keys that the last row sees
            yield rows, [slice(s, min(s + block_k, end)) for s in range(0, end, block_k)]
