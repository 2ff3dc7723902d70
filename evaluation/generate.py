"""`python eval.py generate`: a model's own words, the proof that its weights are right."""
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.cache import ResultCache
from common.cli import field
from common.errors import UserError
from common.results import result
from data.decoding import decoded_pieces
from data.sources import read_text
from model import stream
from weights.flags import ModelFlags, load_from_flags


@dataclass
class GenerateFlags(ModelFlags):
    prompt: str = field("", "text to continue; @FILE reads it from a file")
    max_new_tokens: int = field(100, "tokens at most; an end-of-sequence token ends it sooner")
    temperature: float = field(0.0, "0 takes the most probable token always")
    top_p: float = field(1.0, "sample from the fewest tokens whose probability reaches this")


def generate_command(flags: GenerateFlags, _: ResultCache) -> dict[str, Any]:
    text = prompt_text(flags)
    model, tokenizer = load_from_flags(flags)
    prompt = tokenizer.encode(text, bos=True)
    total = len(prompt) + flags.max_new_tokens
    beyond = total > model.config.max_seq_len
    print(f"prompt     {len(prompt)} tokens, BOS ({tokenizer.bos_id}) in front, no chat template"
          + (f"; up to {total} with the answer, beyond the window" if beyond else "") + "\n")
    print(text, end="", flush=True)
    started = time.perf_counter()
    times: list[float] = []

    def tokens() -> Iterator[int]:
        rows = stream(model, torch.tensor([prompt], device=model.device), flags.max_new_tokens,
                      flags.temperature, flags.top_p, (tokenizer.eos_id,), flags.seed)
        for row in rows:
            times.append(time.perf_counter() - started)
            yield int(row[0])

    answer = ""
    for piece in decoded_pieces(tokenizer, prompt, tokens()):
        print(piece, end="", flush=True)
        answer += piece
    seconds, first = time.perf_counter() - started, times[0]
    speed = (len(times) - 1) / max(seconds - first, 1e-9)
    print(f"\n\n{len(times)} tokens: the first after {first:.2f} s, then {speed:.1f} tok/s")
    return result(model, flags.seed, prompt=text, text=answer, prompt_tokens=len(prompt),
                  new_tokens=len(times), first_token_seconds=first, tokens_per_second=speed,
                  temperature=flags.temperature, top_p=flags.top_p, seconds=seconds)


def prompt_text(flags: GenerateFlags) -> str:
    """--prompt, or the file that @FILE names."""
    if not flags.prompt:
        raise UserError("--prompt is empty: give a text to continue")
    if flags.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {flags.max_new_tokens}: has to be at least 1")
    if not flags.prompt.startswith("@"):
        return flags.prompt
    path = Path(flags.prompt[1:])
    text = read_text(path) if path.is_file() else None
    if text is None:
        raise UserError(f"--prompt {flags.prompt}: no such file, or not UTF-8 text")
    return text
