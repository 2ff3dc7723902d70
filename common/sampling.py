"""From logits to a token: greedy, by temperature, or from the likeliest tokens (top_p)."""
import math

import torch
from torch import Tensor

from common.errors import UserError
from common.results import require_numbers


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token a row: logits [B, V] -> [B]."""
    require_numbers(logits, "an answer's probability")
    if temperature <= 0:
        return logits.argmax(dim=-1)
    probabilities, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities            # mass of the likelier tokens
    probabilities = probabilities.masked_fill((before >= top_p) & (before > 0), 0)
    choice = torch.multinomial(probabilities, 1, generator=generator)                    # [B, 1]
    return order.gather(-1, choice)[:, 0]


def check_sampling(prompt: Tensor, temperature: float, top_p: float) -> None:
    """Refuse an empty prompt [B, 0] and impossible settings."""
    if prompt.shape[1] < 1:
        raise UserError("the prompt is empty: give at least one token (BOS)")
    if not ((temperature == 0 or 1e-6 <= temperature < math.inf) and 0 <= top_p <= 1):
        raise UserError(f"temperature {temperature}, top_p {top_p}: give a temperature of 0 "
                        "(greedy) or at least 1e-6, and a top_p from 0 to 1")
