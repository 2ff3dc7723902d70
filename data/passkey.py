"""Passkey retrieval: five digits hidden in nonsense and asked for at the end (Mohtashami & Jaggi
2023, arXiv 2305.16300).

    BOS  introduction  garbage ...  The pass key is 12345. Remember it. 12345 is the pass key.
         garbage ...  What is the pass key? The pass key is  |  12345

The words are the protocol's own, so that numbers compare with the papers'. A prompt is put
together from token ids, so that its length is exact for every tokenizer.
"""
import numpy as np

from common.errors import UserError
from data.tokenizer import Tokenizer

INTRODUCTION = ("There is an important info hidden inside a lot of irrelevant text. "
                "Find it and memorize them. I will quiz you about the important information "
                "there.\n")
GARBAGE = ("The grass is green. The sky is blue. The sun is yellow. Here we go. "
           "There and back again.")
INFORMATION = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
DIGITS = 5


def encode_inside(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text in the middle of another: without the space of a dummy prefix in front."""
    if not tokenizer.dummy_prefix:
        return tokenizer.encode(text)
    newline = tokenizer.encode("\n")
    return tokenizer.encode("\n" + text)[len(newline):]


class PasskeyPrompts:
    """Builds prompts for one tokenizer. `shortest` is the length in tokens, answer included, of a
    prompt without garbage. (Where a tokenizer joins digits, keys differ in length: the longest of
    a hundred.)"""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.introduction = [tokenizer.bos_id, *tokenizer.encode(INTRODUCTION)]
        self.garbage = np.array(encode_inside(tokenizer, GARBAGE + " "), dtype=np.int64)
        self.question = encode_inside(tokenizer, QUESTION)
        some_keys = [f"{number:05}" for number in range(0, 100_000, 1009)]
        self.shortest = max(map(self.shortest_with, some_keys))

    def shortest_with(self, key: str) -> int:
        """The length in tokens of this key's prompt without garbage, answer included."""
        of_key = len(self.information(key)) + len(self.answer(key))
        return len(self.introduction) + of_key + len(self.question)

    def information(self, key: str) -> list[int]:
        """The ids of the sentence that tells the key."""
        return encode_inside(self.tokenizer, INFORMATION.format(key=key))

    def answer(self, key: str) -> list[int]:
        """The ids that the model should produce after the prompt."""
        return encode_inside(self.tokenizer, " " + key)

    def build(self, key: str, length: int, depth: float | None = None,
              distance: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(prompt ids, answer ids), both int64, together `length` tokens: the window they need.

        The key's place is its `depth`, 0 at the start of the garbage and 1 at its end, or its
        `distance`: tokens from the beginning of its sentence to the end of the prompt.
        """
        information = self.information(key)
        answer = self.answer(key)
        behind = len(information) + len(self.question)
        fill = length - len(self.introduction) - behind - len(answer)
        if fill < 0:
            raise UserError(f"a passkey prompt of {length} tokens is too short: this tokenizer "
                            f"needs at least {max(self.shortest, length - fill)}")
        before = round(depth * fill) if distance is None else fill + behind - distance
        before = min(max(before, 0), fill)
        prompt = np.concatenate([self.introduction, self.filler(before), information,
                                 self.filler(fill - before), self.question])
        return prompt.astype(np.int64), np.array(answer, dtype=np.int64)

    def position(self, prompt: np.ndarray, key: str) -> int:
        """The index in a prompt at which the key's sentence begins."""
        information = np.array(self.information(key))
        views = np.lib.stride_tricks.sliding_window_view(prompt, len(information))
        return int(np.flatnonzero((views == information).all(axis=1))[0])

    def filler(self, n: int) -> np.ndarray:
        """n tokens of garbage, from its beginning."""
        return np.resize(self.garbage, n)

    def document(self, rng: np.random.Generator, longest: int) -> np.ndarray:
        """A training document: BOS, prompt, answer, EOS. Key, depth and length are random; the
        length without EOS is at most `longest`."""
        key = random_key(rng)
        while self.shortest_with(key) > max(longest, self.shortest):
            key = random_key(rng)
        length = max(int(rng.integers(self.shortest, longest + 1)), self.shortest_with(key))
        prompt, answer = self.build(key, length, depth=rng.random())
        return np.concatenate([prompt, answer, [self.tokenizer.eos_id]])


def random_key(rng: np.random.Generator) -> str:
    """Five random digits. Leading zeros occur, so every digit is equally hard to guess."""
    return "".join(str(digit) for digit in rng.integers(0, 10, DIGITS))
