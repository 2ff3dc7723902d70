"""LLaMA 1, 2 and 3 in one file: configuration, attention three ways, key/value cache, blocks, model, loss, generation.

    B  batch         T  query length      H  query heads        D  head_dim        V  vocabulary
    G  H / K         S  key length        K  key/value heads    C  width (`dim`)   F  feed-forward width

Module and tensor names are Meta's (`tok_embeddings`, `layers.N.attention.wq`, `feed_forward.w1`, ...), so that official
checkpoints load with no renaming.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from cli import UserError
from positions import position_ids, where
from rope import RopeConfig, apply_rope, depends_on_length, inv_freq, learned


@dataclass
class ModelConfig:
    """The shape of a LLaMA. Field names are those of Meta's params.json."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None             # fewer than n_heads: grouped-query attention; None: as many as n_heads
    vocab_size: int = 32000
    multiple_of: int = 256                    # the feed-forward width is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None   # and scaled by this before (LLaMA 2 70B, LLaMA 3)
    norm_eps: float = 1e-5
    max_seq_len: int = 2048                   # the window the weights were trained for, L' after an extension
    rope: RopeConfig = field(default_factory=RopeConfig)
    tied: bool = False                        # the output projection is the embedding
    head_dim: int | None = None               # D, where it is not dim / n_heads
    ffn_dim: int | None = None                # F, where it does not follow from Meta's rule

    def __post_init__(self):
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool) or getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)!r}: has to be a positive whole number")
        if self.head_dim is None:
            if self.dim % self.n_heads or self.dim // self.n_heads % 2:
                raise UserError(f"dim {self.dim} / n_heads {self.n_heads}: has to be an even whole number, the head_dim that RoPE pairs up")
            self.head_dim = self.dim // self.n_heads
        if self.ffn_dim is None:
            self.ffn_dim = self.metas_ffn_dim()
        for name, least in (("head_dim", 2), ("ffn_dim", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least or name == "head_dim" and value % 2:
                raise UserError(f"{name} = {value!r}: has to be a positive whole number{', and even' if name == 'head_dim' else ''}")
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads {self.n_heads} has to be a multiple of n_kv_heads {self.n_kv_heads}")

    def metas_ffn_dim(self):
        """Meta's rule: two thirds of 4C (SwiGLU has three matrices), scaled, rounded up to multiple_of."""
        width = int(8 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of

    def parameters(self):
        """Number of parameters: embeddings, and per layer wq and wo, wk and wv, the three feed-forward matrices, two norms; and CLEX's."""
        layer = 2 * self.dim * (self.n_heads + self.n_kv_heads) * self.head_dim + 3 * self.dim * self.ffn_dim + 2 * self.dim
        with torch.device("meta"):
            network = learned(self.rope, self.head_dim)
        extra = sum(p.numel() for p in network.parameters()) if network else 0
        return (1 if self.tied else 2) * self.vocab_size * self.dim + self.n_layers * layer + self.dim + extra

    def flops_per_token(self, seq_len, training=True):
        """Floating-point operations per token at length T, matrix products only: 2 per weight of every matrix but the embedding
        table, plus q.k and p.v over the (T+1)/2 keys that a causal token sees on average, 4 H D (T+1)/2 a layer. The backward pass
        costs twice the forward, so training is 3 times this (4 times with recompute)."""
        matrices = self.parameters() - (0 if self.tied else self.vocab_size * self.dim) - (2 * self.n_layers + 1) * self.dim
        forward = 2 * matrices + 4 * self.n_layers * self.n_heads * self.head_dim * (seq_len + 1) / 2
        return int(3 * forward if training else forward)

    def training_bytes(self, rows, seq_len, dtype=torch.float32, recompute=False, attention="sdpa"):
        """Estimated memory of a training step in bytes: fp32 weights, gradients and two AdamW moments (16 bytes a parameter), and
        what the backward pass keeps: per layer and token about 9C + 3KD + 4F values (inputs of the norms, of the matrices and of
        the products); naive attention adds HT a layer, and 3HT once; with recompute only C a layer. Good to about 30 %."""
        size = torch.empty((), dtype=dtype).element_size()
        layer = (9 * self.dim + 3 * self.n_kv_heads * self.head_dim + 4 * self.ffn_dim) * size
        if attention == "naive":
            layer += self.n_heads * seq_len * 4
        kept = self.n_layers * self.dim * 4 + layer if recompute else self.n_layers * layer
        kept += 3 * self.n_heads * seq_len * 4 if attention == "naive" else 0
        logits = 3 * 4 * min(LOSS_CHUNK, rows * seq_len * self.vocab_size)
        return 16 * self.parameters() + rows * seq_len * kept + logits


# ---------------------------------------------------------------------------------------------------------------------
# Attention: one signature, three implementations. q [B, H, T, D], k and v [B, K, S, D] -> [B, H, T, D].
#
# Attention is causal, and the T queries are the last T of the S positions: query t sits at position S-T+t and sees keys
# 0 .. S-T+t. T = S in training, T = 1 when generating with a cache. Query head h reads key head h // G.
# `bias` is added to the scaled scores: any shape that broadcasts to [B, H, T, S]. It is a constant; no gradient reaches it.


def naive_attention(q, k, v, bias=None):
    """The definition: softmax(q k^T / sqrt(D) + bias) v. Memory and time grow with T * S. (Vaswani et al. 2017)"""
    T, S, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)            # [B, K, S, D] -> [B, H, S, D]
    scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(q.shape[-1])            # [B, H, T, S]
    if bias is not None:
        scores = scores + relative(bias, T, S)
    future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1).type_as(v) @ v


def relative(bias, T, S):
    """A bias [.., T or 1, S] less what each query's own key has: softmax is the same, and near keys keep all their digits in any dtype."""
    bias = bias.float().expand(*bias.shape[:-2], T, S)
    return bias - bias.diagonal(S - T, -2, -1).clamp(min=-1e30)[..., None]


def sdpa_attention(q, k, v, bias=None):
    """PyTorch's fused kernels. In training (T = S, no bias) there is no mask tensor, which would rule the flash kernel out."""
    T, S, groups = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    if groups and q.is_cuda and q.dtype == torch.float32:                          # flash takes no float32 and the memory-efficient kernel
        k, v, groups = *(x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v)), False  # no groups: all scores would be stored
    mask, causal = None, T == S
    if bias is not None:
        future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        mask, causal = relative(bias, T, S).masked_fill(future, -torch.inf).to(q.dtype), False   # [.., T, S]
    elif T != S and T > 1:                                                         # is_causal would align the diagonal with key 0
        from torch.nn.attention.bias import causal_lower_right                     # here, as it imports the compiler: 2 s and 70 MB
        mask = causal_lower_right(T, S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups)


