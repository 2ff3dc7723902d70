// The worker: reads the texts, while the page stays free. One job, from beginning to end; for other
// settings the page ends this worker and starts the next one.
"use strict";

let model, tokenizer, prompts;

self.onmessage = ({ data: { weights, tables, job } }) => {
  tokenizer = new Tokenizer(tables.pieces, tables.bos);
  prompts = new PasskeyPrompts(tokenizer, tables.passkey);
  model = new LLaMA(weights, tables.config);
  const passes = [readText, findKey, job.plain && readPlain].filter(Boolean);
  passes.forEach((pass, index) => {
    pass(job, share => postMessage({ kind: "progress", share: (index + share) / passes.length }));
  });
  postMessage({ kind: "done" });
};

// BOS and the text, at most `length` tokens to read and one more to predict.
function tokensOf(job) {
  return [tokenizer.bos, ...tokenizer.encode(job.text, job.length)].slice(0, job.length + 1);
}

function readText(job, progress) {
  const tokens = tokensOf(job);
  const { states, attentions } = model.hidden(tokens.slice(0, -1), job.rope, [], progress);
  postMessage({ kind: "text", tokens, attentions, nll: losses(model.logits(states), tokens) });
}

function readPlain(job, progress) {
  const tokens = tokensOf(job);
  const { states } = model.hidden(tokens.slice(0, -1), job.plain, [], progress);
  postMessage({ kind: "plain", nll: losses(model.logits(states), tokens) });
}

// The model answers token by token, until a number has ended, or the answer is longer than the key
// and what may stand before it.
function findKey(job, progress) {
  const shortest = prompts.shortest(job.key);
  if (shortest > job.length) {
    postMessage({ kind: "passkey", shortest });
    return;
  }
  const { prompt, place } = prompts.build(job.key, job.length, job.depth);
  const cache = [];
  const { states } = model.hidden(prompt, job.rope, cache, progress);
  let next = states.slice(-model.config.dim);
  // Where does the model look when the first digit is due, after the space in front of it?
  const space = prompts.answer(job.key).slice(0, 1);
  const { attentions } = model.hidden(space, job.rope, cache.slice());
  const answer = [];
  while (answer.length < job.key.length + 3 && firstNumber(tokenizer.decode(answer)) === null) {
    answer.push(greedy(model.logits(next)));
    next = model.hidden(answer.slice(-1), job.rope, cache).states;
  }
  const written = tokenizer.decode(answer);
  const found = firstNumber(written + " ") === job.key;
  const sentence = [place, place + prompts.information(job.key).length];
  postMessage({ kind: "passkey", written, found, distance: prompt.length - place, sentence,
                attentions, tokens: [...prompt, ...space] });
}
