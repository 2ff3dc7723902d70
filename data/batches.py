"""Token files -> training rows, as a pure function of (seed, step, row): resuming needs no state, and the number of ranks changes nothing.

A batch is a share of rows of text, cut from the corpus at random, and a share of rows with passkey prompts in them.
"""
from pathlib import Path

import numpy as np
import torch

from cli import UserError, read_json
from data.passkey import PasskeyPrompts


class TokenFile:
    """One split of a token folder, memory-mapped. tokens: all ids; offsets: where each document begins, and the end."""

    def __init__(self, folder, split):
        folder = Path(folder)
        meta = read_json(folder / "meta.json")
        try:
            self.offsets = np.load(folder / f"{split}.docs.npy")
            if len(self.offsets) == 1:
                raise UserError(f"{folder}: no document is in the {split} split: prepare it from at least two files (cut a single book in two)")
            self.tokens = np.memmap(folder / f"{split}.bin", dtype=meta["dtype"], mode="r")
            self.tokenizer_sha256, self.vocab_size, written = meta["tokenizer_sha256"], meta["vocab_size"], self.offsets[-1]
        except UserError:
            raise
        except (OSError, EOFError, ValueError, TypeError, LookupError) as error:
            raise UserError(f"{folder}: the {split} split cannot be read ({error}): prepare it again with data/prepare.py") from None
        if written != len(self.tokens):
            raise UserError(f"{folder}: {split}.bin holds {len(self.tokens)} tokens, {written} were written: "
                            "prepare it again with data/prepare.py")

    def __len__(self):
        return len(self.tokens)

    def documents(self, at_least=1):
        """The documents of at least that many tokens, in order: arrays of ids, BOS first and EOS last."""
        for start, end in zip(self.offsets[:-1], self.offsets[1:]):
            if end - start >= at_least:
                yield self.tokens[start:end].astype(np.int64)


class Batches:
    """batches(step) -> (tokens [rows, T], targets [rows, T]), int64.

    corpus: TokenFile; rows: of the whole step, over all ranks; passkey_share: share of the rows with passkey prompts, none of which is
    longer than passkey_longest, however long the row: so retrieval over more than L is never trained at L', and what a test finds there
    is the method's doing. packed: such a row is full of prompts, one after another, else it is text with one prompt somewhere in it.
    When L' > L packing has a side effect: keys of earlier prompts, farther away than L, are there in training and never the answer, so
    that a model learns to overlook just what the test asks for.

    positions: None for 0 .. T-1, or a function (rng of the step, rng of the row, T) -> [T], and then a batch has them as its third tensor,
    [rows, T] (positions.training_positions).
    """

    def __init__(self, corpus, tokenizer, rows, seq_len, passkey_share=0.0, passkey_longest=None, packed=True, seed=0, positions=None):
        if len(corpus) < seq_len + 1:
            raise UserError(f"the corpus holds {len(corpus)} tokens, fewer than one row of {seq_len + 1}: "
                            "give more text or a shorter window")
        if corpus.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(f"the corpus was tokenised with another tokenizer than {tokenizer.path}: "
                            f"prepare it again with data/prepare.py --tokenizer {tokenizer.path}")
        if not 0 <= passkey_share <= 1:
            raise UserError(f"a passkey share of {passkey_share}: give a share of the rows, from 0 to 1")
        self.corpus, self.rows, self.seq_len, self.seed, self.positions = corpus, rows, seq_len, seed, positions
        self.passkey_share, self.prompts = passkey_share, PasskeyPrompts(tokenizer)
        self.passkey_longest, self.packed = min(passkey_longest or seq_len, seq_len), packed
        if passkey_share and self.passkey_longest < self.prompts.shortest:
            raise UserError(f"a passkey prompt needs {self.prompts.shortest} tokens, the window has {self.passkey_longest}: "
                            "use a longer window or a passkey share of 0")

    def row(self, step, index):
        """Row `index` of a step: T + 1 ids."""
        rng = np.random.default_rng((self.seed, step, index))
        start = int(rng.integers(0, len(self.corpus) - self.seq_len))
        text = self.corpus.tokens[start:start + self.seq_len + 1].astype(np.int64)
        # The first rows are prompts. A fractional count is made up over the steps: 0.3 of one row is three steps in ten.
        prompts = int((step + 1) * self.rows * self.passkey_share) - int(step * self.rows * self.passkey_share)
        if index >= prompts:
            return text
        if not self.packed:
            prompt = self.prompts.document(rng, self.passkey_longest)
            place = int(rng.integers(0, len(text) - len(prompt) + 1))
            return np.concatenate([text[:place], prompt, text[place + len(prompt):]])
        parts, room = [], self.seq_len + 1
        while room > self.prompts.shortest:
            parts.append(self.prompts.document(rng, min(self.passkey_longest, room - 1)))
            room -= len(parts[-1])
        return np.concatenate([*parts, text[:room]])

    def __call__(self, step, first=0, last=None):
        """Rows first..last of a step (a rank's or a micro-batch's share; all by default)."""
        wanted = range(first, self.rows if last is None else last)
        rows = torch.from_numpy(np.stack([self.row(step, i) for i in wanted]))
        if self.positions is None:
            return rows[:, :-1], rows[:, 1:]
        # Streams of their own (a fourth number in the seed): the text is the same whatever the positions are.
        positions = [self.positions(np.random.default_rng((self.seed, step, 0, 1)), np.random.default_rng((self.seed, step, i, 2)), self.seq_len)
                     for i in wanted]
        return rows[:, :-1], rows[:, 1:], torch.from_numpy(np.stack(positions))
