"""Does a model find the passkey? Answers of a whole batch judged, most of them by a single pass."""
import re
from collections.abc import Sequence

import numpy as np
import torch

from common.results import require_numbers
from data.tokenizer import Tokenizer
from methods import depends_on_length
from model import LLaMA, stream


def judge(text: str, key: str, ended: bool = False) -> bool | None:
    """The verdict on a continuation: is its first run of digits the key? None while more text could
    still decide, which none can when it has ended."""
    found = re.search("[0-9]+", text)
    number = found.group() if found else ""
    number_is_complete = found is not None and found.end() < len(text)
    if ended or number_is_complete:
        return number == key
    if key.startswith(number):
        return None  # no digit yet, or the number may go on
    return False


def judge_tokens(tokenizer: Tokenizer, tokens: list[int], key: str, ended: bool = False
                 ) -> bool | None:
    """judge() on token ids, which EOS ends."""
    if tokenizer.eos_id in tokens:
        tokens = tokens[:tokens.index(tokenizer.eos_id)]
        ended = True
    return judge(tokenizer.decode(tokens), key, ended)


@torch.inference_mode()
def retrieve_passkeys(model: LLaMA, tokenizer: Tokenizer, prompts: Sequence[np.ndarray],
                      answers: Sequence[np.ndarray], keys: Sequence[str],
                      generation: bool = False) -> list[bool]:
    """Whether greedy decoding answers each prompt with its key. Prompt and answer together have the
    same length in all rows.

    One pass over prompt and answer decides: as long as the most probable tokens are the answer's,
    generation would see the same context and produce them. Where they differ, the digits so far
    nearly always rule out the key; the open rows are generated. So are all rows of a method that
    depends on the length: in one pass the first digit would be read with the angles of the last.
    """
    verdicts: list[bool | None] = [None] * len(keys)
    if not generation and not depends_on_length(model.config.rope):
        for i, produced in enumerate(most_probable(model, prompts, answers)):
            agreeing = 0
            while agreeing < len(answers[i]) and produced[agreeing] == answers[i][agreeing]:
                agreeing += 1
            verdicts[i] = judge_tokens(tokenizer, produced[:agreeing + 1], keys[i])
    open_rows = [i for i, verdict in enumerate(verdicts) if verdict is None]
    for length in sorted({len(prompts[i]) for i in open_rows}):
        rows = [i for i in open_rows if len(prompts[i]) == length]
        verdicts_of_rows = judge_generated(model, tokenizer, np.stack([prompts[i] for i in rows]),
                                           len(answers[rows[0]]) + 4, [keys[i] for i in rows])
        for i, verdict in zip(rows, verdicts_of_rows):
            verdicts[i] = verdict
    return [bool(verdict) for verdict in verdicts]


def judge_generated(model: LLaMA, tokenizer: Tokenizer, prompts: np.ndarray, max_new: int,
                    keys: Sequence[str]) -> list[bool]:
    """Verdicts on greedy continuations of prompts [B, T], generated until all are decided."""
    produced: list[list[int]] = [[] for _ in keys]
    verdicts: list[bool | None] = [None] * len(keys)
    prompts = torch.from_numpy(prompts).to(model.device)
    for tokens in stream(model, prompts, max_new, stop=(tokenizer.eos_id,)):
        for i, token in enumerate(tokens.tolist()):
            produced[i].append(token)
            if verdicts[i] is None:
                verdicts[i] = judge_tokens(tokenizer, produced[i], keys[i])
        if None not in verdicts:
            break
    for i, verdict in enumerate(verdicts):
        if verdict is None:
            verdicts[i] = judge_tokens(tokenizer, produced[i], keys[i], ended=True)
    return verdicts


@torch.inference_mode()
def most_probable(model: LLaMA, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]
                  ) -> list[list[int]]:
    """The most probable token at each place of the answer and at the one after it, in one pass over
    prompts and answers."""
    rows = [np.concatenate([prompt, answer]) for prompt, answer in zip(prompts, answers)]
    ids = torch.from_numpy(np.stack(rows)).to(model.device)                      # [B, T]
    longest = max(map(len, answers))
    logits = model(ids, last=longest + 1)                                 # [B, longest + 1, V]
    require_numbers(logits, "an answer's probability")
    greedy = logits.argmax(dim=-1).cpu()                                        # [B, longest + 1]
    return [row[longest - len(answer):].tolist() for row, answer in zip(greedy, answers)]
