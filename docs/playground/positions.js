// Where tokens stand, and by which angles their pairs turn: rope.py and methods/ for the browser.
//
// The frequencies are not computed here. They come as a table from the Python functions, for each
// method and factor. What is written once more in this file (a rotation, the distance maps, the
// temperatures) is held to the Python by tests/test_playground.py.
//
//     m  position of a query    n  position of a key    L  original window    s  factor = L'/L
"use strict";

// (u, v) -> (u cos - v sin, u sin + v cos) for every pair of every head. x [T, C] -> [T, C].
// Row t stands at places[t]; its angles are places[t] * frequencies. scale [T] multiplies the rows.
function rotate(x, places, frequencies, headDim, scale) {
  const T = places.length;
  const C = x.length / T;
  const rotated = new Float32Array(x.length);
  for (let t = 0; t < T; t++) {
    for (let i = 0; i < headDim / 2; i++) {
      const angle = Math.fround(places[t] * frequencies[i]);   // a float32, as in rope.py
      const cos = Math.cos(angle) * scale[t];
      const sin = Math.sin(angle) * scale[t];
      for (let u = t * C + 2 * i; u < (t + 1) * C; u += headDim) {
        rotated[u] = x[u] * cos - x[u + 1] * sin;
        rotated[u + 1] = x[u] * sin + x[u + 1] * cos;
      }
    }
  }
  return rotated;
}

// ---- Distance maps ------------------------------------------------------------------------------
//
// A map cuts the keys that a query sees into bands. In a band, the keys first(m) <= n < stop(m),
// the query stands at q(m) and a key at k(n): the model sees the distance q(m) - k(n).

const itself = place => place;
const constant = place => () => place;
const plain = { first: constant(0), stop: m => m + 1, q: itself, k: itself };

// The least k with w + (L' - w) / k <= L.
function leastStretch(L, s, w) {
  return Math.max(1, (Math.round(L * s) - w) / Math.max(1, L - w));
}

const distanceMaps = {
  // min(m - n, w): all that is far stands at the distance w.
  rerope: (L, s, { window: w = Math.floor(L / 2) }) => [
    { first: constant(0), stop: m => m - w + 1, q: constant(w), k: constant(0) },
    { first: m => m - w + 1, stop: m => m + 1, q: itself, k: itself }],

  // w + (m - n - w) / k beyond w: far tokens stand k times closer together.
  leaky_rerope(L, s, { window: w = Math.floor(L / 2), stretch: k = leastStretch(L, s, w) }) {
    return [
      { first: constant(0), stop: m => m - w + 1, q: m => m / k + w - w / k, k: n => n / k },
      { first: m => m - w + 1, stop: m => m + 1, q: itself, k: itself }];
  },

  // m//g + w - w//g - n//g beyond w: g neighbours share a place.
  self_extend(L, s, { window: w = Math.floor(L / 4), group }) {
    const g = group ?? Math.ceil(leastStretch(L, s, w));
    const grouped = place => Math.floor(place / g);
    const q = m => grouped(m) + w - grouped(w);
    return [
      { first: constant(0), stop: m => m - w + 1, q, k: grouped },
      { first: m => m - w + 1, stop: m => m + 1, q: itself, k: itself }];
  },

  // Chunks of h = c - w tokens: exact in a chunk and to the w tokens before, at most c - 1 beyond.
  dca(L, s, { chunk: c = Math.floor(3 * L / 4), local: w = Math.floor(L / 4) }) {
    const h = c - w;
    const start = m => m - m % h;
    const k = n => n % h;
    return [
      { first: constant(0), stop: m => start(m) - h, q: constant(c - 1), k },
      { first: m => start(m) - h, stop: start, q: m => Math.min(m % h + h, c - 1), k },
      { first: start, stop: m => m + 1, q: m => m % h, k }];
  },

  // The first tokens and the last w, as if nothing had been between them.
  streaming(L, s, { sinks = 4, window: w = Math.max(1, L - sinks) }) {
    const stop = m => Math.min(m - w + 1, sinks);
    return [
      { first: constant(0), stop, q: m => Math.min(m, sinks + w - 1), k: itself },
      { first: m => m - w + 1, stop: m => m + 1, q: itself, k: itself }];
  },
};

// The bands of a method; one, with every key at its place, where it maps no distances.
function bandsOf(rope) {
  const map = distanceMaps[rope.method];
  return map ? map(rope.L, rope.factor, rope.settings) : [plain];
}

// The keys of a band that the query at m sees, as [first, stop).
function keysOf(band, m) {
  return [Math.max(0, band.first(m)), Math.min(band.stop(m), m + 1)];
}

// ---- Temperatures -------------------------------------------------------------------------------

// What a query at m, which sees n = m + 1 keys, is multiplied by.
const temperatures = {
  none: () => 1,
  log_n: (m, L) => Math.max(1, Math.log(m + 1) / Math.log(L)),
  llama4: (m, L) => 1 + 0.1 * Math.log1p(Math.floor(m / L)),
};
