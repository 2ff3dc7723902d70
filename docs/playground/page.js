// The page: settings, the link that carries them, and the views that follow.
"use strict";

const tables = JSON.parse(document.getElementById("tables").textContent);
const { window: L, longest } = tables.config;
const trained = tables.methods.default[0].frequencies;   // theta_i of training
const tokenizer = new Tokenizer(tables.pieces, tables.bos);
const form = document.getElementById("settings");
const show = id => document.getElementById(id);
const weights = readWeights();

// The reading at work, or the last one: its worker, its captions, and what the worker has sent.
let reading = null;         // { worker, name, key, tokens, text, passkey, plain }
let kept = null;            // { name, nll }: a curve that the reader wants to compare with
const plainLosses = { text: "", byTokens: new Map() };  // of plain RoPE, for the last text

// ---- Weights ------------------------------------------------------------------------------------

// { name: Float32Array } from float16 in base64.
function readWeights() {
  const bytes = atob(show("weights").textContent.replace(/\s/g, ""));
  const decoded = {};
  let at = 0;
  for (const [name, dimensions] of tables.tensors) {
    const tensor = new Float32Array(dimensions.reduce((a, b) => a * b));
    for (let i = 0; i < tensor.length; i++, at += 2) {
      tensor[i] = fromHalf(bytes.charCodeAt(at) | bytes.charCodeAt(at + 1) << 8);
    }
    decoded[name] = tensor;
  }
  return decoded;
}

// A float16: sign, 5 bits of exponent, 10 of fraction.
function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = bits >> 10 & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

// ---- Settings -----------------------------------------------------------------------------------

const control = name => form.elements.namedItem(name);
const value = name => control(name).value;

// What the model is told about positions.
function ropeOf(method, factor, temperature) {
  const row = (tables.methods[method] ?? tables.methods.default)[tables.factors.indexOf(factor)];
  const own = temperature === "own";
  return { method, factor, L, settings: mapSettings(method), frequencies: row.frequencies,
           attentionFactor: own ? row.attentionFactor : 1,
           temperature: own ? "none" : temperature };
}

// Of a map's own settings those that are not left empty: [[control, name in Python]].
function typedSettings(method) {
  const names = tables.maps[method] ?? [];
  const pairs = [["w", names[0]], ["g", names[1]]];
  const typed = field => value(field) !== "" || control(field).validity.badInput;
  return pairs.filter(([field, name]) => name && typed(field));
}

// The others follow from L and the factor.
function mapSettings(method) {
  const typed = typedSettings(method);
  return Object.fromEntries(typed.map(([field, name]) => [name, Number(value(field))]));
}

function currentRope() {
  return ropeOf(value("method"), Number(value("factor")), value("temperature"));
}

// Whether another factor would change anything.
function factorMatters(method) {
  const [two, eight] = [2, 8].map(factor => ropeOf(method, factor, "own"));
  const seen = rope => distanceSeen(bandsOf(rope), longest - 1, 0);
  return two.frequencies.some((theta, pair) => theta !== eight.frequencies[pair])
         || seen(two) !== seen(eight);
}

function currentText() {
  return value("text") === "own" ? value("own") : tables.samples[value("text")];
}

// A line about what cannot be, or "".
function problemOf() {
  if (currentText().trim() === "") return "The text is empty: type one, or choose a sample.";
  if (!/^\d{1,9}$/.test(value("key"))) return "The passkey: give one to nine digits.";
  const method = value("method");
  for (const [field, name] of typedSettings(method)) {
    const least = name === "sinks" || name === "local" ? 0 : 1;
    const kind = name === "stretch" ? "number" : "whole number";
    const number = Number(value(field));
    const good = value(field) !== "" && number >= least && number <= longest
                 && (kind === "number" || Number.isInteger(number));
    if (!good) return `${name}: give a ${kind} from ${least} to ${longest}, or nothing.`;
  }
  const { chunk = Math.floor(3 * L / 4), local = Math.floor(L / 4) } = mapSettings("dca");
  if (method === "dca" && 2 * local > chunk) return "local: at most half of the chunk.";
  return "";
}

