"""A needle in a haystack: a sentence hidden in long text, which the model is to complete.

    BOS  text ...  The best thing to do in San Francisco is eat a sandwich ...
         text ...  The best thing to do in San Francisco is  |  eat a sandwich ...

The first sentence is Kamradt's (2023, github.com/gkamradt/LLMTest_NeedleInAHaystack). The others
are made after it, so that a model cannot know them by heart. Kamradt asks a question and has
another model grade the answer. A base model completes better than it answers, and counting the
tokens it gets right needs no judge.
"""
import numpy as np

from common.errors import UserError
from data.passkey import encode_inside
from data.tokenizer import Tokenizer

CITIES = ["San Francisco", "Lisbon", "Nairobi", "Kyoto", "Montreal", "Cusco", "Tallinn", "Hobart"]
ACTIVITIES = ["eat a sandwich and sit in Dolores Park on a sunny day",
              "ride the old yellow tram up to the castle before breakfast",
              "watch the giraffes walk in front of the skyline",
              "rent a bicycle and follow the river to the last temple",
              "buy a warm bagel and climb the hill at night",
              "drink tea with the weavers behind the market",
              "look for the painted doors in the rain",
              "take the ferry to the museum and stay until dusk"]
SENTENCES = len(CITIES) * len(ACTIVITIES)


class NeedlePrompts:
    """Builds prompts for one tokenizer and one haystack, `documents`: arrays of ids, BOS first.
    `shortest` is the length in tokens, answer included, of a prompt without haystack."""

    def __init__(self, tokenizer: Tokenizer, documents: list[np.ndarray]):
        self.tokenizer = tokenizer
        text = np.concatenate([np.asarray(d, np.int64)[1:] for d in documents])
        self.text = text[text != tokenizer.eos_id]
        stops = [i for i in np.unique(self.text).tolist()
                 if tokenizer.decode([i]).endswith(("\n", "."))]
        self.ends_sentence = np.isin(self.text, stops)
        lengths = [sum(len(part) for part in self.parts(n)) for n in range(SENTENCES)]
        self.shortest = 1 + max(lengths)

    def parts(self, n: int) -> tuple[list[int], list[int], list[int]]:
        """Sentence n of 64 as ids: the whole, its beginning, the rest. Number 0 is Kamradt's."""
        city = CITIES[n % len(CITIES)]
        activity = ACTIVITIES[(n + n // len(CITIES)) % len(ACTIVITIES)]
        beginning = f"\nThe best thing to do in {city} is"
        rest = f" {activity}."
        return (encode_inside(self.tokenizer, f"{beginning}{rest}\n"),
                encode_inside(self.tokenizer, beginning), encode_inside(self.tokenizer, rest))

    def build(self, rng: np.random.Generator, length: int,
              depth: float | None) -> tuple[np.ndarray, np.ndarray, int]:
        """(prompt ids, answer ids, index of the needle) of a random sentence in a random piece of
        the text: int64 arrays, together `length` tokens. depth: 0 hides the sentence at the start,
        1 at the end, None nowhere."""
        needle, beginning, rest = self.parts(int(rng.integers(SENTENCES)))
        if depth is None:
            needle, depth = [], 0
        fill = length - 1 - len(needle) - len(beginning) - len(rest)
        if length < self.shortest:
            raise UserError(f"a needle prompt of {length} tokens is too short: this tokenizer "
                            f"needs at least {self.shortest}")
        if fill > len(self.text):
            raise UserError(f"the text holds {len(self.text)} tokens, a haystack of {fill} is "
                            "wanted: give a longer one, or shorter --lengths")
        start = int(rng.integers(len(self.text) - fill + 1))
        text = self.text[start:start + fill]
        place = round(depth * fill)
        if 0 < place < fill:
            # Move it back to the end of a sentence, if one ends before it.
            ends = np.flatnonzero(self.ends_sentence[start:start + place]) + 1
            place = int(ends[-1]) if len(ends) else place
        prompt = np.concatenate([[self.tokenizer.bos_id], text[:place], needle, text[place:],
                                 beginning])
        return prompt.astype(np.int64), np.array(rest, np.int64), 1 + place
