"""GGUF: one file with a model's shape, its weights (mostly quantised) and its tokenizer. Read here.

    "GGUF"  version  number of tensors  number of keys
    key, type, value          ...  general.architecture = "llama", llama.block_count = 30,
                                   tokenizer.ggml.tokens = [...]
    name, dims, type, offset  ...  blk.0.attn_q.weight, [in, out], Q4_1, where its bytes lie
    bytes                     ...  each tensor at its offset, row after row,
                                   in blocks of 32 or 256 weights that share a scale

The gguf package undoes the quantisation. Its GGUFReader is not used: it makes several Python
objects for every word of the vocabulary (half a minute and 600 MB for LLaMA 3's), and a damaged
count can keep it busy for ever.
"""
import dataclasses
import enum
import math
import mmap
import struct
import types
from pathlib import Path

import numpy as np

from common.errors import UserError

# GGUF's types of values: numbers, by struct's letters, and the other two.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?",
           10: "Q", 11: "q", 12: "d"}
FLOAT32, STRING, ARRAY = 6, 8, 9
LONGEST_ARRAY = 1 << 24  # vocabularies have a sixteenth of it


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    shape: tuple[int, ...]  # as in PyTorch, [out, in]; the file has it the other way round
    kind: enum.IntEnum      # a gguf.GGMLQuantizationType
    start: int              # bytes from the beginning of the file
    row_bytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    path: Path
    metadata: dict[str, object]  # key -> number, bool, str or list
    tensors: dict[str, StoredTensor]


def gguf_package() -> types.ModuleType:
    """The gguf package, which only .gguf files need."""
    try:
        import gguf
    except ImportError:
        raise UserError("reading a .gguf file needs the gguf package: pip install gguf") from None
    return gguf


def damaged(problem: str) -> UserError:
    return UserError(f"{problem}: copy or download it again")


# --------------------------------------------------------------------------------------------------
# The header: keys, and where the tensors lie

def read_header(path: str | Path) -> Header:
    """The header of a .gguf file; a UserError if it is none, damaged or cut off. A damaged length
    costs no memory: it is compared with the size of the file before it is used."""
    path = Path(path)
    gguf_package()
    try:
        with (open(path, "rb") as file,
              mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data):
            return Header(path, *parse_header(data))
    except IsADirectoryError:
        problem = "a folder: give the .gguf file in it"
    except FileNotFoundError:
        problem = "no such file: give the path of a .gguf file"
    except UserError as error:
        problem = error
    except UnicodeDecodeError:
        problem = damaged("damaged (a name that is no UTF-8)")
    except (struct.error, ValueError):  # ValueError: an empty file cannot be mapped
        problem = damaged("damaged or cut off (its header does not fit the file)")
    raise UserError(f"{path}: {problem}")


class Cursor:
    """Reads bytes from front to back. Running out of them is a struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, letters: str) -> tuple:
        """Numbers, by struct's letters."""
        values = struct.unpack_from("<" + letters, self.data, self.at)
        self.at += struct.calcsize("<" + letters)
        return values

    def string(self, errors: str = "strict") -> str:
        [size] = self.take("Q")
        [text] = self.take(f"{size}s")
        return str(text, "utf-8", errors)

    def name(self) -> str:
        """A string that will stand in messages: it has to be short and printable."""
        name = self.string()
        if not name.isprintable() or len(name) > 200:
            raise damaged(f"damaged (a name that reads {name!r:.60})")
        return name

    def array(self) -> list:
        """Numbers or strings. A token that is no UTF-8 matters only to who wants the tokenizer."""
        kind, count = self.take("IQ")
        if count > LONGEST_ARRAY:
            raise damaged(f"damaged (an array of {count} elements)")
        if kind == STRING:
            return [self.string("surrogateescape") for _ in range(count)]
        if kind not in NUMBERS:
            raise damaged(f"an array of type {kind}, which no version of GGUF has")
        return list(self.take(f"{count}{NUMBERS[kind]}"))


def parse_header(data: mmap.mmap) -> tuple[dict, dict]:
    """(metadata, tensors) of a GGUF file, given its bytes."""
    if data[:4] != b"GGUF":
        raise UserError(f"not a GGUF file (it begins with {data[:4]!r}): give a .gguf file")
    cursor = Cursor(data)
    cursor.at = 4
    version, tensor_count, key_count = cursor.take("IQQ")
    if version & 0xFFFF == 0:
        raise UserError("a big-endian GGUF file: convert it with the package's gguf-convert-endian")
    if version not in (2, 3):
        raise UserError(f"GGUF version {version}, and 2 and 3 are read: convert the model anew")
    metadata = read_metadata(cursor, key_count)
    tensors = read_tensor_list(cursor, tensor_count)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise damaged(f"general.alignment = {alignment!r:.60}")
    first_byte = math.ceil(cursor.at / alignment) * alignment
    return metadata, place_tensors(tensors, first_byte, len(data))


def read_metadata(cursor: Cursor, count: int) -> dict[str, object]:
    metadata = {}
    for _ in range(count):
        key = cursor.name()
        [kind] = cursor.take("I")
        if key in metadata:
            raise damaged(f"damaged ({key!r} is there twice)")
        if kind in NUMBERS:
            [value] = cursor.take(NUMBERS[kind])
            metadata[key] = shortest_decimal(value) if kind == FLOAT32 else value
        elif kind == STRING:
            metadata[key] = cursor.string()
        elif kind == ARRAY:
            metadata[key] = cursor.array()
        else:
            raise damaged(f"{key!r} is of type {kind}, which no version of GGUF has")
    return metadata


def shortest_decimal(value: float) -> float:
    """The shortest decimal number that rounds to this float32: 1e-5, not 9.99999975e-06."""
    return float(str(np.float32(value)))


def read_tensor_list(cursor: Cursor, count: int) -> dict[str, StoredTensor]:
    """{name: StoredTensor}, whose `start`, as in the file, counts from the first tensor's."""
    gguf = gguf_package()
    tensors = {}
    for _ in range(count):
        name = cursor.name()
        [dimensions] = cursor.take("I")
        if name in tensors or not 1 <= dimensions <= 4:
            raise damaged(f"damaged ({name!r} is there twice, or has {dimensions} dimensions)")
        shape = cursor.take("Q" * dimensions)[::-1]
        number, offset = cursor.take("IQ")
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise UserError(f"{name} is of type {number}, which this gguf package does not know: "
                            "pip install -U gguf") from None
        if shape[-1] % block or 0 in shape:
            raise damaged(f"{name} is {list(shape)}, not in whole blocks of {block} ({kind.name})")
        tensors[name] = StoredTensor(shape, kind, offset, shape[-1] // block * block_bytes)
    return tensors


def place_tensors(tensors: dict, first_byte: int, file_size: int) -> dict[str, StoredTensor]:
    """The same tensors, with `start` counted from the beginning of the file. Two of them may not
    share bytes, else a small file could stand for a model of any size."""
    placed = {}
    end = first_byte
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        start = first_byte + tensor.start
        if start < end:
            raise damaged(f"damaged ({name} overlaps another tensor)")
        end = start + math.prod(tensor.shape[:-1]) * tensor.row_bytes
        if end > file_size:
            raise damaged(f"cut off or damaged: {name} ends at byte {end} of {file_size}")
        placed[name] = dataclasses.replace(tensor, start=start)
    return placed
