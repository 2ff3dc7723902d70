"""What every reader of weights asks of a tensor before it goes into a model."""
import math
from pathlib import Path

import torch

from common.errors import UserError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Pages of a mapped file count as memory of this process once they are read, until the file is
# mapped anew. A reader does that after a sixteenth of the file, but not below so many bytes.
REMAP = 2**26


def check_tensor_kind(file: Path, name: str, tensor: torch.Tensor) -> None:
    """Refuse integers, and a few stored numbers that a stride of 0 expands to a tensor of any
    size."""
    if tensor.dtype not in FLOATS:
        raise UserError(f"{file}: {name} is {tensor.dtype}: quantised weights do not load; take "
                        "the release in bfloat16")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise UserError(f"{file}: {name} repeats the numbers that the file holds of it: take "
                        "weights saved as plain tensors")


def check_tensor_values(file: Path, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuse NaN, infinity, and numbers too large for `dtype`.

    aminmax reads the tensor once and allocates nothing; one NaN makes both its results NaN.
    """
    check_tensor_kind(file, name, tensor)
    bounds = torch.aminmax(tensor)
    low = float(bounds.min)
    high = float(bounds.max)
    largest = max(-low, high)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{file}: {name} holds NaN or infinity: its training diverged or the file "
                        "is damaged; take another checkpoint")
    if largest > torch.finfo(dtype).max:
        raise UserError(f"{file}: {name} reaches {largest:.3g}, too large for {dtype}: load it as "
                        "bfloat16 or float32")