class TiledAttention(torch.autograd.Function):
    """The flash algorithm, written to be read. (Dao et al. 2022, arXiv 2205.14135; Dao 2023, arXiv 2307.08691)

    A row of scores is never stored. Keys come in tiles; each row carries its running maximum m, the running sum l of
    exp(score - m), and the running output acc. When a tile raises the maximum from m to m', what was summed before is
    scaled by exp(m - m'):

        l   <- exp(m - m') l   + sum_j exp(s_j - m')
        acc <- exp(m - m') acc + sum_j exp(s_j - m') v_j          finally   out = acc / l,   lse = m + ln l

    Backward recomputes each tile's p = exp(s - lse), from which, with delta = sum_d dout * out (one number a row),

        dv += p^T dout      ds = p * (dout v^T - delta)      dq += ds k / sqrt(D)      dk += ds^T q / sqrt(D)

    Memory is linear in T both ways. The G query heads that share a key head are rows of the same tile: keys are not repeated.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, block_q, block_k):
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)                 # [B, H, T]
        for rows, key_tiles in causal_tiles(q.shape[2], k.shape[2], block_q, block_k):
            q_tile = fold(q, rows, k.shape[1])                                               # [B, K, G*bq, D]
            m = torch.full_like(q_tile[..., :1], torch.finfo(torch.float32).min, dtype=torch.float32)
            l, acc = torch.zeros_like(m), torch.zeros_like(q_tile, dtype=torch.float32)
            for keys in key_tiles:
                scores = tile_scores(q_tile, k[:, :, keys], bias, rows, keys, q.shape, k.shape)  # [B, K, G*bq, bk]
                m_new = torch.maximum(m, scores.amax(dim=-1, keepdim=True))
                p, shrink = torch.exp(scores - m_new), torch.exp(m - m_new)
                l = shrink * l + p.sum(dim=-1, keepdim=True)
                acc = shrink * acc + (p.type_as(v) @ v[:, :, keys]).float()
                m = m_new
            out[:, :, rows] = unfold(acc / l, q.shape).type_as(q)
            lse[:, :, rows] = unfold(m + l.log(), q.shape)[..., 0]
        ctx.save_for_backward(q, k, v, out, lse, bias)
        ctx.blocks = block_q, block_k
        return out

    @staticmethod
    @once_differentiable  # a second derivative would miss that lse depends on q and k: an error, not a wrong number
    def backward(ctx, dout):
        q, k, v, out, lse, bias = ctx.saved_tensors
        K, scale = k.shape[1], 1 / math.sqrt(q.shape[-1])
        delta = (dout.float() * out.float()).sum(dim=-1)                                     # [B, H, T]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for rows, key_tiles in causal_tiles(q.shape[2], k.shape[2], *ctx.blocks):
            q_tile, dout_tile = fold(q, rows, K), fold(dout, rows, K).type_as(v)             # [B, K, G*bq, D]
            lse_tile, delta_tile = fold(lse[..., None], rows, K), fold(delta[..., None], rows, K)  # [B, K, G*bq, 1]
            dq_tile = torch.zeros_like(q_tile, dtype=torch.float32)
            for keys in key_tiles:
                p = torch.exp(tile_scores(q_tile, k[:, :, keys], bias, rows, keys, q.shape, k.shape) - lse_tile)
                dv[:, :, keys] += (p.type_as(v).transpose(-2, -1) @ dout_tile).float()
                dp = (dout_tile @ v[:, :, keys].transpose(-2, -1)).float()
                ds = (p * (dp - delta_tile)).type_as(q)
                dq_tile += (ds @ k[:, :, keys]).float() * scale
                dk[:, :, keys] += (ds.transpose(-2, -1) @ q_tile).float() * scale
            dq[:, :, rows] = unfold(dq_tile, q.shape).type_as(q)
        return dq, dk.type_as(k), dv.type_as(v), None, None, None


def causal_tiles(T, S, block_q, block_k):
    """Tiles that a causal mask leaves something of: yields (rows of q, [columns of k]). Tiles above the diagonal are never visited."""
    for t in range(0, T, block_q):
        rows = slice(t, min(t + block_q, T))
        visible = S - T + rows.stop                                                          # keys that the last of these rows sees
        yield rows, [slice(s, min(s + block_k, visible)) for s in range(0, visible, block_k)]


def fold(x, rows, K):
    """Query rows of the G heads that share a key head, as rows of one matrix: [B, H, T, D] -> [B, K, G*bq, D]."""
    return x[:, :, rows].unflatten(1, (K, -1)).flatten(2, 3)


def unfold(x, shape):
    """The inverse of fold: [B, K, G*bq, D] -> [B, H, bq, D]."""
    return x.unflatten(2, (shape[1] // x.shape[1], -1)).flatten(1, 2)


def tile_scores(q_tile, k_tile, bias, rows, keys, q_shape, k_shape):
    """Scaled, biased and masked scores of one tile in float32: [B, K, G*bq, bk]."""
    (B, H, T, D), (K, S) = q_shape, k_shape[1:3]
    scores = (q_tile @ k_tile.transpose(-2, -1)).float() / math.sqrt(D)
    if bias is not None:
        bias = bias.float().expand(B, H, T, S)                                               # copies nothing
        own = bias.diagonal(S - T, -2, -1)[:, :, rows, None].clamp(min=-1e30)                # see relative()
        scores = scores + fold(bias[:, :, rows, keys] - own, slice(None), K)
    if keys.stop - 1 > S - T + rows.start:                                                   # only tiles on the diagonal need a mask
        position = torch.arange(S - T + rows.start, S - T + rows.stop, device=scores.device).repeat(H // K)
        future = torch.arange(keys.start, keys.stop, device=scores.device) > position[:, None]
        scores = scores.masked_fill(future, -torch.inf)
    return scores


def tiled_attention(q, k, v, bias=None, block_q=128, block_k=128):
    return TiledAttention.apply(q, k, v, bias, block_q, block_k)


ATTENTION = {"naive": naive_attention, "tiled": tiled_attention, "sdpa": sdpa_attention}


def attention(q, k, v, bias=None, implementation="auto", block_q=128, block_k=128):
    """Causal attention by one of the above; `auto` is sdpa. The block sizes are tiled's."""
    if implementation not in ("auto", *ATTENTION):
        raise UserError(f"attention '{implementation}' is unknown: choose auto, {', '.join(ATTENTION)}")
    assert q.shape[2] <= k.shape[2], "more queries than keys: q are the last T of the S positions"
    bias = None if bias is None else bias.detach()
    if implementation == "tiled":
        return tiled_attention(q, k, v, bias, block_q, block_k)
    return ATTENTION["sdpa" if implementation == "auto" else implementation](q, k, v, bias)


