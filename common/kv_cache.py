"""The key/value cache: a new token is computed without reading the text before it again.

    B  batch    T  new tokens    S  all tokens    K  key/value heads    D  head_dim
"""
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError


class KVCache:
    """Rotated keys and values of the tokens so far, for all layers, in memory reserved once. (Under
    a distance map, whose bands rotate them anew, the keys are not rotated.)

    It also remembers the tokens, their positions and the angles in use. Where angles change with
    the length (dynamic NTK) a change makes all of it stale: the keys, which were rotated by the old
    angles, and from the second layer on the values too, as they come from states that saw those
    keys. LLaMA.forward then reads the whole text anew.
    """

    def __init__(self, config: Any, batch: int, capacity: int,
                 device: torch.device | None = None, dtype: torch.dtype = torch.float32):
        shape = config.n_layers, batch, config.n_kv_heads, capacity, config.head_dim
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.tokens = torch.empty(batch, capacity, device=device, dtype=torch.long)
        self.capacity = capacity
        self.length = 0

    def add_tokens(self, tokens: Tensor, positions: Tensor, frequencies: Tensor,
                   attention_factor: float) -> None:
        """Make room for T more tokens [B, T]. positions: of the whole text, [S] or [B, S], whose
        keys are rotated by `frequencies` and `attention_factor`."""
        end = self.require_room(tokens)
        assert self.length == 0 or torch.equal(frequencies, self.frequencies), \
            "the angles have changed: call forward(), which reads the whole text anew"
        self.tokens[:, self.length:end] = tokens
        self.length = end
        self.positions = positions
        self.frequencies, self.attention_factor = frequencies, attention_factor

    def require_room(self, tokens: Tensor) -> int:
        """The length of the text with T more tokens [B, T]."""
        end = self.length + tokens.shape[1]
        if end > self.capacity:
            raise UserError(f"the cache holds {self.capacity} tokens and {end} are needed: ask for "
                            "fewer new tokens")
        return end

    def restart(self, tokens: Tensor) -> Tensor:
        """Empty the cache. Returns the whole text, its tokens and the new ones, to be read anew."""
        self.require_room(tokens)
        text = torch.cat([self.tokens[:, :self.length], tokens], dim=1)                 # [B, S]
        self.length = 0
        return text

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`, so that others can follow these."""
        self.length = length
        self.positions = self.positions[..., :length]

    def is_stale(self, positions: Tensor, frequencies: Tensor, attention_factor: float) -> bool:
        """Whether a longer text, of which this is the beginning, has other positions or angles."""
        same_positions = bool((positions[..., :self.length] == self.positions).all())
        same_frequencies = torch.equal(frequencies, self.frequencies)
        same_factor = attention_factor == self.attention_factor
        return not (same_positions and same_frequencies and same_factor)

    def add_keys(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values [B, K, T, D] of the last T tokens in one layer. Returns those
        of all tokens, [B, K, S, D]."""
        new = slice(self.length - k.shape[2], self.length)
        self.k[layer, :, :, new] = k.detach()
        self.v[layer, :, :, new] = v.detach()
        return self.k[layer, :, :, :self.length], self.v[layer, :, :, :self.length]
