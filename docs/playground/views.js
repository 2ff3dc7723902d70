// The drawings. Each function takes an element and what it shows, and returns a line that says the
// same in words: for the caption, and for those who cannot see the drawing.
"use strict";

const TURN = 2 * Math.PI;

const sum = values => values.reduce((total, value) => total + value, 0);
const mean = values => sum(values) / values.length;
const percent = share => `${(100 * share).toFixed(0)} %`;

// An element of an SVG.
function shape(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function words(x, y, anchor, text) {
  return shape("text", { class: "tick", x, y, "text-anchor": anchor }, text);
}

function line(points, className) {
  const pairs = points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`);
  return shape("polyline", { class: className, points: pairs.join(" ") });
}

// ---- Axes ---------------------------------------------------------------------------------------

// Clears an <svg> and draws axes: x from 0 to xMax in tokens, y from 0 to yMax, which is `yName`.
// marks: [[x, name]]. Returns { x, y }, the functions from numbers to pixels.
function axes(svg, xMax, yMax, yName, yTicks, marks) {
  const width = Math.max(svg.clientWidth, 160);
  const height = Math.max(svg.clientHeight, 100);
  const left = 40, right = width - 16, top = 30, bottom = height - 38;
  const x = value => left + value / xMax * (right - left);
  const y = value => bottom - value / yMax * (bottom - top);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  for (const value of yTicks) {
    svg.append(line([[left, y(value)], [right, y(value)]], "grid"));
    svg.append(words(left - 6, y(value) + 4, "end", value));
  }
  svg.append(words(2, 12, "start", yName));
  svg.append(words((left + right) / 2, height - 4, "middle", "position (tokens)"));
  const step = [8, 16, 32, 64, 128, 256, 512].find(size => xMax / size <= Math.max(4, width / 90));
  for (let value = 0; value <= xMax; value += step) {
    svg.append(words(x(value), height - 22, "middle", value));
  }
  for (const [value, name] of marks.filter(([value]) => value > 0 && value < xMax)) {
    svg.append(line([[x(value), top], [x(value), bottom]], "mark"));
    svg.append(words(x(value), 24, "middle", name));
  }
  return { x, y };
}

// ---- The loss by position -----------------------------------------------------------------------

// The mean loss of about 32 stretches of the text: [[position, loss]].
function smoothed(nll) {
  const size = Math.max(8, Math.ceil(nll.length / 32));
  const points = [];
  for (let start = 0; start < nll.length; start += size) {
    const part = nll.subarray(start, start + size);
    points.push([start + part.length / 2, mean(part)]);
  }
  return points;
}

// curves: [{ nll, className, name }], the last one on top and in words. The dashes are its means
// within the window and beyond it.
function drawLosses(svg, curves, L) {
  const { nll, name } = curves.at(-1);
  const drawn = curves.map(curve => smoothed(curve.nll));
  const highest = Math.max(8, ...drawn.flat().map(([, loss]) => loss));
  const { x, y } = axes(svg, nll.length, highest, "nats", [0, 2, 4, 6, 8], [[L, `L = ${L}`]]);
  drawn.forEach((points, i) => {
    const pixels = points.map(([position, loss]) => [x(position), y(loss)]);
    svg.append(line(pixels, curves[i].className));
  });
  const dashes = (loss, from, to) => {
    svg.append(line([[x(from), y(loss)], [x(to), y(loss)]], "dashes"));
    return loss.toFixed(2);
  };
  const inside = dashes(mean(nll.subarray(0, L)), 0, Math.min(L, nll.length));
  if (nll.length <= L) return `${name}: ${inside} nats a token. The text ends within the window.`;
  const beyond = dashes(mean(nll.subarray(L)), L, nll.length);
  return `${name}: ${inside} nats a token within the window, ${beyond} beyond it.`;
}

// ---- Attention ----------------------------------------------------------------------------------

// shares [S]: the last token's attention. span: [first, stop) of the key's sentence, or null.
// tokenText(n) is the text of the token at n.
function drawAttention(svg, shares, span, tokenText, L) {
  const S = shares.length;
  const size = Math.ceil(S / 128);                                      // tokens in a bar
  const bars = [];
  for (let n = 0; n < S; n += size) bars.push(sum(shares.subarray(n, n + size)));
  const highest = [0.25, 0.5, 1].find(value => value >= Math.max(...bars)) ?? 1;
  const name = size === 1 ? "share of attention" : `share, of ${size} tokens a bar`;
  const ticks = [0, highest / 2, highest];
  const { x, y } = axes(svg, S, highest, name, ticks, [[S - L, "L tokens back"]]);
  const bar = (className, from, to, share) => svg.append(shape("rect", {
    class: className, x: x(from), width: x(to) - x(from), y: y(share), height: y(0) - y(share) }));
  if (span) bar("span", ...span, highest);
  bars.forEach((share, i) => bar("bar", i * size, Math.min(S, (i + 0.9) * size), share));

  const strongest = Array.from(shares.keys()).sort((a, b) => shares[b] - shares[a]).slice(0, 3);
  const named = strongest.map(
    n => `${JSON.stringify(tokenText(n))} at ${n} (${percent(shares[n])})`);
  const onKey = span ? `${percent(sum(shares.subarray(...span)))} on the key's sentence. ` : "";
  return `${onKey}Strongest: ${named.join(", ")}.`;
}

// ---- Angles -------------------------------------------------------------------------------------

// The farthest that the model sees a key in a text of T tokens, in places.
function farthest(rope, T) {
  let most = 0;
  for (const band of bandsOf(rope)) {
    for (let m = 0; m < T; m++) {
      const [first, stop] = keysOf(band, m);
      for (let n = first; n < stop; n++) most = Math.max(most, band.q(m) - band.k(n));
    }
  }
  return most;
}

// Whether at this distance a pair turns further than at any distance of training. trained: theta_i.
function isNew(distance, pair, rope, trained) {
  const seen = rope.L * trained[pair];
  const asked = distance * rope.frequencies[pair];
  return seen < TURN && asked > seen * (1 + 1e-6);
}

// A dial for each pair: the outer ring is what training has shown, the inner one what T tokens ask.
function drawDials(container, rope, trained, T) {
  const most = farthest(rope, T);
  const pairs = Array.from(trained.keys());
  const fresh = pairs.filter(pair => isNew(most, pair, rope, trained));
  container.replaceChildren(...pairs.map(pair => {
    const seen = rope.L * trained[pair];
    const asked = most * rope.frequencies[pair];
    const turns = angle => (angle / TURN).toPrecision(2);
    const name = `pair ${pair}: training ${turns(seen)} turns, this text ${turns(asked)}`;
    const dial = shape("svg", { viewBox: "-22 -22 44 44", class: "dial" },
      shape("title", {}, name), words(0, 4, "middle", pair),
      arc(18, 0, TURN, "groove"), arc(18, 0, seen, "seen"),
      arc(12, 0, TURN, "groove"), arc(12, 0, asked, "asked"));
    if (fresh.includes(pair)) dial.append(arc(12, seen, asked, "new"));
    return dial;
  }));
  const count = ["No pair meets", "One pair meets"][fresh.length]
                ?? `${fresh.length} of ${pairs.length} pairs meet`;
  const speeds = [0, 8, 16, 31].map(pair => +(rope.frequencies[pair] / trained[pair]).toFixed(2));
  return `${count} angles that training never showed. The farthest key stands at a distance of `
         + `${+most.toFixed(1)}. Pairs 0, 8, 16 and 31 turn ${speeds.join(", ")} times as fast as `
         + "in training.";
}

// A part of a ring around 0, clockwise from the top; at most a whole turn.
function arc(radius, from, to, className) {
  if (to >= TURN && from === 0) return shape("circle", { class: className, r: radius });
  const end = Math.min(to, TURN);
  const point = angle => [radius * Math.sin(angle), -radius * Math.cos(angle)]
    .map(number => number.toFixed(2)).join(" ");
  const large = end - from > Math.PI ? 1 : 0;
  const path = `M ${point(from)} A ${radius} ${radius} 0 ${large} 1 ${point(end)}`;
  return shape("path", { class: className, d: path });
}

// ---- Distances ----------------------------------------------------------------------------------

// The distance at which the query at m sees the key at n, in places; null if it does not.
function distanceSeen(bands, m, n) {
  for (const band of bands) {
    const [first, stop] = keysOf(band, m);
    if (first <= n && n < stop) return band.q(m) - band.k(n);
  }
  return null;
}

// A picture of all queries (from top to bottom) and keys (from left to right), for one pair.
function drawDistances(canvas, rope, trained, T, pair) {
  const bands = bandsOf(rope);
  const paint = palette(canvas);
  const share = distance => distance * rope.frequencies[pair] / (rope.L * trained[pair]);
  const pixels = canvas.width;
  const image = new ImageData(pixels, pixels);
  const place = pixel => Math.floor((pixel + 0.5) * T / pixels);
  for (let row = 0; row < pixels; row++) {
    for (let column = 0; column < pixels; column++) {
      const distance = distanceSeen(bands, place(row), place(column));
      let colour = paint.unseen;
      if (distance !== null) colour = paint.between(Math.min(1, share(distance)));
      if (distance !== null && isNew(distance, pair, rope, trained)) colour = paint.fresh;
      image.data.set([...colour, 255], 4 * (row * pixels + column));
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);

  const last = T - 1;
  const asSeen = distance => {
    const seen = distanceSeen(bands, last, last - distance);
    return seen === null ? "unseen" : +(rope.L * share(seen)).toFixed(1);
  };
  const examples = [1, Math.floor(last / 2), last].map(d => `${d} → ${asSeen(d)}`);
  return `For the last token, pair ${pair} sees the distances ${examples.join(", ")}.`;
}

// The colours of the style sheet, as [red, green, blue].
function palette(canvas) {
  const style = getComputedStyle(canvas);
  const colour = name => style.getPropertyValue(name).split(" ").map(Number);
  const near = colour("--near"), far = colour("--far");
  return { fresh: colour("--new"), unseen: colour("--unseen"),
           between: share => near.map((value, i) => value + share * (far[i] - value)) };
}
