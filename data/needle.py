"""A needle in a haystack: one sentence hidden in long text, whose beginning is then repeated for the model to complete.

    BOS  text ...  The best thing to do in San Francisco is eat a sandwich ...  text ...  The best thing to do in San Francisco is  |  eat a ...

The first sentence is Kamradt's (2023, github.com/gkamradt/LLMTest_NeedleInAHaystack), the others are made after it, so that a model cannot
know them by heart. His test asks a question and lets another model give marks; a base model completes better than it answers, and counting
the tokens that it has right needs no judge.
"""
import numpy as np

from cli import UserError
from data.passkey import inside

NEEDLE = "The best thing to do in {city} is {activity}."
CITIES = ["San Francisco", "Lisbon", "Nairobi", "Kyoto", "Montreal", "Cusco", "Tallinn", "Hobart"]
ACTIVITIES = ["eat a sandwich and sit in Dolores Park on a sunny day", "ride the old yellow tram up to the castle before breakfast",
              "watch the giraffes walk in front of the skyline", "rent a bicycle and follow the river to the last temple",
              "buy a warm bagel and climb the hill at night", "drink tea with the weavers behind the market",
              "look for the painted doors in the rain", "take the ferry to the museum and stay until dusk"]


class NeedlePrompts:
    """Builds prompts for one tokenizer and one haystack (documents: arrays of token ids, BOS first). `shortest`: tokens without any text."""

    def __init__(self, tokenizer, documents):
        self.tokenizer = tokenizer
        self.text = np.concatenate([np.asarray(d, np.int64)[1:] for d in documents])
        self.text = self.text[self.text != tokenizer.eos_id]
        ids = np.unique(self.text)
        self.stops = np.isin(self.text, [i for i in ids.tolist() if tokenizer.decode([i]).endswith(("\n", "."))])
        self.shortest = 1 + max(sum(map(len, self.parts(n))) for n in range(len(CITIES) * len(ACTIVITIES)))

    def parts(self, n):
        """Sentence n of 64 as ids: (the whole of it, its beginning, the rest). Number 0 is Kamradt's."""
        city, activity = CITIES[n % len(CITIES)], ACTIVITIES[(n + n // len(CITIES)) % len(ACTIVITIES)]
        beginning, rest = NEEDLE.split(" {activity}")
        beginning, rest = "\n" + beginning.format(city=city), f" {activity}{rest}"
        return inside(self.tokenizer, f"{beginning}{rest}\n"), inside(self.tokenizer, beginning), inside(self.tokenizer, rest)

    def build(self, rng, length, depth):
        """A prompt of `length` tokens, the answer counted, with a random sentence in a random piece of the text. depth: 0 hides it at the
        start, 1 at the end, None nowhere. Returns (prompt ids, answer ids), both int64 arrays, and where the sentence begins."""
        needle, beginning, rest = self.parts(int(rng.integers(len(CITIES) * len(ACTIVITIES))))
        needle = needle if depth is not None else []
        fill = length - 1 - len(needle) - len(beginning) - len(rest)
        if length < self.shortest:
            raise UserError(f"a needle prompt of {length} tokens is too short: this tokenizer needs at least {self.shortest}")
        if fill > len(self.text):
            raise UserError(f"the text holds {len(self.text)} tokens, a haystack of {fill} is wanted: give a longer one, or shorter --lengths")
        start = int(rng.integers(len(self.text) - fill + 1))
        text, stops = self.text[start:start + fill], np.flatnonzero(self.stops[start:start + fill]) + 1
        place = round((depth or 0) * fill)
        if 0 < place < fill and len(stops) and stops[0] <= place:  # not within a sentence: after the last one that ends before
            place = int(stops[stops <= place][-1])
        prompt = np.concatenate([[self.tokenizer.bos_id], text[:place], needle, text[place:], beginning]).astype(np.int64)
        return prompt, np.array(rest, np.int64), 1 + place
