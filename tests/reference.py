"""The oracle: LLaMA in float64 numpy, written from the formulas and from nothing else.

It shares no code with the modules it judges and makes no attempt to be fast: attention is computed for one query of one head at
a time, a rotation is a product of complex numbers, and a score is looked at only if its key is visible. For small sizes.

Shapes: B batch, T query length, S key length, H query heads, K key/value heads, D head_dim, C model width (`dim`), V vocabulary.
`rope` is a plain dict in Hugging Face's vocabulary ({"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0, ...}), `config` a
plain dict with Meta's names (n_layers, n_heads, n_kv_heads, norm_eps, rope), `weights` a dict of arrays under Meta's tensor names.
"""
import math

import numpy as np


# ---------------------------------------------------------------------------------------------------------------------
# Rotary position embedding

def frequencies(rope, head_dim, length=None):
    """theta_i in radians a position, [D/2]. `length` is the current total length, which only the dynamic method asks for.

    default  theta_i = base^(-2i/D)                                          (RoFormer)
    linear   theta_i / s                                                     (Position Interpolation, arXiv 2306.15595)
    ntk      the default with base * s^(D/(D-2))                             (YaRN paper, appendix A)
    dynamic  the default with base * (s l/L - (s-1))^(D/(D-2)) where l > L   (emozilla; Hugging Face)
    llama3   by wavelength w = 2 pi/theta: above L/low theta/s, below L/high theta, a blend between  (Llama 3.1)
    """
    kind, s, base = rope.get("rope_type", "default"), rope.get("factor", 1.0), rope.get("rope_theta", 10000.0)
    L = rope.get("original_max_position_embeddings")
    if kind == "ntk":
        base = base * s ** (head_dim / (head_dim - 2))
    if kind == "dynamic" and length is not None and length > L:
        base = base * (s * length / L - (s - 1)) ** (head_dim / (head_dim - 2))
    result = []
    for i in range(head_dim // 2):
        theta = base ** (-2 * i / head_dim)
        if kind == "linear":
            theta = theta / s
        elif kind == "llama3":
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            turns = L * theta / (2 * math.pi)  # L / wavelength: how often the pair turns inside the original window
            if turns < low:
                theta = theta / s
            elif turns <= high:
                smooth = (turns - low) / (high - low)
                theta = (1 - smooth) * theta / s + smooth * theta
        elif kind not in ("default", "ntk", "dynamic"):
            raise ValueError(f"the oracle does not know rope_type {kind!r}")
        result.append(theta)
    return np.array(result, dtype=np.float64)


def rotate(x, position, theta, attention_factor=1.0):
    """One head at one position: pair i, elements (2i, 2i+1) of x [D], is a complex number turned by the angle position * theta_i."""
    turned = (x[0::2] + 1j * x[1::2]) * np.exp(1j * float(position) * theta) * attention_factor
    out = np.empty(len(x))
    out[0::2], out[1::2] = turned.real, turned.imag
    return out


def rotate_all(x, positions, theta, attention_factor=1.0):
    """x [B,H,T,D] with positions [T] or [B,T]."""
    B, H, T, _ = x.shape
    positions = np.broadcast_to(np.asarray(positions), (B, T))
    out = np.empty_like(x, dtype=np.float64)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                out[b, h, t] = rotate(x[b, h, t].astype(np.float64), positions[b, t], theta, attention_factor)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Attention, and its gradients in closed form

def attend(query, keys, values, bias):
    """One query [D] over the n keys that it may see [n,D], their values [n,D] and bias [n]: softmax(K q / sqrt(D) + bias) V.

    Returns (out [D], weights [n]).
    """
    scores = keys @ query / math.sqrt(len(query)) + bias
    weights = np.exp(scores - scores.max())
    weights = weights / weights.sum()
    return weights @ values, weights


def attention(q, k, v, bias=None):
    """q [B,H,T,D], k and v [B,K,S,D], bias broadcastable to [B,H,T,S] -> [B,H,T,D].

    Causal: the T queries are the last of S positions, so query t sits at S-T+t and sees keys 0..S-T+t. Query head h reads
    key/value head h // (H/K).
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    bias = np.broadcast_to(0.0 if bias is None else np.asarray(bias, dtype=np.float64), (B, H, T, S))
    out = np.empty((B, H, T, D))
    for b in range(B):
        for h in range(H):
            g = h // (H // K)
            for t in range(T):
                n = S - T + t + 1
                out[b, h, t], _ = attend(q[b, h, t], k[b, g, :n], v[b, g, :n], bias[b, h, t, :n])
    return out


def attention_gradients(q, k, v, dout, bias=None):
    """(dq, dk, dv) of sum(dout * attention(q, k, v, bias)), by the chain rule for one query at a time.

    With p = softmax(s), s = K q / sqrt(D) + bias, o = p V and do given:
        dV_j += p_j do      dp_j = do . V_j      ds_j = p_j (dp_j - sum_l p_l dp_l)
        dq += sum_j ds_j K_j / sqrt(D)           dK_j += ds_j q / sqrt(D)
    """
    q, k, v, dout = (np.asarray(x, dtype=np.float64) for x in (q, k, v, dout))
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    bias = np.broadcast_to(0.0 if bias is None else np.asarray(bias, dtype=np.float64), (B, H, T, S))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(B):
        for h in range(H):
            g = h // (H // K)
            for t in range(T):
                n = S - T + t + 1
                _, p = attend(q[b, h, t], k[b, g, :n], v[b, g, :n], bias[b, h, t, :n])
                dp = v[b, g, :n] @ dout[b, h, t]
                ds = p * (dp - p @ dp)
                dq[b, h, t] += ds @ k[b, g, :n] / math.sqrt(D)
                dk[b, g, :n] += np.outer(ds, q[b, h, t]) / math.sqrt(D)
                dv[b, g, :n] += np.outer(p, dout[b, h, t])
    return dq, dk, dv


# ---------------------------------------------------------------------------------------------------------------------
# The model

def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def swiglu(x, w1, w2, w3):
    """W2 (silu(W1 x) * W3 x), silu(z) = z / (1 + e^-z). Weights are [out,in], x is [..., C]."""
    gate = x @ w1.T
    return (gate / (1 + np.exp(-gate)) * (x @ w3.T)) @ w2.T


def ffn_width(dim, multiple_of, ffn_dim_multiplier=None):
    """Meta's rule: two thirds of 4 dim, times the multiplier where there is one, cut to an integer each time, rounded up to multiple_of."""
    width = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    while width % multiple_of != 0:
        width += 1
    return width


def forward(weights, config, tokens, positions=None):
    """tokens [B,T], positions [T] or [B,T] (default 0..T-1) -> logits [B,T,V]."""
    weights = {name: np.asarray(w, dtype=np.float64) for name, w in weights.items()}
    tokens = np.asarray(tokens)
    (B, T), H, K = tokens.shape, config["n_heads"], config.get("n_kv_heads") or config["n_heads"]
    positions = np.arange(T) if positions is None else np.asarray(positions)
    rope, eps = config.get("rope", {}), config["norm_eps"]
    x = weights["tok_embeddings.weight"][tokens]                                            # [B,T,C]
    D = x.shape[-1] // H
    theta, factor = frequencies(rope, D, positions.max() + 1), rope.get("attention_factor") or 1.0

    def heads(y, n):
        return y.reshape(B, T, n, D).transpose(0, 2, 1, 3)                                  # [B,T,n*D] -> [B,n,T,D]

    for layer in range(config["n_layers"]):
        def w(name):
            return weights[f"layers.{layer}.{name}.weight"]
        y = rms_norm(x, w("attention_norm"), eps)
        q = rotate_all(heads(y @ w("attention.wq").T, H), positions, theta, factor)
        k = rotate_all(heads(y @ w("attention.wk").T, K), positions, theta, factor)
        out = attention(q, k, heads(y @ w("attention.wv").T, K))
        x = x + out.transpose(0, 2, 1, 3).reshape(B, T, H * D) @ w("attention.wo").T
        x = x + swiglu(rms_norm(x, w("ffn_norm"), eps), w("feed_forward.w1"), w("feed_forward.w2"), w("feed_forward.w3"))
    x = rms_norm(x, weights["norm.weight"], eps)
    return x @ weights.get("output.weight", weights["tok_embeddings.weight"]).T             # tied models have no output.weight


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def cross_entropy(logits, targets, ignore_index=-100):
    """Mean over the targets that count of -log softmax(logits)[target]. logits [...,V], targets [...]."""
    logp = log_softmax(np.asarray(logits, dtype=np.float64))
    losses = [-logp[i][t] for i, t in np.ndenumerate(np.asarray(targets)) if t != ignore_index]
    return sum(losses) / len(losses)


# ---------------------------------------------------------------------------------------------------------------------
# Training and evaluation

def adamw_step(p, g, m, v, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
    """One step of AdamW (arXiv 1711.05101, algorithm 2), step = 1, 2, ... Returns the new (p, m, v).

        p <- p - lr wd p;  m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  p <- p - lr (m / (1-b1^step)) / (sqrt(v / (1-b2^step)) + eps)
    """
    b1, b2 = betas
    p = p - lr * weight_decay * p
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    return p - lr * (m / (1 - b1 ** step)) / (np.sqrt(v / (1 - b2 ** step)) + eps), m, v


def sliding_windows(n, window, stride):
    """For every target i = 1..n-1 of a document of n tokens: (i, begin), where tokens[begin:i] is what the model may look at.

    Windows begin at 0, stride, 2 stride, ... and feed at most `window` tokens, which predict the targets begin+1..begin+window. A
    target belongs to the first window that reaches it, so each is scored exactly once, for 1 <= stride <= window. (Where a window is
    said to contain its targets, inputs and last target together being W tokens, call this with window = W - 1.)
    """
    for i in range(1, n):
        begin = 0
        while begin + window < i:
            begin += stride
        yield i, begin


def sliding_window_perplexity(documents, window, stride, logprob, bos=None):
    """exp(total negative log-likelihood / number of scored tokens) over all documents. Returns (perplexity, scored tokens).

    logprob(context, token): the natural log-probability of `token` after the list `context`. With `bos`, that token stands in front
    of every window, in addition to its tokens, and token 0 of a document is scored too.
    """
    total, count = 0.0, 0
    for tokens in documents:
        tokens = list(tokens)
        front = [] if bos is None else [bos]
        if bos is not None:
            total, count = total - logprob(front, tokens[0]), count + 1
        for i, begin in sliding_windows(len(tokens), window, stride):
            total, count = total - logprob(front + tokens[begin:i], tokens[i]), count + 1
    return math.exp(total / count), count