// ---- The link -----------------------------------------------------------------------------------

// Sets the controls as the link says. Returns a line about what it could not set.
function followLink() {
  const refused = [];
  const lines = text => text.replace(/\r\n/g, "\n");
  for (const [name, wanted] of new URLSearchParams(location.hash.slice(1))) {
    const target = control(name);
    if (!target) {
      refused.push(`The link has a setting “${name}”, which this page does not have.`);
      continue;
    }
    const before = target.value;
    target.value = wanted;
    if (target.selectedIndex !== -1 && lines(target.value) === lines(wanted)) continue;
    target.value = before;
    refused.push(`The link says ${name} = “${wanted.slice(0, 40)}”, which cannot be chosen; `
                 + `it stays ${before || "empty"}.`);
  }
  return refused.join(" ");
}

// What stands behind the # of the address: all that is not as at first. leftOut: names.
function linkOf(...leftOut) {
  const all = new URLSearchParams();
  for (const { name, value: chosen, dataset } of form.elements) {
    if (!name || chosen === dataset.first || leftOut.includes(name)) continue;
    if (name === "own" && (value("text") !== "own" || isLong(chosen))) continue;
    all.set(name, chosen);
  }
  return String(all);
}

function writeLink() {
  history.replaceState(null, "", "#" + linkOf());
}

function isLong(text) {
  return text.length > 4000;
}

// ---- Following the settings ---------------------------------------------------------------------

// Shows which settings there are, refuses what cannot be, and reads the texts anew.
function settingsChanged(refused = "") {
  const method = value("method");
  const names = tables.maps[method];
  show("map-settings").hidden = !names;
  show("g-label").hidden = !names?.[1];
  if (names) {
    show("w-name").textContent = names[0];
    show("g-name").textContent = names[1] ?? "";
  }
  show("method-words").textContent = control("method").selectedOptions[0].dataset.words;
  control("factor").disabled = !factorMatters(method);
  show("own-text").hidden = value("text") !== "own";
  showNumbers();
  writeLink();
  showStep();
  const problem = problemOf();
  const long = value("text") === "own" && isLong(value("own"));
  const remark = long ? "The text is too long for the address: a link will not carry it." : "";
  show("problem").textContent = [refused, problem, remark].filter(Boolean).join(" ");
  stop();
  if (problem) return;
  drawPositions();
  start();
}

function showNumbers() {
  show("tokens-now").textContent = value("tokens");
  show("depth-now").textContent = value("depth") + " %";
  show("pair-now").textContent = value("pair");
}

// Ends the reading. What was drawn of it is dimmed until something else takes its place.
function stop() {
  reading?.worker.terminate();
  reading = null;
  for (const section of document.querySelectorAll("#results section")) {
    section.classList.add("stale");
  }
  say(0, "");
}

function start() {
  const rope = currentRope();
  const text = currentText();
  const tokens = Number(value("tokens"));
  const isPlain = rope.method === "default" && rope.temperature === "none";
  if (plainLosses.text !== text) {
    plainLosses.text = text;
    plainLosses.byTokens.clear();
  }
  const worker = new Worker(workerAddress);
  reading = { worker, name: methodName(), key: value("key"), tokens, isPlain };
  if (!isPlain) reading.plain = plainLosses.byTokens.get(tokens);
  const plain = isPlain || reading.plain ? null : ropeOf("default", 1, "own");
  const started = performance.now();
  worker.onerror = event => say(0, `The worker failed: ${event.message}`);
  worker.onmessage = ({ data }) => {
    if (reading?.worker !== worker) return;              // it has been ended meanwhile
    if (data.kind === "progress") say(data.share, "reading …");
    if (data.kind === "done") say(1, `read in ${seconds(started)} s`);
    if (data.kind in receive) receive[data.kind](data);
  };
  say(0, "reading …");
  const job = { rope, plain, text, length: tokens, key: value("key"), depth: value("depth") / 100 };
  worker.postMessage({ weights, tables, job });
}

