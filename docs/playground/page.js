// The page: settings, the link that carries them, and the views that follow.
"use strict";

const tables = JSON.parse(document.getElementById("tables").textContent);
const { window: L, longest } = tables.config;
const trained = tables.methods.default[0].frequencies;   // theta_i of training
const tokenizer = new Tokenizer(tables.pieces, tables.bos);
const form = document.getElementById("settings");
const show = id => document.getElementById(id);
const weights = readWeights();

let worker = null;
let results = {};           // what the worker has sent: text, passkey, plain
let kept = null;            // a curve that the reader wants to compare with
const plainLosses = new Map();  // by text and length

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
    if (lines(target.value) === lines(wanted)) continue;
    target.value = before;
    refused.push(`The link says ${name} = “${wanted.slice(0, 40)}”, which cannot be chosen; `
                 + `it stays ${before || "empty"}.`);
  }
  return refused.join(" ");
}

// Returns what stands behind the # of the address.
function writeLink() {
  const all = new URLSearchParams();
  for (const { name, value: chosen, dataset } of form.elements) {
    if (!name || chosen === dataset.first) continue;
    if (name === "own" && (value("text") !== "own" || chosen.length > 4000)) continue;
    all.set(name, chosen);
  }
  history.replaceState(null, "", "#" + all);
  return String(all);
}

// ---- Following the settings ---------------------------------------------------------------------

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
  show("tokens-now").textContent = value("tokens");
  show("depth-now").textContent = value("depth") + " %";
  show("pair-now").textContent = value("pair");
  showStep(writeLink());
  const problem = problemOf();
  show("problem").textContent = [refused, problem].filter(Boolean).join(" ");
  stop();
  if (problem) return;
  drawPositions();
  start();
}

function stop() {
  worker?.terminate();
  worker = null;
  results = {};
  show("results").classList.add("stale");
  say(0, "");
}

function start() {
  const rope = currentRope();
  const text = currentText();
  const length = Number(value("tokens"));
  const isPlain = rope.method === "default" && rope.temperature === "none";
  const name = JSON.stringify([text, length]);
  if (!isPlain) results.plain = plainLosses.get(name);
  const plain = isPlain || results.plain ? null : ropeOf("default", 1, "own");
  const started = performance.now();
  const seconds = () => ((performance.now() - started) / 1000).toFixed(1);
  worker = new Worker(workerAddress);
  worker.onerror = event => say(0, `The worker failed: ${event.message}`);
  worker.onmessage = ({ data }) => {
    if (data.kind === "progress") say(data.share, "reading …");
    if (data.kind === "done") say(1, `read in ${seconds()} s`);
    if (data.kind === "text" || data.kind === "passkey") results[data.kind] = data;
    if (data.kind === "plain") results.plain = data.nll;
    if (data.kind === "plain" || data.kind === "text" && isPlain) plainLosses.set(name, data.nll);
    drawResults();
  };
  const job = { rope, plain, text, length, key: value("key"), depth: value("depth") / 100 };
  worker.postMessage({ weights, tables, job });
}

// The worker runs the page's own scripts: a file opened from disk may load no others.
const sources = ["tokenizer", "positions", "passkey", "model"].map(id => show(id).textContent);
const workerCode = [...sources, show("worker").textContent].join("\n");
const workerAddress = URL.createObjectURL(new Blob([workerCode], { type: "text/javascript" }));

function say(share, words) {
  show("progress").value = share;
  show("progress").hidden = share === 0 || share === 1;
  show("status").textContent = words;
}

// ---- Views --------------------------------------------------------------------------------------

function methodName() {
  const chosen = name => control(name).selectedOptions[0].textContent;
  const factor = factorMatters(value("method")) ? ` × ${value("factor")}` : "";
  if (value("temperature") === "own") return chosen("method") + factor;
  return `${chosen("method")}${factor}, temperature ${chosen("temperature")}`;
}

// What needs no model: angles and distances.
function drawPositions() {
  const T = Number(value("tokens"));
  const rope = currentRope();
  show("dials-words").textContent = drawDials(show("dials"), rope, trained, T);
  const pair = Number(value("pair"));
  show("distances-words").textContent = drawDistances(show("distances"), rope, trained, T, pair);
}

