// The whole LLaMA for the browser: model.py once more, one text at a time.
//
//     T  new tokens    S  all tokens    C  width    D  head_dim    F  ffn_dim    V  vocabulary
//
// A matrix [rows, columns] is a Float32Array, row after row. Sums are made in double precision.
"use strict";

// ---- Parts --------------------------------------------------------------------------------------

// x [T, I] times weight [O, I] transposed: [T, O]. Four outputs at a time, for speed: each number
// of x is read once for four products.
function linear(x, weight, I) {
  const T = x.length / I;
  const O = weight.length / I;
  const out = new Float32Array(T * O);
  for (let t = 0; t < T; t++) {
    for (let o = 0; o < O; o += 4) {
      const a = o * I, b = a + I, c = b + I, d = c + I;
      let sumA = 0, sumB = 0, sumC = 0, sumD = 0;
      for (let i = 0; i < I; i++) {
        const value = x[t * I + i];
        sumA += value * weight[a + i];
        sumB += value * weight[b + i];
        sumC += value * weight[c + i];
        sumD += value * weight[d + i];
      }
      const at = t * O + o;
      out[at] = sumA;
      out[at + 1] = sumB;
      out[at + 2] = sumC;
      out[at + 3] = sumD;
    }
  }
  return out;
}

function add(x, y) {
  return x.map((value, i) => value + y[i]);
}

// x / sqrt(mean(x^2) + eps) * weight, row by row: [T, C] -> [T, C]
function rmsNorm(x, weight, eps) {
  const C = weight.length;
  const out = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += C) {
    let squares = 0;
    for (let c = 0; c < C; c++) squares += x[start + c] ** 2;
    const scale = 1 / Math.sqrt(squares / C + eps);
    for (let c = 0; c < C; c++) out[start + c] = x[start + c] * scale * weight[c];
  }
  return out;
}

// SwiGLU: w2(silu(w1 x) * w3 x)
function feedForward(x, weights, C) {
  const gate = linear(x, weights.w1, C);                                              // [T, F]
  const up = linear(x, weights.w3, C);
  const hidden = gate.map((value, i) => value / (1 + Math.exp(-value)) * up[i]);
  return linear(hidden, weights.w2, weights.w1.length / C);                           // [T, C]
}

// ---- Attention over bands: one softmax for all --------------------------------------------------

// q [T, C], k and v [S, C], not yet rotated -> { out [T, C], last: [H][S] }, where `last` are the
// shares of attention of the last query. The T queries are the last T of the S positions.
function attention(q, k, v, rope, config) {
  const { dim: C, headDim: D } = config;
  const T = q.length / C;
  const S = k.length / C;
  const bands = rotatedBands(q, k, rope, T, S, D);
  const out = new Float32Array(T * C);
  const last = [];
  for (let head = 0; head < C; head += D) {                        // where the head's columns begin
    for (let t = 0; t < T; t++) {
      const shares = softmax(scoresOf(t, S - T + t, head, bands, C, D));
      out.set(weightedSum(shares, v, head, C, D), t * C + head);
      if (t === T - 1) last.push(shares);
    }
  }
  return { out, last };
}

// The queries and keys of each band, rotated as it says.
function rotatedBands(q, k, rope, T, S, D) {
  const n = Array.from({ length: S }, (_, place) => place);
  const m = n.slice(S - T);
  const temperature = temperatures[rope.temperature];
  const queryScale = m.map(place => rope.attentionFactor * temperature(place, rope.L));
  const keyScale = n.map(() => rope.attentionFactor);
  return bandsOf(rope).map(band => ({
    ...band,
    queries: rotate(q, m.map(band.q), rope.frequencies, D, queryScale),
    keys: rotate(k, n.map(band.k), rope.frequencies, D, keyScale) }));
}

// q . k / sqrt(D) of the query at m with all keys up to itself: [m + 1], -Infinity where a key is
// in no band.
function scoresOf(t, m, head, bands, C, D) {
  const scores = new Float64Array(m + 1).fill(-Infinity);
  for (const band of bands) {
    const { queries, keys } = band;
    const [first, stop] = keysOf(band, m);
    for (let n = first; n < stop; n++) {
      scores[n] = dot(queries, t * C + head, keys, n * C + head, D) / Math.sqrt(D);
    }
  }
  return scores;
}

