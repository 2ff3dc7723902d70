"""Passkey retrieval: five digits hidden in a length of nonsense, asked for at the end. (Mohtashami & Jaggi 2023, arXiv 2305.16300)

    BOS  introduction  garbage ...  The pass key is 12345. Remember it. 12345 is the pass key.  garbage ...  question  |  12345

The words are the protocol's own, so that numbers compare with the papers'. The prompt is put together from token ids, so that its
length is exact for every tokenizer.
"""
import numpy as np

from cli import UserError

INTRODUCTION = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
                "I will quiz you about the important information there.\n")
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
INFORMATION = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
DIGITS = 5


def inside(tokenizer, text):
    """Ids of a text that does not stand at the beginning: without the space that Meta's SentencePiece model would put in front."""
    if not tokenizer.dummy_prefix:
        return tokenizer.encode(text)
    return tokenizer.encode("\n" + text)[len(tokenizer.encode("\n")):]


class PasskeyPrompts:
    """Builds prompts for one tokenizer. `shortest` is the length in tokens, answer included, of a prompt without garbage."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.introduction = [tokenizer.bos_id, *tokenizer.encode(INTRODUCTION)]
        self.garbage = np.array(inside(tokenizer, GARBAGE + " "), dtype=np.int64)
        self.question = inside(tokenizer, QUESTION)
        key = max(len(self.information(k)) + len(self.answer(k)) for k in ("00000", "12345"))
        self.shortest = len(self.introduction) + key + len(self.question)

    def information(self, key):
        return inside(self.tokenizer, INFORMATION.format(key=key))

    def answer(self, key):
        """The ids that the model should produce after the prompt."""
        return inside(self.tokenizer, " " + key)

    def build(self, key, length, depth=None, distance=None):
        """A prompt of `length` tokens, the answer counted: `length` is the window that the question needs.

        key: five digits; depth: 0 hides it at the start, 1 at the end of the garbage; or distance: tokens from the beginning of the
        key's sentence to the end of the prompt. Returns (prompt ids, answer ids), both int64 arrays.
        """
        information, answer = self.information(key), self.answer(key)
        fill = length - len(self.introduction) - len(information) - len(self.question) - len(answer)
        if fill < 0:
            raise UserError(f"a passkey prompt of {length} tokens is too short: this tokenizer needs at least {self.shortest}")
        before = round(depth * fill) if distance is None else fill + len(information) + len(self.question) - distance
        before = min(max(before, 0), fill)
        prompt = [self.introduction, self.filler(before), information, self.filler(fill - before), self.question]
        return np.concatenate(prompt).astype(np.int64), np.array(answer, dtype=np.int64)

    def position(self, prompt, key):
        """Where in a prompt the sentence with the key begins."""
        information = np.array(self.information(key))
        views = np.lib.stride_tricks.sliding_window_view(prompt, len(information))
        return int(np.flatnonzero((views == information).all(axis=1))[0])

    def filler(self, n):
        """n tokens of garbage, from its beginning."""
        return np.resize(self.garbage, n)

    def document(self, rng, longest):
        """A training document BOS prompt answer EOS of random length (at most `longest` with BOS and answer), depth and key."""
        prompt, answer = self.build(random_key(rng), int(rng.integers(self.shortest, longest + 1)), depth=rng.random())
        return np.concatenate([prompt, answer, [self.tokenizer.eos_id]])


def random_key(rng):
    """Five random digits: leading zeros occur, so that every digit is worth the same."""
    return "".join(map(str, rng.integers(0, 10, DIGITS)))
