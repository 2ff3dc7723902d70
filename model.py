"""LLaMA 1, 2 and 3 in one file: configuration, attention three ways, blocks, model, generation.

    B  batch         T  new tokens        H  query heads        D  head_dim        V  vocabulary
    G  H / K         S  all tokens        K  key/value heads    C  width (`dim`)   F  ffn_dim

Module and tensor names are Meta's (`tok_embeddings`, `layers.N.attention.wq`, `feed_forward.w1`,
...), so that official checkpoints load with no renaming.
"""
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from common.checks import complete_shape
from common.distributed import ContextShard
from common.errors import UserError
from common.key_range import CausalRange, KeyRange
from common.kv_cache import KVCache
from common.sampling import check_sampling, sample
from methods import (PositionInputs, RopeConfig, build_clex, depends_on_length, inputs_of_layers,
                     inv_freq, text_positions)
from methods.distance_maps import attention_in_bands
from rope import apply_rope


@dataclass
class ModelConfig:
    """The shape of a LLaMA. Field names are those of Meta's params.json."""
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None             # fewer than n_heads: grouped-query attention
    vocab_size: int = 32000
    multiple_of: int = 256                    # ffn_dim is rounded up to a multiple of this,
    ffn_dim_multiplier: float | None = None   # after it was scaled by this (LLaMA 2 70B, LLaMA 3)
    norm_eps: float = 1e-5
    max_seq_len: int = 2048                   # the window of the weights: L, or L' after extension
    rope: RopeConfig = field(default_factory=RopeConfig)
    tied: bool = False                        # the output projection is the embedding
    head_dim: int | None = None               # D, where it is not dim / n_heads
    ffn_dim: int | None = None                # F, where it does not follow from Meta's rule

    def __post_init__(self):
        complete_shape(self)                  # fills in n_kv_heads, head_dim, ffn_dim; checks all
        inv_freq(self.rope, self.head_dim)    # refuses RoPE settings that do not fit the head

    @property
    def original_window(self) -> int:
        """L, the window of pre-training: the rope dict's, else max_seq_len / factor."""
        stated = self.rope.original_max_position_embeddings
        return stated or round(self.max_seq_len / self.rope.factor)


# ---- Attention -----------------------------------------------------------------------------------
#
# One signature, three implementations: q [B, H, T, D], k and v [B, K, S, D] -> [B, H, T, D].
# Attention is causal, and the T queries are the last T of the S positions: query t sits at position
# S-T+t and sees keys 0 .. S-T+t. T = S in training, T < S with a cache. Query head h reads key head
# h // G. `bias` broadcasts to [B, H, T, S] and is added to the scores; it has no gradient.
# Where several GPUs share a text, the T queries are those of this GPU (attention_in_chunks).

ATTENTION = ("naive", "tiled", "sdpa")
LOWEST, SMALLEST = torch.finfo(torch.float32).min, torch.finfo(torch.float32).tiny


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None,
              implementation: str = "auto", block_q: int = 256, block_k: int = 256) -> Tensor:
    """Causal attention by one of the three; `auto` is sdpa. The block sizes are tiled's."""
    if implementation not in ("auto", *ATTENTION):
        raise UserError(f"attention '{implementation}' is unknown: choose auto, "
                        f"{', '.join(ATTENTION)}")
    assert q.shape[2] <= k.shape[2], "more queries than keys: q are the last T of the S positions"
    bias = None if bias is None else bias.detach()
    if implementation == "naive":
        return naive_attention(q, k, v, bias)
    if implementation == "tiled":
        causal = CausalRange(q.shape[2], k.shape[2], q.device)
        return TiledAttention.apply(q, k, v, bias, causal, block_q, block_k)[0]
    return sdpa_attention(q, k, v, bias)


