"""Ranking instead of generating: is the true answer more probable than others like it?

    prompt ... The pass key is  |  12345   60718   99342  ...     ln p(candidate | prompt) of each

A small model seldom generates a whole answer, and then every score is zero. It may still know which
of k candidates is right. They are drawn as the answer was, so whoever has not read the prompt has
one chance in k.
"""
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from common.kv_cache import KVCache
from common.results import require_numbers
from data.passkey import PasskeyPrompts, random_key
from model import LLaMA

MOST_CANDIDATES = 100


def check_candidates(rank: int) -> None:
    if rank != 0 and not 2 <= rank <= MOST_CANDIDATES:
        raise UserError(f"--rank {rank}: give the number of candidates, from 2 to "
                        f"{MOST_CANDIDATES}, or 0 to generate answers")


def log_likelihoods(model: LLaMA, prompts: Sequence[Sequence[int]],
                    candidates: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
    """ln p(candidate | prompt) in nats, the sum over a candidate's tokens, for each candidate of
    each prompt. All are lists of token ids. Prompts of equal shape are read as a batch."""
    shapes: dict[tuple, list[int]] = {}  # rows by the lengths of prompt and candidates
    for row, (prompt, answers) in enumerate(zip(prompts, candidates)):
        shapes.setdefault((len(prompt), *map(len, answers)), []).append(row)
    scores: list[list[float]] = [[] for _ in prompts]
    for rows in shapes.values():
        texts = torch.tensor(np.array([prompts[row] for row in rows]), device=model.device)
        answers = [torch.tensor(np.array(column), device=model.device)
                   for column in zip(*(candidates[row] for row in rows))]
        for row, values in zip(rows, batch_log_likelihoods(model, texts, answers).tolist()):
            scores[row] = values
    return scores


@torch.inference_mode()
def batch_log_likelihoods(model: LLaMA, prompts: Tensor, candidates: Sequence[Tensor]) -> Tensor:
    """ln p(candidate | prompt) in nats: prompts [B, T], k candidates [B, n], each with an n of its
    own -> float64 [B, k].

    A prompt is read once, with the first candidate behind it. The cache then goes back to the
    prompt's end, and the next candidate takes the place of the one before. Equal to reading prompt
    and candidate as one text, for every method: where angles depend on the length, the cache reads
    the prompt again for every new length. So the candidates come by their length.
    """
    B, T = prompts.shape
    longest = max(candidate.shape[1] for candidate in candidates)
    cache = KVCache(model.config, B, T + longest - 1, model.device,
                    model.tok_embeddings.weight.dtype)
    scores = torch.empty(B, len(candidates), dtype=torch.float64)
    unread = prompts
    for i in sorted(range(len(candidates)), key=lambda i: candidates[i].shape[1]):
        candidate = candidates[i]                                              # [B, n]
        tokens = torch.cat([unread, candidate[:, :-1]], dim=1)
        logits = model(tokens, cache=cache, last=candidate.shape[1])           # [B, n, V]
        nll = F.cross_entropy(logits.transpose(1, 2), candidate, reduction="none")     # [B, n]
        scores[:, i] = -nll.double().sum(dim=1).cpu()
        cache.rewind(T - 1)
        unread = prompts[:, -1:]  # is read again: its logits predict the candidate's first token
    require_numbers(scores, "an answer's probability")
    return scores


def wins(true: float, others: Sequence[float]) -> float:
    """1 if the true answer's log-likelihood is above all others, else 0. A tie is shared: a model
    that cannot tell k candidates apart scores 1/k."""
    best = max(others)
    if true == best:
        return 1 / (1 + list(others).count(best))
    return float(true > best)


# ---- Passkeys ------------------------------------------------------------------------------------


def other_keys(key: str, count: int) -> list[str]:
    """`count` other keys, always the same ones for a key, none twice."""
    rng = np.random.default_rng(int(key))
    keys: list[str] = []
    while len(keys) < count:
        other = random_key(rng)
        if other not in (key, *keys):
            keys.append(other)
    return keys


def rank_passkeys(model: LLaMA, builder: PasskeyPrompts, prompts: Sequence[np.ndarray],
                  keys: Sequence[str], rank: int) -> list[float]:
    """For each prompt: is its key the most probable of `rank` keys? See wins()."""
    candidates = [[builder.answer(k) for k in (key, *other_keys(key, rank - 1))] for key in keys]
    return [wins(true, others) for true, *others in log_likelihoods(model, prompts, candidates)]
