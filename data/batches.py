"""Token files -> training rows. A row is a pure function of (seed, step, row): resuming needs no
state of the loader, and the number of ranks changes nothing.

A batch is rows of text, cut from the corpus at random, and a share of rows with passkey prompts.
"""
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from common.errors import UserError
from data.corpus import TokenFile, require_same_tokenizer
from data.passkey import PasskeyPrompts
from data.tokenizer import Tokenizer


class Batches:
    """batches(step) -> (tokens [B, T], targets [B, T]), int64: the targets are the next tokens.

    rows             B, of the whole step, over all ranks
    seq_len          T
    passkey_share    share of the rows that hold passkey prompts
    passkey_longest  no prompt is longer, however long the row. With L here and rows of L', training
                     never shows retrieval over more than L: if the model can do it, that is the
                     method's work.
    packed           True: such a row is full of prompts. False: it is text with one prompt in it.
                     Packing has a side effect when L' > L: keys farther away than L are there in
                     training and never the answer, which seems to teach a model to overlook them.
    positions        None for 0 .. T-1, or a function (rng of the step, rng of the row, T) -> [T]:
                     a batch then has a third tensor, positions [B, T]
    """

    def __init__(self, corpus: TokenFile, tokenizer: Tokenizer, rows: int, seq_len: int,
                 passkey_share: float = 0.0, passkey_longest: int | None = None,
                 packed: bool = True, seed: int = 0, positions: Callable | None = None):
        if len(corpus) < seq_len + 1:
            raise UserError(f"the corpus holds {len(corpus)} tokens, fewer than one row of "
                            f"{seq_len + 1}: give more text or a shorter window")
        require_same_tokenizer(corpus, tokenizer)
        if not 0 <= passkey_share <= 1:
            raise UserError(f"a passkey share of {passkey_share}: give a share of rows from 0 to 1")
        self.corpus = corpus
        self.rows = rows
        self.seq_len = seq_len
        self.passkey_share = passkey_share
        self.passkey_longest = min(passkey_longest or seq_len, seq_len)
        self.packed = packed
        self.seed = seed
        self.positions = positions
        self.prompts = PasskeyPrompts(tokenizer)
        if passkey_share and self.passkey_longest < self.prompts.shortest:
            raise UserError(f"a passkey prompt needs {self.prompts.shortest} tokens, the window "
                            f"has {self.passkey_longest}: use a longer one or a passkey share of 0")

    def row(self, step: int, index: int) -> np.ndarray:
        """Row `index` of a step: T + 1 ids, the T inputs and one more for the last target."""
        rng = np.random.default_rng((self.seed, step, index))
        start = rng.integers(0, len(self.corpus) - self.seq_len)
        text = self.corpus.read(start, start + self.seq_len + 1)
        if index >= self.passkey_rows(step):
            return text
        if self.packed:
            return self.full_of_prompts(rng, text)
        return self.with_one_prompt(rng, text)

    def passkey_rows(self, step: int) -> int:
        """The number of rows with prompts, the first ones of a step. A fraction is exact over many
        steps: 0.3 of a row is one row in three of ten steps."""
        before = int(step * self.rows * self.passkey_share)
        with_this_step = int((step + 1) * self.rows * self.passkey_share)
        return with_this_step - before

    def full_of_prompts(self, rng: np.random.Generator, text: np.ndarray) -> np.ndarray:
        """One prompt after another, as long as another fits, then `text` to the end of the row."""
        documents = []
        room = len(text)
        while room > self.prompts.shortest:
            longest = min(self.passkey_longest, room - 1)  # - 1: room for EOS
            document = self.prompts.document(rng, longest)
            documents.append(document)
            room -= len(document)
        return np.concatenate([*documents, text[:room]])

    def with_one_prompt(self, rng: np.random.Generator, text: np.ndarray) -> np.ndarray:
        """`text` with one prompt over a random piece of it."""
        document = self.prompts.document(rng, self.passkey_longest)
        start = rng.integers(0, len(text) - len(document) + 1)
        return np.concatenate([text[:start], document, text[start + len(document):]])

    def __call__(self, step: int, first: int = 0,
                 last: int | None = None) -> tuple[torch.Tensor, ...]:
        """Rows first .. last - 1 of a step, the share of a rank or micro-batch; all by default."""
        wanted = range(first, self.rows if last is None else last)
        rows = torch.from_numpy(np.stack([self.row(step, i) for i in wanted]))
        tokens = rows[:, :-1]
        targets = rows[:, 1:]
        if self.positions is None:
            return tokens, targets
        positions = []
        for i in wanted:
            # Random streams of their own: the text is the same whatever the positions are.
            step_rng = np.random.default_rng((self.seed, step, 0, 1))
            row_rng = np.random.default_rng((self.seed, step, i, 2))
            positions.append(self.positions(step_rng, row_rng, self.seq_len))
        return tokens, targets, torch.from_numpy(np.stack(positions))


def prefetch(batches: Batches, first_step: int, last_step: int, first_row: int, rows: int
             ) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """Yield (step, batch) with `rows` rows of each step, a rank's share. The next batch is cut
    while this one is computed."""
    if first_step >= last_step:
        return
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(batches, first_step, first_row, first_row + rows)
        for step in range(first_step, last_step):
            batch = following.result()
            if step + 1 < last_step:
                following = pool.submit(batches, step + 1, first_row, first_row + rows)
            yield step, batch
