"""What the tests of evaluations share: a small LLaMA with an opinion, random documents, and a
stand-in for a model that says what a test tells it to say."""
import functools
import json
import re
import types

import numpy as np
import torch

from model import LLaMA, ModelConfig

VOCAB = 37


def small_model(seed=0, **changes):
    """A small LLaMA with weights so large that its predictions depend on the context and on the
    positions."""
    shape = dict(dim=16, n_layers=2, n_heads=2, vocab_size=VOCAB, multiple_of=8, max_seq_len=16)
    model = LLaMA(ModelConfig(**{**shape, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            center = 1 if parameter.dim() == 1 else 0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + center)
    return model


def random_documents(*lengths, vocab_size=VOCAB, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, n) for n in lengths]


def write_corpus(folder, documents, tokenizer):
    """A token folder whose two splits are the same documents."""
    folder.mkdir()
    ids = np.concatenate(documents).astype(np.uint16)
    for split in ("train", "val"):
        ids.tofile(folder / f"{split}.bin")
        np.save(folder / f"{split}.docs.npy", np.cumsum([0, *map(len, documents)]))
    counts = {"tokens": len(ids), "documents": len(documents)}
    meta = {"dtype": "uint16", "source": "text", "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size, "splits": {"train": counts, "val": counts},
            "left_out": {}, "max_mb": None}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


class Countdown:
    """Lets so many calls of a function pass and then interrupts, as Ctrl-C would."""

    def __init__(self, function, calls=10**6):
        self.function = function
        self.calls = calls
        self.made = 0

    def __call__(self, *args, **kwargs):
        if self.made == self.calls:
            raise KeyboardInterrupt
        self.made += 1
        return self.function(*args, **kwargs)


class Scripted:
    """A stand-in for a model: after the passkey's question it says the tokens script(key, distance
    of the key), as long as it reads its own words.

    Where it reads other words than its own, as in the single pass after a mistake, it turns to the
    right answer: a verdict from tokens after the first difference would be a wrong one. It counts
    its passes, and those of generation.
    """
    attention, device = "auto", torch.device("cpu")

    def __init__(self, tokenizer, builder, script):
        self.tokenizer, self.builder, self.script = tokenizer, builder, script
        self.config = ModelConfig(dim=2, n_layers=1, n_heads=1, vocab_size=tokenizer.vocab_size)
        self.tok_embeddings = types.SimpleNamespace(weight=torch.zeros(1))
        self.passes = 0
        self.generated = 0
        self.asked = functools.cache(self.key_and_script)

    def key_and_script(self, prompt):
        """The key in a prompt (a tuple of ids), and the tokens that the script says to it."""
        key = re.search("key is ([0-9]+)", self.tokenizer.decode(prompt))[1]
        distance = len(prompt) - self.builder.position(np.array(prompt), key)
        return key, self.script(key, distance)

    def next_token(self, context):
        question = self.builder.question
        for start in range(len(context), 0, -1):
            if context[start - len(question):start] == question:
                break
        else:
            return 0  # nothing has been asked yet
        key, script = self.asked(tuple(context[:start]))
        said = context[start:]
        words = script if said == script[:len(said)] else self.builder.answer(key)
        return words[len(said)] if len(said) < len(words) else self.tokenizer.encode("\n")[0]

    def __call__(self, tokens, positions=None, cache=None, last=None):
        if cache is not None:
            self.generated += 1
            if hasattr(cache, "context"):
                tokens = torch.cat([cache.context, tokens], dim=1)
            cache.context = tokens
        self.passes += 1
        length = tokens.shape[1]
        wanted = range(length - (last or length), length)
        logits = torch.zeros(len(tokens), len(wanted), self.config.vocab_size)
        for row, context in enumerate(tokens.tolist()):
            for n, t in enumerate(wanted):
                logits[row, n, self.next_token(context[:t + 1])] = 1.0
        return logits