# ---------------------------------------------------------------------------------------------------------------------
# Key/value cache


class KVCache:
    """Rotated keys and values of the tokens so far, for all layers, in memory reserved once.

    It also remembers the tokens, their positions and the angles in use. Where angles change with the length (dynamic methods) everything
    in the cache is out of date after a change: the keys, which were turned by the old ones, and from the second layer on the values too,
    which come from hidden states made with them. Then LLaMA.hidden computes the whole text anew.
    """

    def __init__(self, config, batch, capacity, device=None, dtype=torch.float32):
        shape = config.n_layers, batch, config.n_kv_heads, capacity, config.head_dim
        self.k, self.v = torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype)
        self.tokens = torch.empty(batch, capacity, device=device, dtype=torch.long)
        self.length, self.capacity, self.positions, self.angles = 0, capacity, None, None

    def append(self, tokens, positions):
        """Make room for T more tokens [B, T] at `positions`, theirs or those of the whole text: [T], [B, T] or [S]. Returns the tokens and
        the positions of the whole text, [B, S] each."""
        start, end = self.length, self.length + tokens.shape[1]
        if end > self.capacity:
            raise UserError(f"the cache holds {self.capacity} tokens and {end} are needed: ask for fewer new tokens")
        self.tokens[:, start:end], self.length = tokens, end
        positions = positions.expand(len(tokens), -1)
        if positions.shape[1] < end:
            positions = torch.cat([self.positions, positions], dim=1)
        return self.tokens[:, :end], positions

    def outdated(self, positions, frequencies, attention_factor):
        """Whether what is cached was turned by other frequencies than these, which are remembered, and so are the positions."""
        before, (self.positions, *self.angles) = self.angles, (positions, frequencies, attention_factor)
        return before is not None and not (torch.equal(before[0], frequencies) and before[1] == attention_factor)

    def update(self, layer, k, v):
        """Store the keys and values [B, K, T, D] of the last T tokens in one layer; returns those of all tokens, [B, K, S, D]."""
        new = slice(self.length - k.shape[2], self.length)
        self.k[layer, :, :, new], self.v[layer, :, :, new] = k.detach(), v.detach()
        return self.k[layer, :, :, :self.length], self.v[layer, :, :, :self.length]