def attention_in_chunks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
                        implementation: str, chunks: Sequence[int]) -> Tensor:
    """The same where several GPUs share a text of equal chunks, and this one has the queries of
    `chunks` (common/distributed.py): those of chunk c see chunks 0 to c."""
    outputs = []
    for c, q_chunk in zip(chunks, q.chunk(len(chunks), dim=2)):
        end = (c + 1) * q_chunk.shape[2]
        bias_seen = None if bias is None else bias[..., :end]
        outputs.append(attention(q_chunk, k[:, :, :end], v[:, :, :end], bias_seen, implementation))
    return torch.cat(outputs, dim=2)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition: softmax(q k^T / sqrt(D) + bias) v. Memory and time grow with T * S.
    (Vaswani et al. 2017)"""
    G = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(G, dim=1)                                 # [B, K, S, D] -> [B, H, S, D]
    v = v.repeat_interleave(G, dim=1)
    scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(q.shape[-1])              # [B, H, T, S]
    scores = scores + causal_bias(bias, q.shape[2], k.shape[2], q.device)
    return scores.softmax(dim=-1).type_as(v) @ v


def causal_bias(bias: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
    """-inf where key s comes after query t, s > S-T+t, else the bias or 0: [T, S] or [.., T, S].
    From each row the bias of the query's own key is subtracted: softmax is the same, and near keys
    keep all their digits in any dtype."""
    if bias is None:
        centered = torch.zeros(T, S, device=device)
    else:
        bias = bias.float().expand(*bias.shape[:-2], T, S)
        own = bias.diagonal(S - T, -2, -1).clamp(min=-1e30)    # [.., T]; -inf - -inf would be NaN
        centered = bias - own[..., None]
    future = torch.ones(T, S, dtype=torch.bool, device=device).triu(S - T + 1)
    return centered.masked_fill(future, -torch.inf)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's fused kernels. Training without a bias passes no mask: flash would refuse it."""
    T, S = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and q.dtype == torch.float32:
        # Flash takes no float32, the memory-efficient kernel no groups: all scores would be stored.
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        grouped = False
    mask = None
    if bias is not None:
        mask = causal_bias(bias, T, S, q.device).to(q.dtype)
    elif 1 < T < S:                              # is_causal would align the diagonal with key 0
        from torch.nn.attention.bias import causal_lower_right   # imports the compiler: 2 s, 70 MB
        mask = causal_lower_right(T, S)
    is_causal = mask is None and T == S
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=grouped)


