"""Generation from prompts of different lengths, as RULER and the harness batch them."""
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from common.errors import UserError
from common.kv_cache import KVCache
from common.sampling import check_sampling, sample
from model import LLaMA


@torch.inference_mode()
def stream_ragged(model: LLaMA, prompts: Tensor, lengths: list[int] | Tensor, max_new_tokens: int,
                  temperature: float = 0.0, top_p: float = 1.0, stop: Iterable[int] = (),
                  seed: int = 0) -> Iterator[Tensor]:
    """model.stream for rows that differ in length: prompts [B, T], of which lengths [B] are read.

    All rows go on from the end of the shortest: a longer prompt yields its own next token until it
    is used up (as in Meta's LLaMA 1), so that no row ever holds padding. A row that has its
    max_new_tokens repeats the last one. Yields [B] per step.
    """
    lengths = torch.as_tensor(lengths, device=prompts.device)
    shortest, longest = int(lengths.min()), int(lengths.max())
    if longest > prompts.shape[1]:
        raise UserError(f"a prompt of {longest} tokens in rows of {prompts.shape[1]}: give rows as "
                        "long as the longest")
    check_sampling(prompts[:, :max(shortest, 0)], temperature, top_p)
    generator = torch.Generator(device=prompts.device).manual_seed(seed)
    cache = KVCache(model.config, len(prompts), longest + max_new_tokens, prompts.device,
                    model.tok_embeddings.weight.dtype)
    tokens = prompts[:, :shortest]
    done = lengths + max_new_tokens <= shortest
    for n in range(shortest, longest + max_new_tokens):             # n tokens are there
        logits = model(tokens, cache=cache, last=1)[:, 0]           # [B, V]
        token = sample(logits, temperature, top_p, generator)
        token = torch.where(done, tokens[:, -1], token)
        if n < longest:
            token = torch.where(n < lengths, prompts[:, n], token)
        yield token
        for s in stop:
            done = done | (token == s) & (n >= lengths)             # inside a prompt it stops none
        done = done | (n + 1 >= lengths + max_new_tokens)
        if stop and done.all():
            return
        tokens = token[:, None]


def pad_rows(rows: list[list[int]], device: torch.device) -> Tensor:
    """Lists of ids as [B, T], filled up behind, where no causal model looks."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)


def generate_ragged(model: LLaMA, prompts: Tensor, lengths: list[int] | Tensor,
                    max_new_tokens: int, **sampling) -> Tensor:
    """The prompts and their continuations, [B, T + new]. Row b is text up to lengths[b] + new."""
    start = prompts[:, :int(min(lengths))]
    new = stream_ragged(model, prompts, lengths, max_new_tokens, **sampling)
    return torch.cat([start, *(token[:, None] for token in new)], dim=1)