# ---------------------------------------------------------------------------------------------------------------------
# The model


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32. (Zhang & Sennrich 2019)"""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: q and k are rotated, v is not."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x, where, layer=None, cache=None, implementation="auto", queries=None):
        """x [B, T, C] -> [B, T, C]. where: what there is to know of x's positions; layer: its number, by which the cache keeps keys and
        values; queries: only the last so many tokens ask, all of them answer -> [B, queries, C]."""
        queries = x.shape[1] if queries is None else queries
        q, k, v = (w(part).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)      # [B, H, queries, D], [B, K, T, D] twice
                   for w, part in ((self.wq, x[:, -queries:]), (self.wk, x), (self.wv, x)))
        q, k = apply_rope(q, *(t[..., -queries:, :] for t in where.q)), apply_rope(k, *where.k)
        if cache is not None:
            k, v = cache.update(layer, k, v)                                       # [B, K, T, D] -> [B, K, S, D]
        out = attention(q, k, v, where.bias, implementation)                       # [B, H, queries, D]
        return self.wo(out.transpose(1, 2).flatten(2))                             # [B, queries, H*D] -> [B, queries, C]


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). (Shazeer 2020)"""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """x + attention(norm x), then x + feed_forward(norm x); of the last `queries` tokens, if given."""

    def __init__(self, config):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm, self.ffn_norm = RMSNorm(config.dim, config.norm_eps), RMSNorm(config.dim, config.norm_eps)

    def forward(self, x, where, layer=None, cache=None, implementation="auto", queries=None):
        queries = x.shape[1] if queries is None else queries
        x = x[:, -queries:] + self.attention(self.attention_norm(x), where, layer, cache, implementation, queries)
        return x + self.feed_forward(self.ffn_norm(x))


