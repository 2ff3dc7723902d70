"""What every result says: which model, with which positions, measured where and by what."""
import math
from typing import Any

import torch

from common.device import describe_device, dtype_name
from common.environment import command_line, versions
from common.errors import UserError


def result(model: torch.nn.Module, seed: int, **measured) -> dict[str, Any]:
    """The dict of a result file: the model and its RoPE, `measured`, and the conditions."""
    return {"model": str(getattr(model, "path", "")),
            "rope": model.config.rope.to_dict(),
            "original_window": model.config.original_window,
            **measured,
            "seed": seed,
            "dtype": dtype_name(model.tok_embeddings.weight.dtype),
            "matmul": matmul_mode(model),
            "attention": model.attention,
            "device": describe_device(model.device),
            "versions": versions(),
            "command": command_line()}


def matmul_mode(model: torch.nn.Module) -> str | None:
    """How PyTorch multiplies the matrices of a float32 model: highest, high or medium.

    None for models of another dtype, whose matrices are multiplied in that dtype.
    """
    if model.tok_embeddings.weight.dtype != torch.float32:
        return None
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody set PyTorch's newer switches, one for each backend
        return "by backend"


def require_numbers(computed: Any, name: str = "the loss") -> None:
    """A UserError for losses or logits that are NaN or +infinity, which should be no result."""
    if not (torch.as_tensor(computed) < math.inf).all():
        raise UserError(f"{name} is not a number: the weights are damaged, or the dtype cannot "
                        "hold what is computed: try --dtype float32")