// What the worker sends, by its kind.
const receive = {
  text(data) {
    reading.text = data;
    if (reading.isPlain) plainLosses.byTokens.set(reading.tokens, data.nll);
    drawText();
    if (value("from") === "text") drawAttentionOf(data);
  },
  plain(data) {
    reading.plain = data.nll;
    plainLosses.byTokens.set(reading.tokens, data.nll);
    drawText();
  },
  passkey(data) {
    reading.passkey = data;
    drawPasskey();
    if (value("from") === "passkey") drawAttentionOf(data);
  },
};

// The worker runs the page's own scripts: a file opened from disk may load no others.
const sources = ["tokenizer", "positions", "passkey", "model"].map(id => show(id).textContent);
const workerCode = [...sources, show("worker").textContent].join("\n");
const workerAddress = URL.createObjectURL(new Blob([workerCode], { type: "text/javascript" }));

function say(share, words) {
  show("progress").value = share;
  show("progress").hidden = share === 0 || share === 1;
  put("status", words);
}

const seconds = started => ((performance.now() - started) / 1000).toFixed(1);

// Screen readers say a text again whenever it is set.
function put(id, words) {
  if (show(id).textContent !== words) show(id).textContent = words;
}

// ---- Views --------------------------------------------------------------------------------------

function methodName() {
  const chosen = name => control(name).selectedOptions[0].textContent;
  const factor = factorMatters(value("method")) ? ` × ${value("factor")}` : "";
  if (value("temperature") === "own") return chosen("method") + factor;
  return `${chosen("method")}${factor}, temperature ${chosen("temperature")}`;
}

// Shows words under a drawing, which is as new as they are.
function caption(id, words) {
  put(`${id}-words`, words);
  show(id).closest("section").classList.remove("stale");
}

// What needs no model: angles and distances.
function drawPositions() {
  const T = Number(value("tokens"));
  const rope = currentRope();
  const pair = Number(value("pair"));
  caption("dials", drawDials(show("dials"), rope, trained, T));
  caption("distances", drawDistances(show("distances"), rope, trained, T, pair));
}

function drawText() {
  const { text: { nll }, plain, name, tokens } = reading;
  const curves = [{ nll, className: "curve", name }];
  if (plain) curves.unshift({ nll: plain, className: "plain" });
  if (kept) curves.unshift({ nll: kept.nll.subarray(0, nll.length), className: "kept" });
  const short = nll.length < tokens ? ` The text has only ${nll.length} tokens.` : "";
  caption("losses", drawLosses(show("losses"), curves, L) + short);
  show("plain-legend").hidden = !plain;
  showKept();
}

function showKept() {
  show("kept-legend").hidden = !kept;
  show("kept-name").textContent = kept?.name ?? "";
}

function drawPasskey() {
  const { passkey: { shortest, written, found, distance }, key } = reading;
  show("verdict").className = shortest ? "" : found ? "found" : "lost";
  if (shortest) {
    put("verdict", `A prompt with this passkey has at least ${shortest} tokens: choose a longer `
                   + "text.");
  } else {
    put("verdict", `${found ? "Found" : "Lost"}: the key ${key} lies ${distance} tokens back, `
                   + `and the model writes ${JSON.stringify(written.trim())}.`);
  }
}

// The attention of a text or of a passkey prompt, as the worker has sent it.
function drawAttentionOf({ attentions, tokens, sentence }) {
  if (!attentions) {                                     // of a prompt that could not be built
    show("attention").replaceChildren();
    caption("attention", "");
    return;
  }
  const shares = attentions[value("layer")][value("head")];
  const textOf = n => tokenizer.decode([tokens[n]]) || "BOS";
  caption("attention", drawAttention(show("attention"), shares, sentence ?? null, textOf, L));
}

function drawResults() {
  if (reading?.text) drawText();
  if (reading?.passkey) drawPasskey();
  const source = reading?.[value("from")];
  if (source) drawAttentionOf(source);
}

