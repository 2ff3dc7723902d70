"""What every reader of weights asks of a tensor before it goes into a model."""
import math
import zipfile
import zlib
from pathlib import Path
from typing import IO

import torch

from common.errors import UserError, one_line

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


# ---- .pth files ----------------------------------------------------------------------------------

def check_archive(file: Path) -> None:
    """A ValueError if a .pth file, a zip archive, says of itself that it holds more than it has
    bytes: it could fill memory. torch.save does not compress, and where the file is mapped,
    compressed bytes would be taken for numbers."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    if any(record.compress_type for record in records):
        raise ValueError("its records are compressed")
    if sum(record.file_size for record in records) > file.stat().st_size:
        raise ValueError("its records are larger than the file")


def check_crc(file: Path) -> None:
    """A UserError if a checksum in a .pth file is wrong. PyTorch writes them, unless it is told not
    to, and does not check them when it reads. Other formats have none: safetensors, GGUF, and
    PyTorch's before 1.6."""
    if not starts_as_zip(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.CRC != 0:
                    with archive.open(record) as data:
                        while data.read(2**20):     # raises at the end
                            pass
    except Exception as error:  # damaged bytes raise anything
        raise UserError(f"{file}: damaged ({one_line(error)}): copy it again") from None


def starts_as_zip(file: Path) -> bool:
    """Whether it begins as a zip archive. (Two bytes are not enough: the length of a safetensors
    file's header may be "PK".)"""
    with open(file, "rb") as start:
        return start.read(4) == b"PK\3\4"


def crc32_of(file: IO[bytes], length: int) -> int:
    """Of the next bytes of a file, so many."""
    checksum = 0
    while data := file.read(min(length, 2**24)):
        checksum = zlib.crc32(data, checksum)
        length -= len(data)
    return checksum


def file_crc32(path: Path) -> int:
    with open(path, "rb") as file:
        return crc32_of(file, path.stat().st_size)