class TiledAttention(torch.autograd.Function):
    """The flash algorithm, written to be read. (Dao et al. 2022, arXiv 2205.14135; Dao 2023,
    arXiv 2307.08691)

    A row of scores is never stored. Keys come in tiles, and each query carries its maximum so far
    m, its row_sum of exp(score - m), and its output acc. A tile that raises m to m' scales both:

        row_sum <- exp(m - m') row_sum + sum_j exp(s_j - m')
        acc     <- exp(m - m') acc     + sum_j exp(s_j - m') v_j

    At the end out = acc / row_sum and lse = m + ln row_sum = ln sum_j exp(s_j) (log-sum-exp). A
    distance map attends to its bands one by one; the out of each weighs exp(its lse - lse of all).
    Backward recomputes each tile's p = exp(s - lse). With delta = sum_d dout * out - dlse, one
    number a query,

        dv += p^T dout      ds = p * (dout v^T - delta)      dq += ds k / sqrt(D)
                                                             dk += ds^T q / sqrt(D)

    Memory is linear in T both ways. The G query heads that share a key head are rows of the same
    tile, so that keys are not repeated. `seen`: which keys a query sees (common/key_range.py).
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, seen, block_q, block_k):
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)           # [B, H, T]
        for rows, key_tiles in seen.tiles(block_q, block_k):
            q_tile = group_heads(q[:, :, rows], k.shape[1])                     # [B, K, G*bq, D]
            m = torch.full_like(q_tile[..., :1], LOWEST, dtype=torch.float32)   # [B, K, G*bq, 1]
            row_sum, zero = torch.zeros_like(m), torch.zeros_like(m)
            acc = torch.zeros_like(q_tile, dtype=torch.float32)
            for keys in key_tiles:
                scores = tile_scores(q_tile, q, k, bias, seen, rows, keys, minus=zero)
                m_new = torch.maximum(m, scores.amax(dim=-1, keepdim=True))
                p = scores.sub_(m_new).exp_()       # in place: tiles stay in the processor's cache
                shrink = torch.exp(m - m_new)
                row_sum = shrink * row_sum + p.sum(dim=-1, keepdim=True)
                acc = shrink * acc + (p.type_as(v) @ v[:, :, keys]).float()
                m = m_new
            row_sum = row_sum.clamp(min=SMALLEST)                # 0 where a query sees no key
            out[:, :, rows] = ungroup_heads(acc / row_sum, q.shape[1]).type_as(q)
            lse[:, :, rows] = ungroup_heads(m + row_sum.log(), q.shape[1])[..., 0]
        ctx.save_for_backward(q, k, v, out, lse, bias)
        ctx.seen, ctx.blocks = seen, (block_q, block_k)
        return out, lse

    @staticmethod
    @once_differentiable  # a second derivative raises: it would take the saved lse for a constant
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, bias = ctx.saved_tensors
        K, scale = k.shape[1], 1 / math.sqrt(q.shape[-1])
        delta = (dout.float() * out.float()).sum(dim=-1) - dlse                        # [B, H, T]
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k, dtype=torch.float32)
        dv = torch.zeros_like(v, dtype=torch.float32)
        for rows, key_tiles in ctx.seen.tiles(*ctx.blocks):
            q_tile = group_heads(q[:, :, rows], K)                              # [B, K, G*bq, D]
            dout_tile = group_heads(dout[:, :, rows], K).type_as(v)
            lse_tile = group_heads(lse[:, :, rows, None], K)                    # [B, K, G*bq, 1]
            delta_tile = group_heads(delta[:, :, rows, None], K)
            dq_tile = torch.zeros_like(q_tile, dtype=torch.float32)
            for keys in key_tiles:
                p = tile_scores(q_tile, q, k, bias, ctx.seen, rows, keys, minus=lse_tile).exp_()
                dv[:, :, keys] += (p.type_as(v).transpose(-2, -1) @ dout_tile).float()
                ds = product_minus(dout_tile, v[:, :, keys], delta_tile).mul_(p).type_as(q)
                dq_tile += (ds @ k[:, :, keys]).float() * scale
                dk[:, :, keys] += (ds.transpose(-2, -1) @ q_tile).float() * scale
            dq[:, :, rows] = ungroup_heads(dq_tile, q.shape[1]).type_as(q)
        return dq, dk.type_as(k), dv.type_as(v), None, None, None, None


def group_heads(x: Tensor, K: int) -> Tensor:
    """Query heads that share a key head, as rows of one matrix: [B, H, T, D] -> [B, K, G*T, D]."""
    return x.unflatten(1, (K, -1)).flatten(2, 3)


def ungroup_heads(x: Tensor, H: int) -> Tensor:
    """The inverse: [B, K, G*T, D] -> [B, H, T, D]."""
    return x.unflatten(2, (H // x.shape[1], -1)).flatten(1, 2)


def product_minus(a: Tensor, b: Tensor, c: Tensor, scale: float = 1.0) -> Tensor:
    """scale a b^T - c in float32: [B, K, n, D], [B, K, m, D], [B, K, n, 1] -> [B, K, n, m]. Forward
    has c = 0; backward needs scores - lse and dout v^T - delta."""
    if a.dtype != torch.float32:
        return (a @ b.mT).float() * scale - c
    tile = torch.baddbmm(-c.flatten(0, 1), a.flatten(0, 1), b.mT.flatten(0, 1), alpha=scale)
    return tile.unflatten(0, a.shape[:2])           # one call; several would each go over the tile


def tile_scores(q_tile: Tensor, q: Tensor, k: Tensor, bias: Tensor | None,
                seen: CausalRange | KeyRange, rows: slice, keys: slice, minus: Tensor) -> Tensor:
    """Scaled, biased, masked scores of a tile, less `minus`, in float32: [B, K, G*bq, bk]."""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    scores = product_minus(q_tile, k[:, :, keys], minus, 1 / math.sqrt(D))
    if bias is not None:
        bias = bias.float().expand(B, H, T, S)                                # copies nothing
        own = bias.diagonal(S - T, -2, -1)[:, :, rows, None].clamp(min=-1e30)     # see causal_bias
        scores = scores + group_heads(bias[:, :, rows, keys] - own, K)
    masked = seen.masked(rows, keys)                           # [.., 1, bq, bk]; None: all is seen
    if masked is not None:
        scores = scores.unflatten(2, (H // K, -1))                            # [B, K, G, bq, bk]
        scores = scores.masked_fill(masked[..., None, :, :], -torch.inf).flatten(2, 3)
    return scores


# ---- The model -----------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32. (Zhang & Sennrich 2019)"""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + self.eps)
        return (x32 * scale).type_as(x) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: q and k are rotated, v is not."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.head_dim, self.layer = config.head_dim, layer
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, pos: PositionInputs, cache: KVCache | None = None,
                implementation: str = "auto", last: int | None = None) -> Tensor:
        """x [B, T, C] -> [B, n, C]: all T tokens give keys, only the last n (default T) queries."""
        B, T, _ = x.shape
        n = T if last is None else last
        q = self.wq(x[:, -n:]).view(B, n, -1, self.head_dim).transpose(1, 2)      # [B, H, n, D]
        k = self.wk(x).view(B, T, -1, self.head_dim).transpose(1, 2)              # [B, K, T, D]
        v = self.wv(x).view(B, T, -1, self.head_dim).transpose(1, 2)              # [B, K, T, D]
        pos = pos.last(n)
        if pos.bands is None:                           # no distance map (methods/distance_maps.py)
            q = apply_rope(q, *pos.q_rope)
            k = apply_rope(k, *pos.k_rope)              # not q_rope under a temperature or in xPos
        if cache is not None:
            k, v = cache.add_keys(self.layer, k, v)                               # [B, K, S, D]
        if pos.context is not None:                                   # several GPUs share the text
            k, v = pos.context.all_tokens(k), pos.context.all_tokens(v)           # [B, K, S, D]
        if pos.bands is not None:                    # a distance map: each band rotates q and k
            out = attention_in_bands(q, k, v, pos.bands, implementation, attention,
                                     TiledAttention.apply)                        # [B, H, n, D]
        elif pos.context is not None:
            out = attention_in_chunks(q, k, v, pos.attn_bias, implementation, pos.context.chunks)
        else:
            out = attention(q, k, v, pos.attn_bias, implementation)               # [B, H, n, D]
        return self.wo(out.transpose(1, 2).flatten(2))                            # [B, n, C]


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). (Shazeer 2020)"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """x + attention(norm x), then x + feed_forward(norm x)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, pos: PositionInputs, cache: KVCache | None = None,
                implementation: str = "auto", last: int | None = None) -> Tensor:
        n = x.shape[1] if last is None else last
        x = x[:, -n:] + self.attention(self.attention_norm(x), pos, cache, implementation, last)
        return x + self.feed_forward(self.ffn_norm(x))