// The scalar product of D numbers of a, from the index i, and of b, from j.
function dot(a, i, b, j, D) {
  let even = 0, odd = 0;                          // two sums, which the processor makes at once
  for (let d = 0; d < D; d += 2) {
    even += a[i + d] * b[j + d];
    odd += a[i + d + 1] * b[j + d + 1];
  }
  return even + odd;
}

// exp(score) / their sum
function softmax(scores) {
  const shares = new Float64Array(scores.length);
  let highest = -Infinity;
  for (let n = 0; n < scores.length; n++) highest = Math.max(highest, scores[n]);
  let total = 0;
  for (let n = 0; n < scores.length; n++) {
    shares[n] = Math.exp(scores[n] - highest);
    total += shares[n];
  }
  for (let n = 0; n < scores.length; n++) shares[n] /= total;
  return shares;
}

// The sum of a head's values, each times its share: [D]
function weightedSum(shares, v, head, C, D) {
  const total = new Float64Array(D);
  for (let n = 0; n < shares.length; n++) {
    for (let d = 0; d < D; d++) total[d] += shares[n] * v[n * C + head + d];
  }
  return total;
}

// ---- The model ----------------------------------------------------------------------------------

class LLaMA {
  // weights: { name: Float32Array }, with Meta's names. config: { dim, headDim, layers, eps }
  constructor(weights, config) {
    this.config = config;
    this.embeddings = weights["tok_embeddings.weight"];
    this.norm = weights["norm.weight"];
    this.output = weights["output.weight"];
    this.layers = [];
    for (let layer = 0; layer < config.layers; layer++) {
      const of = name => weights[`layers.${layer}.${name}.weight`];
      this.layers.push({
        wq: of("attention.wq"), wk: of("attention.wk"),
        wv: of("attention.wv"), wo: of("attention.wo"),
        w1: of("feed_forward.w1"), w2: of("feed_forward.w2"), w3: of("feed_forward.w3"),
        attentionNorm: of("attention_norm"), ffnNorm: of("ffn_norm") });
    }
  }

  // Final states of new tokens, [T, C], and the last token's attention, [layer][head][S].
  // cache: an empty array at first; afterwards it holds the keys and values of each layer, and the
  // next tokens follow those that it holds. progress(share of the work done) is called by layer.
  hidden(tokens, rope, cache, progress = () => {}) {
    const { dim: C, eps } = this.config;
    let x = new Float32Array(tokens.length * C);
    tokens.forEach((id, t) => x.set(this.embeddings.subarray(id * C, (id + 1) * C), t * C));
    const attentions = [];
    this.layers.forEach((layer, index) => {
      progress(index / this.layers.length);
      const normed = rmsNorm(x, layer.attentionNorm, eps);
      const before = cache[index] ?? { k: new Float32Array(), v: new Float32Array() };
      const k = joined(before.k, linear(normed, layer.wk, C));                        // [S, C]
      const v = joined(before.v, linear(normed, layer.wv, C));
      cache[index] = { k, v };
      const { out, last } = attention(linear(normed, layer.wq, C), k, v, rope, this.config);
      attentions.push(last);
      x = add(x, linear(out, layer.wo, C));
      x = add(x, feedForward(rmsNorm(x, layer.ffnNorm, eps), layer, C));
    });
    progress(1);
    return { states: rmsNorm(x, this.norm, eps), attentions };
  }

  // Logits of the next token, [T, C] -> [T, V].
  logits(states) {
    return linear(states, this.output, this.config.dim);
  }
}

function joined(before, after) {
  const all = new Float32Array(before.length + after.length);
  all.set(before);
  all.set(after, before.length);
  return all;
}

// -ln p(next token) in nats: logits [T, V] and T + 1 tokens -> [T]
function losses(logits, tokens) {
  const T = tokens.length - 1;
  const V = logits.length / T;
  return Float32Array.from({ length: T }, (_, t) => {
    const shares = softmax(Float64Array.from(logits.subarray(t * V, (t + 1) * V)));
    return -Math.log(shares[tokens[t + 1]]);
  });
}

// The most probable of V logits.
function greedy(logits) {
  return logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
}
