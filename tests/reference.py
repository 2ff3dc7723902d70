"""The oracle: LLaMA in float64 numpy, written from the formulas and from nothing else.

It shares no code with the modules it judges and makes no attempt to be fast: attention is computed
for one query of one head at a time, a rotation is a product of complex numbers, and a score is
looked at only if its key is visible. For small sizes.

Shapes: B batch, T query length, S key length, H query heads, K key/value heads, D head_dim,
C model width (`dim`), V vocabulary.

`rope` is a plain dict in Hugging Face's vocabulary ({"rope_type": "linear", "factor": 4.0,
"rope_theta": 10000.0, ...}), `config` a plain dict with Meta's names (n_layers, n_heads,
n_kv_heads, norm_eps, rope), `weights` a dict of arrays under Meta's tensor names.
"""
import math

import numpy as np

# ---- Rotary position embedding, and what else tells a model its positions ------------------------


def complete(rope, head_dim):
    """The dict with what its method cannot do without: s = 4 and L = 64 unless it says otherwise,
    and LongRoPE's factors, one a pair."""
    rope = {"factor": 4.0, "original_max_position_embeddings": 64, **rope}
    if rope["rope_type"] == "longrope":
        pairs = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        given = {"short_factor": [1 + 0.05 * i for i in range(pairs)],
                 "long_factor": [1.2 + 2.8 * i / pairs for i in range(pairs)]}
        rope = {**given, **rope}
    return rope