LOSS_CHUNK = 2**24  # logits computed at a time, 64 MiB in float32: the whole [T, V] of a 32k window would be 4 GiB


class LLaMA(nn.Module):
    """The model. `attention` (auto, naive, tiled, sdpa) and `recompute` may be set at any time, and so may `config.rope`."""

    def __init__(self, config, attention="auto", recompute=False):
        super().__init__()
        self.config, self.attention, self.recompute = config, attention, recompute
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.init_weights()
        self.clex = learned(config.rope, config.head_dim)                          # None, but for the method that learns frequencies

    def init_weights(self, std=0.02):
        """Normal(0, std); wo and w2, which write into the residual stream, are divided by sqrt(2 n_layers) (GPT-2's rule): its variance
        then does not grow with depth."""
        for name, parameter in self.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layers))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)

    @property
    def device(self):
        return self.tok_embeddings.weight.device

    def frequencies(self, positions):
        """(inv_freq, attention_factor) for a text at these positions. Where its length matters, the longest row of a batch decides."""
        seq_len = int(positions.max()) + 1 if depends_on_length(self.config.rope) else None
        return inv_freq(self.config.rope, self.config.head_dim, seq_len, self.clex)

    def hidden(self, tokens, positions=None, cache=None, last=None):
        """Final normalised states: tokens [B, T] -> [B, T, C]. positions [T] or [B, T] default to what follows the cache: 0, 1, 2, ...
        last: how many at the end are wanted -> [B, last, C]; the last layer, of which only they are read, computes no others.

        cos and sin are made anew at every call: a table that is never kept is never stale, cast or uninitialised.
        """
        T, start = tokens.shape[1], cache.length if cache is not None else 0
        assert last is None or 1 <= last <= T, "last: ask for at least one token, and for no more than there are"
        redrawn = start and positions is None and self.config.rope.random_positions is not None
        text_positions = position_ids(self.config.rope, start + T, tokens.device) if positions is None else positions
        if cache is not None:
            text, text_positions = cache.append(tokens, text_positions)
        frequencies, attention_factor = self.frequencies(text_positions)
        if cache is not None and (cache.outdated(text_positions, frequencies, attention_factor) or redrawn):
            tokens = text                                                          # what is cached was computed with other angles
        positions = text_positions[..., -tokens.shape[1]:]
        x = self.tok_embeddings(tokens)                                            # [B, T] -> [B, T, C]
        rope = where(self.config.rope, self.config.n_heads, frequencies.to(x.device), attention_factor, positions, text_positions)
        for n, layer in enumerate(self.layers):
            queries = x.shape[1] if n < len(self.layers) - 1 else T if last is None else last
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, n, cache, self.attention, queries, use_reentrant=False)
            else:
                x = layer(x, rope, n, cache, self.attention, queries)
        return self.norm(x)

    def logits(self, hidden):
        """[..., C] -> [..., V] in float32."""
        weight = self.tok_embeddings.weight if self.output is None else self.output.weight
        return F.linear(hidden, weight).float()

    def forward(self, tokens, positions=None, cache=None, last=None):
        """Logits of the next token: tokens [B, T] -> [B, T, V], or of the last so many tokens only -> [B, last, V]."""
        return self.logits(self.hidden(tokens, positions, cache, last))

    def nll(self, hidden, targets):
        """-ln p(target), in nats, per token: hidden [N, C], targets [N] -> [N]; 0 where the target is -100. Logits exist a chunk at a time,
        and the backward pass makes them again."""
        def chunk_nll(h, t):
            return F.cross_entropy(self.logits(h), t, ignore_index=-100, reduction="none")
        size = max(1, LOSS_CHUNK // self.config.vocab_size)
        if len(targets) <= size:
            return chunk_nll(hidden, targets)
        return torch.cat([checkpoint(chunk_nll, h, t, use_reentrant=False) for h, t in zip(hidden.split(size), targets.split(size))])

    def loss(self, tokens, targets, positions=None):
        """Mean cross-entropy in nats over the targets [B, T] that are not -100."""
        hidden = self.hidden(tokens, positions)
        return self.nll(hidden.flatten(0, 1), targets.flatten()).sum() / (targets != -100).sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@torch.inference_mode()
def stream(model, prompt, max_new_tokens, temperature=0.0, top_p=1.0, stop=(), seed=0, lengths=None):
    """Continue a prompt [B, T] one token at a time; yields [B] per step. Temperature 0 is greedy; top_p keeps the smallest set of tokens
    whose probability reaches top_p. A row that has produced a stop token repeats it; when all rows have, the stream ends.

    lengths [B]: of prompts that differ in length; what stands behind them in their rows is not read. All rows then go on from the end of
    the shortest: a longer prompt yields its own next token until it is used up (as in Meta's LLaMA 1), so that no row ever holds padding,
    and a row that has its max_new_tokens repeats the last."""
    lengths = torch.as_tensor([prompt.shape[1]] * len(prompt) if lengths is None else lengths, device=prompt.device)
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1 or longest > prompt.shape[1]:
        raise UserError("the prompt is empty: give at least one token (BOS)" if shortest < 1 else
                        f"a prompt of {longest} tokens in rows of {prompt.shape[1]}: give rows as long as the longest")
    if not (0 <= temperature < math.inf and 0 <= top_p <= 1):
        raise UserError(f"temperature {temperature}, top_p {top_p}: give a temperature of at least 0 (greedy) and a top_p from 0 to 1")
    generator = torch.Generator(device=prompt.device).manual_seed(seed)
    cache = KVCache(model.config, len(prompt), longest + max_new_tokens, prompt.device, model.tok_embeddings.weight.dtype)
    tokens, done = prompt[:, :shortest], lengths + max_new_tokens <= shortest
    for n in range(shortest, longest + max_new_tokens):                            # n tokens are there
        logits = model(tokens, cache=cache, last=1)[:, 0]                          # [B, V]
        token = torch.where(done, tokens[:, -1], sample(logits, temperature, top_p, generator))
        if n < longest:
            token = torch.where(n < lengths, prompt[:, n], token)
        yield token
        for s in stop:
            done = done | (token == s) & (n >= lengths)                            # within a prompt it stops nothing
        done = done | (n + 1 >= lengths + max_new_tokens)
        if stop and done.all():
            return
        tokens = token[:, None]


def sample(logits, temperature, top_p, generator):
    """One token a row from logits [B, V]."""
    if temperature <= 0:
        return logits.argmax(dim=-1)
    probabilities, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities                          # mass of the tokens ranked higher
    probabilities = probabilities.masked_fill((before >= top_p) & (before > 0), 0)
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


def generate(model, prompt, max_new_tokens, lengths=None, **sampling):
    """The prompt and its continuation, [B, T + new]; arguments as for stream(). Row b is text up to lengths[b] + new."""
    start = prompt[:, :prompt.shape[1] if lengths is None else int(min(lengths))]
    return torch.cat([start, *(token[:, None] for token in stream(model, prompt, max_new_tokens, lengths=lengths, **sampling))], dim=1)
