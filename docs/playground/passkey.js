// Passkey prompts, as data/passkey.py builds them: digits hidden in nonsense, asked for at the end.
"use strict";

class PasskeyPrompts {
  // words: { introduction, garbage, information (with {key} for the key), question }
  constructor(tokenizer, words) {
    this.tokenizer = tokenizer;
    this.words = words;
    this.introduction = [tokenizer.bos, ...tokenizer.encode(words.introduction)];
    this.garbage = tokenizer.encode(words.garbage + " ");
    this.question = tokenizer.encode(words.question);
  }

  information(key) {
    return this.tokenizer.encode(this.words.information.replaceAll("{key}", key));
  }

  answer(key) {
    return this.tokenizer.encode(" " + key);
  }

  // Tokens of a prompt without garbage, the answer counted.
  shortest(key) {
    const parts = [this.introduction, this.information(key), this.question, this.answer(key)];
    return parts.reduce((sum, part) => sum + part.length, 0);
  }

  // { prompt, place }: with the answer `length` tokens; the key's sentence begins at the index
  // `place`. depth: 0 at the start of the garbage, 1 at its end.
  build(key, length, depth) {
    const fill = length - this.shortest(key);
    const before = halfToEven(depth * fill);
    const prompt = [...this.introduction, ...this.filler(before), ...this.information(key),
                    ...this.filler(fill - before), ...this.question];
    return { prompt, place: this.introduction.length + before };
  }

  // n tokens of garbage, from its beginning.
  filler(n) {
    return Array.from({ length: n }, (_, i) => this.garbage[i % this.garbage.length]);
  }
}

// Rounds as Python does: 18.5 is 18, and 19.5 is 20.
function halfToEven(number) {
  const rounded = Math.round(number);
  return rounded - number === 0.5 && rounded % 2 === 1 ? rounded - 1 : rounded;
}

// The first number of a text; null while it may go on, or has not begun.
function firstNumber(text) {
  const found = /(\d+)\D/.exec(text);
  return found ? found[1] : null;
}