def frequencies(rope, head_dim, length=None, clex=None):
    """(theta_i in radians a position, [D/2]; the factor of cos and sin). D is head_dim, or the part
    of it that is rotated.

    length: l, the current total length, for the methods that ask for it. clex: the trained matrices
    (W_up, W_down). With s = factor, L the original window, r_i = L theta_i / 2 pi the turns of a
    pair inside it:

    default       theta_i = base^(-2i/D)                                   (RoFormer)
    linear, xpos  theta_i / s                        (Position Interpolation, arXiv 2306.15595)
    ntk           the default with base * s^(D/(D-2))                      (YaRN paper, appendix A)
    dynamic       the same with s = f l/L - (f-1) where l > L              (emozilla; Hugging Face)
    ntk_by_parts  (1-g) theta_i/s + g theta_i, g from 0 at r = 1 up to 1 at r = 32
                                                                     (arXiv 2309.00071, section 3.2)
    yarn          the blend along i instead, between the pairs of 32 and of 1 turns; cos and sin
                  times 0.1 ln s + 1                                       (its code)
    dynamic_yarn  yarn with s = max(factor, l/L)
    llama3        by wavelength w = 2 pi/theta: above L/low theta/s, below L/high theta, a blend
                  between                                                  (Llama 3.1)
    longrope      theta_i / short_i up to L, theta_i / long_i beyond; cos and sin times
                  sqrt(1 + ln s / ln L)                                    (arXiv 2402.13753)
    abf           b'^(-2i/D)                                               (arXiv 2309.16039)
    dprope        theta_i / s if that disturbs the histogram of angles less        (EMNLP 2024)
    proportional  theta_i / s for the first share p of the pairs, else 0   (Gemma 4)
    clex          NTK with 2t-1 for s, t = ceil(l/L), or what the learned differential equation
                  makes of it                                              (arXiv 2310.16450)
    nope, alibi, drope  0; drope with cos (and sin) times the root of 1 + 0.412 ln(l/L)
                                                                           (arXiv 2512.12167)
    resonance     last of all: the wavelength rounded to an integer        (arXiv 2403.00071)
    rerope, leaky_rerope, self_extend, dca, streaming: the default, at other distances (below)
    """
    kind = rope.get("rope_type", "default")
    s, base = rope.get("factor", 1.0), rope.get("rope_theta", 10000.0)
    L, l = rope.get("original_max_position_embeddings"), length or 0
    share = rope.get("partial_rotary_factor", 1.0)
    D = head_dim if kind in ("proportional", "drope") else int(head_dim * share)

    def ntk(alpha):
        return base * alpha ** (D / (D - 2)) if D > 2 else base

    def g(s, m=1.0):
        return 0.1 * m * math.log(s) + 1 if s > 1 else 1.0

    factor, alpha = 1.0, 1.0
    if kind == "clex":
        alpha = min(max(1, math.ceil(l / L)), rope.get("max_factor", 16))
    if kind == "ntk":
        base = ntk(s)
    elif kind == "dynamic" and l > L:
        base = ntk(s * l / L - (s - 1))
    elif kind == "clex" and clex is None:
        base = ntk(2 * alpha - 1)
    elif kind == "abf":
        base = rope.get("new_rope_theta", 500000.0)
    elif kind == "dynamic_yarn":
        s = max(s, l / L)
    if kind in ("yarn", "dynamic_yarn"):
        fast, slow = rope.get("beta_fast", 32), rope.get("beta_slow", 1)
        low = D * math.log(L / (2 * math.pi * fast)) / (2 * math.log(base))
        high = D * math.log(L / (2 * math.pi * slow)) / (2 * math.log(base))
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        if low == high:
            high = high + 0.001
        m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
        factor = rope.get("attention_factor")
        if factor is None:
            factor = g(s, m) / g(s, m_all) if m and m_all else g(s)
    if kind == "longrope":
        factor = rope.get("attention_factor")
        if factor is None:
            factor = math.sqrt(1 + math.log(s) / math.log(L))
    if kind == "drope":
        factor = math.sqrt(1 + rope.get("log_scale", 0.412) * math.log(max(1, l / L)))

    result = []
    for i in range(D // 2):
        theta = base ** (-2 * i / D)
        if kind in ("linear", "xpos"):
            theta = theta / s
        elif kind == "ntk_by_parts" or kind == "yarn" and rope.get("ramp") == "turns":
            fast, slow = rope.get("beta_fast", 32), rope.get("beta_slow", 1)
            turns = L * theta / (2 * math.pi)
            if turns < slow:
                gamma = 0
            elif turns > fast:
                gamma = 1
            else:
                gamma = (turns - slow) / (fast - slow)
            theta = (1 - gamma) * theta / s + gamma * theta
        elif kind in ("yarn", "dynamic_yarn"):
            ramp = min(max((i - low) / (high - low), 0), 1)
            theta = theta / s * ramp + theta * (1 - ramp)
        elif kind == "llama3":
            slow, fast = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
            wavelength = 2 * math.pi / theta
            if wavelength > L / slow:
                theta = theta / s
            elif wavelength >= L / fast:
                smooth = (L / wavelength - slow) / (fast - slow)
                theta = (1 - smooth) * theta / s + smooth * theta
        elif kind == "longrope":
            theta = theta / rope["long_factor" if l > L else "short_factor"][i]
        elif kind == "proportional":
            theta = theta / s if i < int(share * D // 2) else 0.0
        elif kind in ("nope", "alibi", "drope"):
            theta = 0.0
        elif kind not in {"default", "ntk", "dynamic", "abf", "clex", "dprope", *MAPS}:
            raise ValueError(f"the oracle does not know rope_type {kind!r}")
        result.append(theta)
    if kind == "clex" and clex is not None:
        result = clex_frequencies(np.array(result), alpha, *clex)
    if kind == "dprope":
        bins = rope.get("bins") or min(360, max(4, round(L * 360 / 4096)))
        gain = [disturbance(theta, theta, L, s, bins) - disturbance(theta, theta / s, L, s, bins)
                for theta in result]
        chosen = [i for i in range(D // 2) if gain[i] > rope.get("threshold", 0.0)]
        if rope.get("interpolated_dims") is not None:
            by_gain = sorted(range(D // 2), key=lambda i: -gain[i])
            chosen = by_gain[:rope["interpolated_dims"] // 2]
        result = [theta / s if i in chosen else theta for i, theta in enumerate(result)]
    if rope.get("resonance"):
        result = [2 * math.pi / max(1, round(2 * math.pi / theta)) if theta else theta
                  for theta in result]
    return np.array(result, dtype=np.float64), factor


def histogram(theta, length, bins):
    """The share of the angles m theta mod 2 pi, m < length, in each of the bins."""
    shares = [0.0] * bins
    for m in range(length):
        shares[int(m * theta % (2 * math.pi) * bins / (2 * math.pi))] += 1 / length
    return shares


def disturbance(old, new, L, s, bins):
    """KL(angles of `old` within L || angles of `new` within s L), in nats. (DPRoPE, eq. 8 in the
    order that gives its Table 3)"""
    before, after = histogram(old, L, bins), histogram(new, round(s * L), bins)
    return sum(p * math.log((p + 1e-12) / (q + 1e-12)) for p, q in zip(before, after) if p > 0)


def clex_frequencies(theta, t, up, down, steps=400):
    """exp z(t) of dz/dt = W_down tanh(W_up (z + ln theta_NTK(t))) + d ln theta_NTK/dt,
    z(1) = ln theta, by many steps of the midpoint rule.

    ln theta_NTK,i(t) = ln theta_i - 2i/(D-2) ln(2t-1), so that its derivative is
    -4i / ((D-2)(2t-1))."""
    D, i = 2 * len(theta), np.arange(len(theta))

    def derivative(t, z):
        ntk = np.log(theta) - 2 * i / (D - 2) * np.log(2 * t - 1)
        return down @ np.tanh(up @ (z + ntk)) - 4 * i / ((D - 2) * (2 * t - 1))
    z, h = np.log(theta), 1 / steps
    for n in range(round((t - 1) * steps)):
        now = 1 + n * h
        z = z + h * derivative(now + h / 2, z + h / 2 * derivative(now, z))
    return np.exp(z)


def rotate(x, position, theta, attention_factor=1.0):
    """One head at one position: pair i, elements (2i, 2i+1) of x [D], is a complex number turned by
    the angle position * theta_i. Where there are fewer thetas than pairs, the rest of x stays as it
    is."""
    n = 2 * len(theta)
    turned = (x[0:n:2] + 1j * x[1:n:2]) * np.exp(1j * float(position) * theta) * attention_factor
    out = np.array(x, dtype=np.float64)
    out[0:n:2], out[1:n:2] = turned.real, turned.imag
    return out


def rotate_all(x, positions, theta, attention_factor=1.0):
    """x [B,H,T,D] with positions [T] or [B,T]."""
    B, H, T, _ = x.shape
    positions = np.broadcast_to(np.asarray(positions), (B, T))
    out = np.empty_like(x, dtype=np.float64)
    for b, h, t in np.ndindex(B, H, T):
        head = x[b, h, t].astype(np.float64)
        out[b, h, t] = rotate(head, positions[b, t], theta, attention_factor)
    return out


def xpos_decay(x, positions, pairs, sign, s=1.0):
    """xPos (arXiv 2212.10554): pair i of x [B,H,T,D] times zeta_i^(sign m / 512 s),
    zeta_i = (2i + 0.4 D) / 1.4 D. sign: 1 for q, -1 for k."""
    out, D = x.copy(), 2 * pairs
    for b, h, t in np.ndindex(x.shape[:3]):
        for i in range(pairs):
            zeta = (2 * i + 0.4 * D) / (1.4 * D)
            out[b, h, t, 2 * i:2 * i + 2] *= zeta ** (sign * positions[b, t] / (512 * s))
    return out


def alibi_slopes(n):
    """2^(-8h/n), h = 1 .. n; where n is no power of two those of the power P below, and then every
    other one of 2P. (arXiv 2108.12409)"""
    P = 1
    while 2 * P <= n:
        P = 2 * P
    slopes = [2 ** (-8 * h / P) for h in range(1, P + 1)]
    return slopes + [2 ** (-8 * h / (2 * P)) for h in range(1, 2 * P + 1)][0::2][:n - P]


def alibi_bias(positions, n_heads, s=1.0):
    """-m_h (i - j) / s for a query at i and a key at j, in full: positions [B,T] -> [B,H,T,T]."""
    distance = positions[:, None, :, None] - positions[:, None, None, :]
    return -np.array(alibi_slopes(n_heads))[:, None, None] * distance / s


def seen_distance(rope, i, j):
    """The distance at which a map lets a query at i see the key at j <= i; None: not at all.

    rerope        min(i - j, w)                                             (ReRoPE)
    leaky_rerope  w + (i - j - w) / k from w on
    self_extend   i//g - j//g + w - w//g from w on                          (arXiv 2401.01325)
    dca           i - j in a chunk of h = c - w; in the chunk before, i - j but with the place of i
                  in its own chunk cut so that no key is farther than c - 1; beyond, c - 1 - j%h
                                                                            (arXiv 2402.17463)
    streaming     i - j below w; the first tokens as if they stood right before those
                                                                            (arXiv 2309.17453)
    """
    kind, s, L = rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]
    d, w = i - j, rope.get("window")
    if kind in ("rerope", "leaky_rerope", "self_extend"):
        w = w or (L // 4 if kind == "self_extend" else L // 2)
        least = max(1, (round(L * s) - w) / max(1, L - w))
        if d < w:
            return d
        if kind == "rerope":
            return w
        if kind == "leaky_rerope":
            return w + (d - w) / (rope.get("stretch") or least)
        g = rope.get("group") or math.ceil(least)
        return i // g - j // g + w - w // g
    if kind == "dca":
        c, local = rope.get("chunk", 3 * L // 4), rope.get("local", L // 4)
        h = c - local
        apart = i // h - j // h
        if apart == 0:
            return d
        return (min(i % h + h, c - 1) if apart == 1 else c - 1) - j % h
    assert kind == "streaming", f"{kind}: write its formula here"
    sinks = rope.get("sinks", 4)
    w = w or max(1, L - sinks)
    if d < w:
        return d
    return min(i, sinks + w - 1) - j if j < sinks else None


MAPS = {"rerope", "leaky_rerope", "self_extend", "dca", "streaming"}


def query_scale(rope, position):
    """What a query at this position is multiplied by."""
    L, name = rope.get("original_max_position_embeddings"), rope.get("temperature")
    if name == "log_n":
        return max(1.0, math.log(position + 1) / math.log(L))
    if name == "llama4":
        return 1 + 0.1 * math.log(1 + position // L)
    return 1.0


def keys_at_distances(rope, theta, k, i, positions):
    """The keys [n,D] that a query at i may see, each turned back by its distance: rotating k by -d
    and q not at all gives the score of the distance d. Returns (indices, distances, turned)."""
    pairs = [(s, seen_distance(rope, i, int(j))) for s, j in enumerate(positions) if j <= i]
    indices = [s for s, d in pairs if d is not None]
    distances = np.array([d for _, d in pairs if d is not None])
    return indices, distances, turn(k[indices], -distances, theta)


def turn(x, angles, theta):
    """Each row of x [n,D] by its own multiple of theta: all of rotate() at once."""
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * np.outer(angles, theta))
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def attention_at_distances(q, k, v, rope, theta, positions, dout=None):
    """Attention with a map, from the full matrix of distances: q [B,H,T,D], k and v [B,K,S,D], not
    rotated; positions [S] or [B,S] of the keys, whose last T are those of the queries.

    Returns (out, dq, dk, dv), the gradients of sum(dout * out).
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    positions = np.broadcast_to(np.asarray(positions), (B, S))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b, h, t in np.ndindex(B, H, T):
        g, n = h // (H // K), S - T + t + 1
        places = positions[b, :n]
        seen, distances, keys = keys_at_distances(rope, theta, k[b, g], places[-1], places)
        out[b, h, t], p = attend(q[b, h, t], keys, v[b, g, seen], 0.0)
        if dout is not None:
            dp = v[b, g, seen] @ dout[b, h, t]
            ds = p * (dp - p @ dp) / math.sqrt(D)
            dq[b, h, t] = ds @ keys
            dk[b, g, seen] += turn(np.outer(ds, q[b, h, t]), distances, theta)
            dv[b, g, seen] += np.outer(p, dout[b, h, t])
    return out, dq, dk, dv


# ---- Attention, and its gradients in closed form -------------------------------------------------


def attend(query, keys, values, bias):
    """One query [D] over the n keys that it may see [n,D], their values [n,D] and bias [n]:
    softmax(K q / sqrt(D) + bias) V.

    Returns (out [D], weights [n]).
    """
    scores = keys @ query / math.sqrt(len(query)) + bias
    weights = np.exp(scores - scores.max())
    weights = weights / weights.sum()
    return weights @ values, weights


def attention(q, k, v, bias=None):
    """q [B,H,T,D], k and v [B,K,S,D], bias broadcastable to [B,H,T,S] -> [B,H,T,D].

    Causal: the T queries are the last of S positions, so query t sits at S-T+t and sees keys
    0..S-T+t. Query head h reads key/value head h // (H/K).
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    bias = np.asarray(0.0 if bias is None else bias, dtype=np.float64)
    bias = np.broadcast_to(bias, (B, H, T, S))
    out = np.empty((B, H, T, D))
    for b, h, t in np.ndindex(B, H, T):
        g = h // (H // K)
        n = S - T + t + 1
        out[b, h, t], _ = attend(q[b, h, t], k[b, g, :n], v[b, g, :n], bias[b, h, t, :n])
    return out


def attention_gradients(q, k, v, dout, bias=None):
    """(dq, dk, dv) of sum(dout * attention(q, k, v, bias)), by the chain rule for one query at a
    time.

    With p = softmax(s), s = K q / sqrt(D) + bias, o = p V and do given:
        dV_j += p_j do      dp_j = do . V_j      ds_j = p_j (dp_j - sum_l p_l dp_l)
        dq += sum_j ds_j K_j / sqrt(D)           dK_j += ds_j q / sqrt(D)
    """
    q, k, v, dout = (np.asarray(x, dtype=np.float64) for x in (q, k, v, dout))
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    bias = np.asarray(0.0 if bias is None else bias, dtype=np.float64)
    bias = np.broadcast_to(bias, (B, H, T, S))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, h, t in np.ndindex(B, H, T):
        g = h // (H // K)
        n = S - T + t + 1
        _, p = attend(q[b, h, t], k[b, g, :n], v[b, g, :n], bias[b, h, t, :n])
        dp = v[b, g, :n] @ dout[b, h, t]
        ds = p * (dp - p @ dp)
        dq[b, h, t] += ds @ k[b, g, :n] / math.sqrt(D)
        dk[b, g, :n] += np.outer(ds, q[b, h, t]) / math.sqrt(D)
        dv[b, g, :n] += np.outer(p, dout[b, h, t])
    return dq, dk, dv


# ---- The model -----------------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def swiglu(x, w1, w2, w3):
    """W2 (silu(W1 x) * W3 x), silu(z) = z / (1 + e^-z). Weights are [out,in], x is [..., C]."""
    gate = x @ w1.T
    return (gate / (1 + np.exp(-gate)) * (x @ w3.T)) @ w2.T


def ffn_width(dim, multiple_of, ffn_dim_multiplier=None):
    """Meta's rule: two thirds of 4 dim, times the multiplier where there is one, cut to an integer
    each time, rounded up to multiple_of."""
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
    (B, T), H = tokens.shape, config["n_heads"]
    K = config.get("n_kv_heads") or H
    rope, eps = config.get("rope", {}), config["norm_eps"]
    kind, s = rope.get("rope_type"), rope.get("factor", 1.0)
    x = weights["tok_embeddings.weight"][tokens]                                    # [B,T,C]
    D = x.shape[-1] // H
    positions = np.arange(T) if positions is None else np.asarray(positions)
    positions = np.broadcast_to(positions, (B, T))
    clex = None
    if kind == "clex":
        clex = weights["clex.up.weight"], weights["clex.down.weight"]
    theta, factor = frequencies(rope, D, positions.max() + 1, clex)
    temperature = np.array([[query_scale(rope, int(i)) for i in row] for row in positions])
    every = rope.get("no_rope_layer_interval")
    if rope.get("temperature") == "none" or rope.get("temperature") is not None and not every:
        factor = 1.0                                     # the method's own is replaced
    bias = alibi_bias(positions, H, s) if kind == "alibi" else None

    def heads(y, n):
        return y.reshape(B, T, n, D).transpose(0, 2, 1, 3)                          # -> [B,n,T,D]

    for layer in range(config["n_layers"]):
        w = {name.removeprefix(f"layers.{layer}.").removesuffix(".weight"): value
             for name, value in weights.items() if name.startswith(f"layers.{layer}.")}
        y = rms_norm(x, w["attention_norm"], eps)
        q = heads(y @ w["attention.wq"].T, H)
        k = heads(y @ w["attention.wk"].T, K)
        v = heads(y @ w["attention.wv"].T, K)
        rotated = not every or (layer + 1) % every
        if not every or not rotated:
            q = q * temperature[:, None, :, None]
        if kind in MAPS and rotated:
            out = attention_at_distances(q, k, v, rope, theta, positions)[0]
        elif rotated:
            q, k = (rotate_all(x, positions, theta, factor) for x in (q, k))
            if kind == "xpos":
                q = xpos_decay(q, positions, len(theta), 1, s)
                k = xpos_decay(k, positions, len(theta), -1, s)
            out = attention(q, k, v, bias)                                          # [B,H,T,D]
        else:
            out = attention(q, k, v)
        x = x + out.transpose(0, 2, 1, 3).reshape(B, T, H * D) @ w["attention.wo"].T
        y = rms_norm(x, w["ffn_norm"], eps)
        x = x + swiglu(y, w["feed_forward.w1"], w["feed_forward.w2"], w["feed_forward.w3"])
    x = rms_norm(x, weights["norm.weight"], eps)
    embedding = weights["tok_embeddings.weight"]      # a tied model has no output.weight
    return x @ weights.get("output.weight", embedding).T


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def cross_entropy(logits, targets, ignore_index=-100):
    """Mean over the targets that count of -log softmax(logits)[target]. logits [...,V],
    targets [...]."""
    logp = log_softmax(np.asarray(logits, dtype=np.float64))
    targets = np.asarray(targets)
    losses = [-logp[i][t] for i, t in np.ndenumerate(targets) if t != ignore_index]
    return sum(losses) / len(losses)


# ---- Training and evaluation ---------------------------------------------------------------------


def adamw_step(p, g, m, v, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
    """One step of AdamW (arXiv 1711.05101, algorithm 2), step = 1, 2, ... Returns the new
    (p, m, v).

        p <- p - lr wd p
        m <- b1 m + (1-b1) g
        v <- b2 v + (1-b2) g^2
        p <- p - lr (m / (1-b1^step)) / (sqrt(v / (1-b2^step)) + eps)
    """
    b1, b2 = betas
    p = p - lr * weight_decay * p
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    return p - lr * (m / (1 - b1 ** step)) / (np.sqrt(v / (1 - b2 ** step)) + eps), m, v


def sliding_windows(n, window, stride):
    """For every target i = 1..n-1 of a document of n tokens: (i, begin), where tokens[begin:i] is
    what the model may look at.

    Windows begin at 0, stride, 2 stride, ... and feed at most `window` tokens, which predict the
    targets begin+1..begin+window. A target belongs to the first window that reaches it, so each is
    scored exactly once, for 1 <= stride <= window. (Where a window is said to contain its targets,
    inputs and last target together being W tokens, call this with window = W - 1.)
    """
    for i in range(1, n):
        begin = 0
        while begin + window < i:
            begin += stride
        yield i, begin


def sliding_window_perplexity(documents, window, stride, logprob, bos=None):
    """exp(total negative log-likelihood / number of scored tokens) over all documents. Returns
    (perplexity, scored tokens).

    logprob(context, token): the natural log-probability of `token` after the list `context`. With
    `bos`, that token stands in front of every window, in addition to its tokens, and token 0 of a
    document is scored too.
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
