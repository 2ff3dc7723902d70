"""What attention has to know about positions, for every method in the same form."""
import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.distributed import ContextShard
from common.key_range import KeyRange
from common.kv_cache import KVCache
from methods.baselines import alibi_bias, xpos_scale
from methods.config import RopeConfig
from methods.distance_maps import Band, BandInputs, without_idle_bands
from methods.table import METHODS
from methods.temperatures import query_scale
from methods.training_positions import random_positions
from rope import cos_sin


class PositionInputs(NamedTuple):
    """For T tokens of a text of S tokens: its last T, or this GPU's share of it."""
    q_rope: tuple[Tensor, Tensor]   # cos and sin of the queries, [T, D/2] or [B, T, D/2]
    k_rope: tuple[Tensor, Tensor]   # of the keys: the same, but for a temperature and for xPos
    attn_bias: Tensor | None        # added to the scores, [H, 1, S] or [B, H, 1, S]: ALiBi only
    bands: list[BandInputs] | None = None    # of a distance map: rotations that take their place
    context: ContextShard | None = None      # where several GPUs share the text

    def last(self, n: int) -> "PositionInputs":
        """For the last n queries alone."""
        bands = None
        if self.bands is not None:
            bands = [band._replace(q_rope=last_rows(band.q_rope, n), keys=band.keys.last(n))
                     for band in self.bands]
        return self._replace(q_rope=last_rows(self.q_rope, n), bands=bands)


def last_rows(rope: tuple[Tensor, Tensor], n: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the last n tokens."""
    cos, sin = rope
    return cos[..., -n:, :], sin[..., -n:, :]


def inputs_of_layers(config: RopeConfig, n_layers: int, n_heads: int, frequencies: Tensor,
                     attention_factor: float, all_positions: Tensor, positions: Tensor,
                     context: ContextShard | None = None) -> list[PositionInputs]:
    """One for each layer. All are the same, unless every n-th layer is left unrotated (interleaved
    NoPE): then a temperature acts in those layers only, and the rotated ones keep the method's own
    attention_factor. An unrotated layer sees all keys, whatever the map. (Llama 4; SmolLM3)"""
    every = config.no_rope_layer_interval
    if every is None:
        inputs = position_inputs(config, n_heads, frequencies, attention_factor, all_positions,
                                 positions, config.temperature)
        return [inputs._replace(context=context)] * n_layers
    rotated = position_inputs(config, n_heads, frequencies, attention_factor, all_positions,
                              positions, temperature=None)._replace(context=context)
    unrotated = unrotated_inputs(config, frequencies, positions)._replace(context=context)
    return [rotated if (layer + 1) % every else unrotated for layer in range(n_layers)]


def position_inputs(config: RopeConfig, n_heads: int, frequencies: Tensor, attention_factor: float,
                    all_positions: Tensor, positions: Tensor, temperature: str | None = None
                    ) -> PositionInputs:
    """For the tokens at `positions` [T] or [B, T] of a text at all_positions [S] or [B, S].
    frequencies, attention_factor: what inv_freq returned. temperature: that of these layers."""
    method = METHODS[config.rope_type]
    cos, sin = cos_sin(frequencies, positions, attention_factor)
    scale = query_scale(temperature, positions, config.original_max_position_embeddings)
    q_rope, k_rope, bias, bands = (cos, sin), (cos, sin), None, None
    if method.mechanism == "decay":
        decay = xpos_scale(positions, len(frequencies), config.factor)
        q_rope, k_rope = (cos * decay, sin * decay), (cos / decay, sin / decay)
    elif method.mechanism == "bias":
        bias = alibi_bias(all_positions, n_heads, config.factor)
    elif method.mechanism == "distances":
        bands = band_inputs(config, frequencies, all_positions, positions, scale)
    return PositionInputs(scaled(q_rope, scale), k_rope, bias, bands)


def band_inputs(config: RopeConfig, frequencies: Tensor, all_positions: Tensor, positions: Tensor,
                scale: Tensor | None) -> list[BandInputs]:
    """The bands of a distance map. Keys at all_positions, queries at `positions`."""
    assert (all_positions.diff(dim=-1) > 0).all(), "a distance map needs ascending positions"
    distance_map = METHODS[config.rope_type].distance_map
    bands = distance_map(positions, all_positions, config.original_max_position_embeddings,
                         config.factor, **config.options)
    for far, near in itertools.pairwise(bands):
        assert (far.stop <= near.first).all(), "bands go from far to near, each up to the next"
    assert (bands[-1].stop == positions + 1).all(), "a query sees itself, and nothing after it"
    inputs = []
    for band in without_idle_bands(bands, all_positions):
        held, keys = keys_of(band, all_positions).held()
        q_rope = scaled(cos_sin(frequencies, band.q), scale)
        k_rope = cos_sin(frequencies, band.k[..., held])
        inputs.append(BandInputs(q_rope, k_rope, held, keys))
    return inputs


def keys_of(band: Band, n: Tensor) -> KeyRange:
    """The band's keys by their index in the text, where positions may skip (PoSE)."""
    n, first, stop = n.contiguous(), band.first.contiguous(), band.stop.contiguous()
    return KeyRange(torch.searchsorted(n, first), torch.searchsorted(n, stop))


def unrotated_inputs(config: RopeConfig, frequencies: Tensor, positions: Tensor) -> PositionInputs:
    """Of a layer without positions: all angles are 0."""
    still = cos_sin(torch.zeros_like(frequencies), positions)
    scale = query_scale(config.temperature, positions, config.original_max_position_embeddings)
    return PositionInputs(scaled(still, scale), still, None)


def scaled(q_rope: tuple[Tensor, Tensor], scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin of the queries times the temperature: it scales the rotated query."""
    if scale is None:
        return q_rope
    cos, sin = q_rope
    return cos * scale, sin * scale


def position_ids(config: RopeConfig, length: int, device: torch.device | None = None) -> Tensor:
    """Positions of a text of `length` tokens, [S]: 0, 1, 2, ...

    With config.random_positions = N a sorted random choice of 0 .. N-1, the same for every text of
    this length. (Ruoss et al. 2023, arXiv 2305.16843, who draw anew for every text)
    """
    if config.random_positions is None:
        return torch.arange(length, device=device)
    rng = np.random.default_rng(length)
    return torch.from_numpy(random_positions(rng, length, config.random_positions)).to(device)


def text_positions(config: RopeConfig, tokens: Tensor, positions: Tensor | None = None,
                   cache: KVCache | None = None) -> Tensor:
    """Positions of the whole text, the cached tokens and the new ones [B, T]: [S] or [B, S].
    positions: of the new ones, where they are given."""
    cached = cache.length if cache is not None else 0
    if positions is None:
        return position_ids(config, cached + tokens.shape[1], tokens.device)
    if cached == 0:
        return positions
    before = cache.positions.expand(len(tokens), -1)
    return torch.cat([before, positions.expand_as(tokens)], dim=1)
