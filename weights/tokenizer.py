"""The tokenizer that lies in a model's folder or .gguf file."""
from pathlib import Path

from common.errors import UserError
from data.gguf_file import read_header
from data.tokenizer import Tokenizer, choose_file, open_tokenizer
from weights.load import why_no_model
from weights.save import find_file


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a model's folder, or of a tokenizer.model, tokenizer.json or .gguf file.

    vocab_size: of the model that uses it; a tokenizer that does not fit is a UserError. A model may
    have some more ids, which stand for nothing; tokenizer.padded_size counts them.
    """
    file = tokenizer_file(path)
    if not Path(path).exists():
        raise UserError(f"{path}: {why_no_model(Path(path))}")
    if not file.exists():
        raise UserError(f"{file}: no such file: copy the model's tokenizer.model there")
    tokenizer = open_tokenizer(file)
    pieces = tokenizer.vocab_size
    if vocab_size is not None and not pieces <= vocab_size <= 1.1 * pieces + 64:
        raise UserError(f"{file}: has {pieces} pieces, and the model's vocabulary {vocab_size}: "
                        "take the tokenizer that the model was trained with")
    tokenizer.padded_size = max(pieces, vocab_size or 0)
    return tokenizer


def tokenizer_file(path: str | Path) -> Path:
    """The file of a folder that choose_file takes. The path itself if it is a file."""
    if Path(path).is_file():
        return Path(path)
    return choose_file(find_file(path, "tokenizer.model"), find_file(path, "tokenizer.json"))


def has_tokenizer(path: str | Path) -> bool:
    """Whether load_tokenizer would find a tokenizer."""
    if Path(path).suffix == ".gguf" and Path(path).is_file():
        return "tokenizer.ggml.model" in read_header(path).metadata
    return Path(path).is_dir() and tokenizer_file(path).exists()