LOSS_CHUNK = 2**24  # logits at a time, 64 MiB: the whole [T, V] of a 32k window would be 4 GiB


class LLaMA(nn.Module):
    """The model. `attention` (auto, naive, tiled, sdpa) and `recompute` may be set at any time;
    `config.rope` too, but not while a cache is in use, and not to or from CLEX. `context`: a
    ContextShard where several GPUs share each text."""

    def __init__(self, config: ModelConfig, attention: str = "auto", recompute: bool = False):
        super().__init__()
        self.config, self.attention, self.recompute = config, attention, recompute
        self.context: ContextShard | None = None
        self.offloaded_from: torch.device | None = None     # the GPU, if weights wait in the RAM
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None
        if not config.tied:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.init_weights()
        self.clex = build_clex(config.rope, config.head_dim)   # None, but for CLEX

    def init_weights(self, std: float = 0.02) -> None:
        """Normal(0, std). wo and w2, which write into the residual stream, are divided by
        sqrt(2 n_layers), so that its variance does not grow with depth (GPT-2's rule)."""
        for name, parameter in self.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layers))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)

    @property
    def device(self) -> torch.device:
        return self.offloaded_from or self.tok_embeddings.weight.device

    def hidden(self, tokens: Tensor, positions: Tensor | None = None,
               cache: KVCache | None = None, last: int | None = None) -> Tensor:
        """Final normalised states: tokens [B, T] -> [B, T, C]. positions [T] or [B, T]; without
        them they begin at 0 or go on from the cache. last = n: only the last n states, [B, n, C],
        and the last layer computes no others."""
        assert last is None or 1 <= last <= tokens.shape[1], "last: from 1 to the number of tokens"
        all_positions = text_positions(self.config.rope, tokens, positions, cache)   # [S] or [B, S]
        frequencies, attention_factor = self.frequencies(all_positions)
        if cache is not None:
            cache.add_tokens(tokens, all_positions, frequencies, attention_factor)
        positions = all_positions[..., -tokens.shape[1]:]
        if self.context is not None:                              # this GPU's part of the text
            own = self.context.own(tokens.shape[1])
            tokens, positions = tokens[:, own], all_positions[..., own]
        inputs = inputs_of_layers(self.config.rope, self.config.n_layers, self.config.n_heads,
                                  frequencies.to(self.device), attention_factor, all_positions,
                                  positions, self.context)              # rotations of each layer
        x = self.tok_embeddings(tokens)                                 # [B, T] -> [B, T, C]
        for block, pos in zip(self.layers, inputs):
            wanted = last if block is self.layers[-1] else None
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, pos, cache, self.attention, wanted, use_reentrant=False)
            else:
                x = block(x, pos, cache, self.attention, wanted)
        return self.norm(x)

    def frequencies(self, positions: Tensor) -> tuple[Tensor, float]:
        """(inv_freq, attention_factor) for a text at these positions. Where its length matters, the
        longest row of a batch decides."""
        seq_len = int(positions.max()) + 1 if depends_on_length(self.config.rope) else None
        return inv_freq(self.config.rope, self.config.head_dim, seq_len, self.clex)

    def forward(self, tokens: Tensor, positions: Tensor | None = None,
                cache: KVCache | None = None, last: int | None = None) -> Tensor:
        """Logits of the next token: tokens [B, T] -> [B, T, V], or of the last n tokens [B, n, V].
        With a cache the tokens follow those that it holds."""
        last = tokens.shape[1] if last is None else last
        if cache is not None and cache.length > 0 and depends_on_length(self.config.rope):
            all_positions = text_positions(self.config.rope, tokens, positions, cache)
            if cache.is_stale(all_positions, *self.frequencies(all_positions)):
                # Cached keys were rotated by other angles: read the whole text anew.
                tokens, positions = cache.restart(tokens), all_positions
        return self.logits(self.hidden(tokens, positions, cache, last))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., V] in float32."""
        weight = self.tok_embeddings.weight if self.output is None else self.output.weight
        return F.linear(hidden, weight).float()

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """-ln p(target), in nats: hidden [N, C], targets [N] -> [N]; 0 where the target is -100.
        Logits are made one chunk at a time, and again in any backward pass, to save memory."""
        size = max(1, LOSS_CHUNK // self.config.vocab_size)
        if len(targets) <= size:
            return self.chunk_nll(hidden, targets)
        chunks = zip(hidden.split(size), targets.split(size))
        return torch.cat([checkpoint(self.chunk_nll, h, t, use_reentrant=False) for h, t in chunks])

    def chunk_nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(hidden), targets, ignore_index=-100, reduction="none")

    def loss(self, tokens: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats over the targets [B, T] that are not -100."""
        hidden = self.hidden(tokens, positions)
        count = (targets != -100).sum().clamp(min=1)
        if self.context is None:
            return self.nll(hidden.flatten(0, 1), targets.flatten()).sum() / count
        own = targets[:, self.context.own(targets.shape[1])]
        nll = self.nll(hidden.flatten(0, 1), own.flatten()).sum()
        return self.context.sum(nll) / count    # value: of the whole text; gradient: of this part