// ---- Controls -----------------------------------------------------------------------------------

function fill(name, options) {
  for (const [value, text] of options) control(name).append(new Option(text, value));
}

fill("factor", tables.factors.map(factor => [factor, factor]));
fill("layer", Array.from({ length: tables.config.layers }, (_, i) => [i, i]));
fill("head", Array.from({ length: tables.config.heads }, (_, i) => [i, i]));
fill("text", [...Object.keys(tables.samples).map(path => [path, path]), ["own", "your own"]]);
control("factor").value = "2";
control("layer").value = form.dataset.layer;
control("head").value = form.dataset.head;
for (const one of form.elements) one.dataset.first = one.value;

const viewControls = ["layer", "head", "from", "pair"];   // they need no new reading
let toRead, toWrite;        // timers, for the reader to stop typing or sliding

document.addEventListener("input", event => {      // some controls stand beside the views
  if (event.target.form !== form) return;
  const name = event.target.name;
  showNumbers();
  if (viewControls.includes(name)) {
    if (name === "pair" && !problemOf()) drawPositions();
    if (name !== "pair") drawResults();
    clearTimeout(toWrite);
    toWrite = setTimeout(writeLink, 200);
    return;
  }
  if (name === "method") control("w").value = control("g").value = "";   // they were another map's
  stop();
  clearTimeout(toRead);
  toRead = setTimeout(settingsChanged, 200);
});

// Of changes that wait for the reader to stop.
function forgetChanges() {
  clearTimeout(toRead);
  clearTimeout(toWrite);
}

form.addEventListener("submit", event => event.preventDefault());

show("keep").addEventListener("click", () => {
  if (!reading?.text) return;
  kept = { nll: reading.text.nll, name: `${reading.name}, ${reading.text.nll.length} tokens` };
  drawText();
});
show("forget").addEventListener("click", () => {
  kept = null;
  showKept();
  if (reading?.text) drawText();
});

// ---- The walk -----------------------------------------------------------------------------------

const steps = [...document.querySelectorAll("#walk li")];

// Shows the step with these settings; with the reader's own, the last step stays, dimmed. Which
// layer, head or pair is looked at does not matter.
function showStep() {
  const link = linkOf(...viewControls);
  const found = steps.findIndex(step => step.dataset.link.replace(/&?pair=\d+/, "") === link);
  if (found >= 0) steps.forEach((step, index) => { step.hidden = index !== found; });
  const now = steps.findIndex(step => !step.hidden);
  show("back").disabled = now === 0;
  show("next").disabled = now === steps.length - 1;
  const others = found < 0 ? " has other settings" : "";
  show("step-now").textContent = `Step ${now + 1} of ${steps.length}${others}`;
  show("walk").classList.toggle("left", found < 0);
  show("return").hidden = found >= 0;
}

// Back, next, or again.
function walk(by) {
  const now = steps.findIndex(step => !step.hidden);
  forgetChanges();
  location.hash = steps[now + by].dataset.link;
  if (show("walk").getBoundingClientRect().top < 0) show("walk").scrollIntoView();
}

show("back").addEventListener("click", () => walk(-1));
show("next").addEventListener("click", () => walk(1));
show("return").addEventListener("click", () => walk(0));

// ---- Begin --------------------------------------------------------------------------------------

// Follows the address: without settings in it, the walk's first step. A text of the reader's own
// stays in its field.
function arrive() {
  forgetChanges();
  for (const one of form.elements) {
    if (one.name && one.name !== "own") one.value = one.dataset.first;
  }
  settingsChanged(followLink());
}

window.addEventListener("hashchange", arrive);
window.addEventListener("resize", () => {
  if (problemOf()) return;
  drawPositions();
  drawResults();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (!problemOf()) drawPositions();
});
steps.forEach((step, index) => { step.hidden = index !== 0; });
show("all-settings").open = matchMedia("(min-width: 62rem)").matches;
arrive();