function drawResults() {
  if (results.text) drawText();
  if (results.passkey) drawPasskey();
  const source = results[value("from")];
  if (source?.attentions) drawAttentionOf(source);
}

function drawText() {
  show("results").classList.remove("stale");
  const curves = [{ nll: results.text.nll, className: "curve", name: methodName() }];
  if (results.plain) curves.unshift({ nll: results.plain, className: "plain", name: "plain RoPE" });
  if (kept) curves.unshift({ ...kept, className: "kept" });
  const read = results.text.nll.length;
  const short = read < Number(value("tokens")) ? ` The text has only ${read} tokens.` : "";
  show("losses-words").textContent = drawLosses(show("losses"), curves, L) + short;
  show("kept-name").textContent = kept ? kept.name : "";
  show("kept-legend").hidden = !kept;
  show("plain-legend").hidden = curves.every(curve => curve.className !== "plain");
}

function drawPasskey() {
  const { shortest, written, found, distance } = results.passkey;
  const verdict = show("verdict");
  if (shortest) {
    if (value("from") === "passkey") clear("attention");
    verdict.className = "";
    verdict.textContent = `A prompt with this passkey has at least ${shortest} tokens: choose a `
                          + "longer text.";
    return;
  }
  verdict.className = found ? "found" : "lost";
  verdict.textContent = `${found ? "Found" : "Lost"}: the key ${value("key")} lies ${distance} `
                        + `tokens back, and the model writes ${JSON.stringify(written.trim())}.`;
}

function clear(name) {
  show(name).replaceChildren();
  show(`${name}-words`).textContent = "";
}

function drawAttentionOf({ attentions, tokens, sentence }) {
  const shares = attentions[value("layer")][value("head")];
  const textOf = n => tokenizer.decode([tokens[n]]) || "BOS";
  const line = drawAttention(show("attention"), shares, sentence ?? null, textOf, L);
  show("attention-words").textContent = line;
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

const redrawOnly = new Set(["layer", "head", "from"]);
let waiting;
document.addEventListener("input", event => {      // some controls stand beside the views
  if (event.target.form !== form) return;
  const name = event.target.name;
  if (redrawOnly.has(name)) {
    writeLink();
    drawResults();
  } else if (name === "pair") {
    show("pair-now").textContent = value("pair");
    writeLink();
    drawPositions();
  } else {
    clearTimeout(waiting);
    waiting = setTimeout(settingsChanged, 200);
  }
});
form.addEventListener("submit", event => event.preventDefault());
show("keep").addEventListener("click", () => {
  if (!results.text) return;
  kept = { nll: results.text.nll, name: methodName() };
  drawText();
});
show("forget").addEventListener("click", () => {
  kept = null;
  drawText();
});

// ---- The walk -----------------------------------------------------------------------------------

const steps = [...document.querySelectorAll("#walk li")];

// Shows the step whose link this is; with settings of the reader's own, the last one stays.
function showStep(link) {
  const found = steps.findIndex(step => step.dataset.link === link);
  if (found >= 0) steps.forEach((step, index) => { step.hidden = index !== found; });
  const now = steps.findIndex(step => !step.hidden);
  show("back").disabled = now === 0;
  show("next").disabled = now === steps.length - 1;
  show("step-now").textContent = `Step ${now + 1} of ${steps.length}`;
  show("walk").classList.toggle("left", found < 0);
  show("return").hidden = found >= 0;
}

function walk(by) {
  const now = steps.findIndex(step => !step.hidden);
  location.hash = steps[now + by].dataset.link;
  if (show("walk").getBoundingClientRect().top < 0) show("walk").scrollIntoView();
}

show("back").addEventListener("click", () => walk(-1));
show("next").addEventListener("click", () => walk(1));
show("return").addEventListener("click", () => walk(0));

// ---- Begin --------------------------------------------------------------------------------------

// Follows the address: without settings in it, the walk's first step.
function arrive() {
  for (const one of form.elements) if (one.name) one.value = one.dataset.first;
  settingsChanged(followLink());
}

window.addEventListener("hashchange", arrive);
window.addEventListener("resize", () => {
  if (problemOf()) return;
  drawPositions();
  drawResults();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPositions);
steps.forEach((step, index) => { step.hidden = index !== 0; });
show("all-settings").open = matchMedia("(min-width: 62rem)").matches;
arrive();