# ---- Generation ----------------------------------------------------------------------------------

@torch.inference_mode()
def stream(model: LLaMA, prompt: Tensor, max_new_tokens: int, temperature: float = 0.0,
           top_p: float = 1.0, stop: Collection[int] = (), seed: int = 0) -> Iterator[Tensor]:
    """Continue a prompt [B, T] one token at a time; yields [B] per step. Temperature 0 is greedy;
    top_p keeps the smallest set of tokens whose probability reaches it. A row that has produced a
    stop token repeats it; when all have, the stream ends. (Other lengths: extras/generation.py)"""
    check_sampling(prompt, temperature, top_p)
    generator = torch.Generator(device=prompt.device).manual_seed(seed)
    B, T = prompt.shape
    cache = KVCache(model.config, B, T + max_new_tokens, prompt.device,
                    model.tok_embeddings.weight.dtype)
    tokens = prompt
    done = torch.zeros(B, dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        logits = model(tokens, cache=cache, last=1)[:, 0]                                # [B, V]
        token = sample(logits, temperature, top_p, generator)
        token = torch.where(done, tokens[:, -1], token)
        yield token
        for s in stop:
            done = done | (token == s)
        if stop and done.all():
            return
        tokens = token[:, None]


def generate(model: LLaMA, prompt: Tensor, max_new_tokens: int, **sampling) -> Tensor:
    """The prompt and its continuation, [B, T + new]; arguments as for stream()."""
    new = stream(model, prompt, max_new_tokens, **sampling)
    return torch.cat([prompt, *(token[:, None] for token in new)], dim=1)
