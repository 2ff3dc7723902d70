"""The file format of Hugging Face's weights, written. (hugging_face.py reads it.)"""
import json
from collections.abc import Callable
from pathlib import Path

import torch

from common.distributed import whole
from common.files import whole_file
from model import ModelConfig
from weights.checks import check_tensor_values
from weights.hugging_face import hugging_face_name, reorder_rows
from weights.save import compact_tensor

SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
               torch.float64: "F64"}
NamedTensors = list[tuple[str, torch.Tensor]]  # with Meta's names


def write_safetensors(path: Path, config: ModelConfig, tensors: NamedTensors,
                      dtype: torch.dtype | None,
                      name_in_file: Callable[[str], str] = hugging_face_name) -> int:
    """Write tensors, one at a time, as a safetensors file, their rows in Hugging Face's order.
    Returns the bytes of the tensors.

    The format: the length of the header, 8 bytes, little-endian; the header, JSON
    {name: {dtype, shape, data_offsets}}, padded with spaces to a multiple of 8; the tensors.
    """
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        kind = dtype or tensor.dtype
        start = end
        end += tensor.numel() * kind.itemsize
        header[name_in_file(name)] = {"dtype": SAFETENSORS[kind], "shape": list(tensor.shape),
                                      "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    try:
        with whole_file(path) as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name, tensor in tensors:
                tensor = whole(tensor)
                check_tensor_values(path, name, tensor, dtype or tensor.dtype)
                tensor = reorder_rows(config, name, tensor.cpu(), inverse=True)
                file.write(compact_tensor(tensor, dtype).flatten().view(torch.uint8).numpy())
    except OSError as error:  # a full disk: say at which file
        raise OSError(error.errno, error.strerror, str(path)) from None
    return end
