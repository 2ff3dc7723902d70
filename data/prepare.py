"""Documents -> token files, which train.py and finetune.py read.

    python data/prepare.py                             # Python source text: needs no network
    python data/prepare.py --text my_books/ notes.txt  # your own UTF-8 files, and folders of them
    python data/prepare.py --source gutenberg --books 1342 84  # Project Gutenberg books by number
    python data/prepare.py --source pg19 --max-mb 200  # PG-19: validation is its test split

A token folder holds, for each split (train, val):
    SPLIT.bin       the ids of all documents in a row, each BOS ... EOS, as uint16 (uint32 if the
                    vocabulary needs it)
    SPLIT.docs.npy  int64 offsets, one more than documents: document i is ids[o[i]:o[i + 1]]
and meta.json: the source, the tokenizer's sha256, counts. The folder appears under its name only
when it is complete.

A hash of the content orders the documents and chooses the validation split. So neither depends on
the place of a file, no text is in both splits, and a part of a source (--max-mb) is a fair sample.
"""
import contextlib
import dataclasses
import hashlib
import os
import shutil
import sys
import tempfile
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # a script's own folder, data/, stands there

from common.cli import field, parse, run_command
from common.errors import UserError
from common.files import whole_file, write_json
from common.environment import command_line, versions
from common.locks import locked_beside
from data.passkey import GARBAGE, INFORMATION, INTRODUCTION, QUESTION
from data.sources import (Files, gutenberg_files, pg19_files, python_files, python_unwanted,
                          read_gutenberg, read_text, text_files, unwanted)
from data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer

TOKENIZER = ROOT / "data" / "tiny" / "tokenizer.model"
DEFAULT_MB = {"python": 32.0, "pg19": 256.0}  # 32 MB of Python are 13 million of our tokens
NEEDS_NEW_PATH = "needs a --tokenizer PATH that does not exist yet: models depend on one that does"
GROUP = 4_000_000  # characters read and encoded at a time


@dataclasses.dataclass
class PrepareConfig:
    source: str = field("python", "where documents come from, unless --text names them",
                        choices=["python", "gutenberg", "pg19"])
    text: list[str] = field([], "your own UTF-8 files, and folders of them")
    books: list[int] = field([], "numbers of Project Gutenberg books, for --source gutenberg")
    tokenizer: str = field("", "SentencePiece model, tokenizer.json, GGUF file, or a model's "
                           "folder [data/tiny/tokenizer.model, trained on the documents if it is "
                           "not there]")
    train_tokenizer: int = field(0, "first train a tokenizer of this many pieces on the "
                                 "documents, and write it to --tokenizer")
    out: str = field("", "token folder to write [data/corpora/SOURCE]")
    val_fraction: float = field(
        0.02, "share of the documents that is for validation (pg19 has its own)")
    max_mb: float | None = field(None, "million characters to take, in the order of the "
                                 "documents' hashes [python 32, pg19 256, else all]")
    mirror: str = field(
        "", "another server in place of a download's own, with the same paths: https://HOST")


def prepare(config: PrepareConfig) -> Path:
    """Make the token folder that `config` describes; returns its path."""
    started = time.time()
    source = "text" if config.text else config.source
    out = Path(config.out or ROOT / "data" / "corpora" / source)
    validate_request(config, out)
    max_mb = DEFAULT_MB.get(source) if config.max_mb is None else config.max_mb
    files, read, why_not = open_source(config, out.parent / "downloads" / source, max_mb)
    documents, left_out = choose_documents(files, read, why_not, max_mb)
    if not documents:
        raise UserError(f"no text in {' '.join(config.text) or source} "
                        f"({dict(left_out) or 'no files'}): name other files with --text")
    splits = split_documents(documents, config.val_fraction)
    tokenizer = tokenizer_for(config, splits["train"] or splits["val"], read)

    readers = {split: read for split in splits}
    if len(documents) == 1 and 0 < config.val_fraction < 1:  # a single book is cut
        splits = {split: [path for _, _, path in documents] for split in splits}
        share = max(config.val_fraction, 0.1)
        readers = {split: partial(read_part, read, split, share) for split in splits}
        print(f"a single document: its last {share:.0%} is for validation")
    counts = {}
    with replaced_folder(out) as folder:
        for split, paths in splits.items():
            counts[split] = write_split(folder, split, paths, readers[split], tokenizer)
        write_json(folder / "meta.json", {
            "source": source, "settings": dataclasses.asdict(config), "max_mb": max_mb,
            "tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id,
            "dtype": token_dtype(tokenizer), "splits": counts, "left_out": dict(left_out),
            "command": command_line(), "versions": versions(),
            "seconds": round(time.time() - started, 1)})
    for split, n in counts.items():
        print(f"{split}: {n['documents']:,} documents, {n['tokens']:,} tokens, "
              f"{n['characters'] / max(n['tokens'], 1):.2f} characters a token")
    print("left out:", ", ".join(f"{n} {why}" for why, n in left_out.items()) or "nothing")
    print(f"{out}: {time.time() - started:.1f} s")
    return out


def validate_request(config: PrepareConfig, out: Path) -> None:
    """Refuse a request that cannot work before anything long begins."""
    if not 0 <= config.val_fraction <= 1:
        raise UserError(f"--val-fraction {config.val_fraction}: a share between 0 and 1")
    if config.max_mb is not None and not config.max_mb > 0:
        raise UserError(f"--max-mb {config.max_mb}: a number above 0")
    if config.books and (config.source != "gutenberg" or config.text):
        raise UserError("--books goes with --source gutenberg, and without --text")
    if config.mirror and not is_address(config.mirror):
        raise UserError(f"--mirror {config.mirror}: give an address that begins with https:// or "
                        "http://")
    if out.exists() and not (out / "meta.json").exists():
        if not out.is_dir() or any(out.iterdir()):
            raise UserError(f"--out {out}: holds something other than tokens: name another folder")
    if config.train_tokenizer:
        if config.tokenizer.endswith((".json", ".gguf")):
            raise UserError(f"--tokenizer {config.tokenizer}: what is trained is a SentencePiece "
                            "model: give a name that ends in .model")
        # Without meta.json this may be the same request, interrupted: see tokenizer_for.
        is_used = Path(config.tokenizer).exists() and (out / "meta.json").exists()
        if not config.tokenizer or is_used:
            raise UserError(f"--train-tokenizer {NEEDS_NEW_PATH}")
    if config.tokenizer and not config.train_tokenizer:
        open_tokenizer(config.tokenizer)


def is_address(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def open_source(config: PrepareConfig, downloads: Path,
                max_mb: float | None) -> tuple[Files, Callable, Callable]:
    """The source's files, downloaded if need be, the function that reads one, and the function
    that says why a text is no document."""
    host = config.mirror.rstrip("/")
    if config.text:
        return text_files(config.text), read_text, unwanted
    if config.source == "gutenberg":
        return gutenberg_files(config.books, downloads, host), read_gutenberg, unwanted
    if config.source == "pg19":
        return pg19_files(downloads, host, max_mb), read_text, unwanted
    return python_files(), read_text, python_unwanted


def choose_documents(files: Files, read: Callable, why_not: Callable,
                     max_mb: float | None) -> tuple[list[tuple], Counter]:
    """[(hash, split, path)] in the order of the hashes, and for each reason to leave a file out
    their number.

    The hash is SHA-256 of the text with every run of white space as one space: copies that differ
    in line ends or indentation are one document. If it is listed for two splits, the first counts.
    """
    documents = {}
    left_out = Counter()
    for path, split in tqdm(files, desc="reading", unit=" files", disable=None):
        text = read(path)
        reason = why_not(text)
        if reason is None:
            key = hashlib.sha256(" ".join(text.split()).encode("utf-8")).digest()
            if key in documents:
                reason = "duplicate"
            else:
                documents[key] = (split, path, len(text))
        if reason is not None:
            left_out[reason] += 1
    chosen = []
    taken = 0
    for key in sorted(documents):
        split, path, characters = documents[key]
        if split is None and max_mb is not None:
            if chosen and taken + characters > max_mb * 1e6:
                left_out["beyond --max-mb"] = len(documents) - len(chosen)
                break
            taken += characters
        chosen.append((key, split, path))
    return chosen, left_out


def split_documents(documents: list[tuple], val_fraction: float) -> dict[str, list]:
    """{"train": [paths], "val": [paths]} of [(hash, split, path)].

    A document without a split is for validation if the last 8 bytes of its hash, as a number in
    [0, 1), are below val_fraction (its first bytes are the order), and at least one document is.
    """
    draws = [int.from_bytes(key[-8:], "big") / 2**64 for key, *_ in documents]
    if val_fraction > 0 and len(documents) > 1:
        val_fraction = max(val_fraction, np.nextafter(min(draws), 1.0))
    splits = {"train": [], "val": []}
    for (_, split, path), draw in zip(documents, draws):
        drawn = "val" if draw < val_fraction else "train"
        splits[split or drawn].append(path)
    return splits


def read_part(read: Callable, split: str, share: float, path: str | Path) -> str:
    """The part of a single document that a split gets: the last `share` of it is for validation.
    It is cut at the end of a line, if one ends near."""
    text = read(path)
    cut = round(len(text) * (1 - share))
    cut = text.rfind("\n", cut * 9 // 10, cut) + 1 or cut
    return text[:cut] if split == "train" else text[cut:]


def tokenizer_for(config: PrepareConfig, paths: list, read: Callable) -> Tokenizer:
    """The tokenizer that is asked for, or a new one, trained on the documents. One that is there
    already has to be just this: the request was interrupted after it had been trained."""
    path = Path(config.tokenizer or TOKENIZER)
    if not config.train_tokenizer and (config.tokenizer or path.exists()):
        return open_tokenizer(path)
    size = config.train_tokenizer or 1024
    with tempfile.TemporaryDirectory() as folder:
        trained = train_tokenizer(tokenizer_sample(paths, read), Path(folder, path.name), size)
        content = Path(trained.path).read_bytes()
    if not path.exists():
        with locked_beside(path), whole_file(path) as file:
            file.write(content)
    elif path.read_bytes() != content:      # the same text would have given the same bytes
        raise UserError(f"--train-tokenizer {NEEDS_NEW_PATH}")
    return open_tokenizer(path)


def tokenizer_sample(paths: Iterable, read: Callable, megabytes: float = 8.0) -> Iterator[str]:
    """Texts to train a tokenizer on: documents, and after each some passkey prompts, whose words
    thereby become single tokens."""
    total = 0
    for i, path in enumerate(paths):
        text = read(path)
        yield text
        total += len(text)
        for j in range(len(text) // 8000 + 1):  # about 5 % of the sample
            key = (i * 7919 + j * 104729) % 90000 + 10000
            information = INFORMATION.format(key=key)
            yield f"{INTRODUCTION}{GARBAGE}{information}{QUESTION[1:]} {key}.\n"
        if total > megabytes * 1e6:
            return


def write_split(folder: Path, split: str, paths: list, read: Callable,
                tokenizer: Tokenizer) -> dict[str, int]:
    """Encode documents into SPLIT.bin and SPLIT.docs.npy; returns their counts for meta.json."""
    offsets = [0]
    characters = 0
    bar = tqdm(paths, desc=f"encoding {split}", unit=" documents", disable=None)
    with whole_file(folder / f"{split}.bin") as file:
        for group in text_groups(read(path) for path in bar):
            characters += sum(len(text) for text in group)
            for ids in tokenizer.encode_batch(group, bos=True, eos=True):
                file.write(np.array(ids, token_dtype(tokenizer)).tobytes())
                offsets.append(offsets[-1] + len(ids))
    with whole_file(folder / f"{split}.docs.npy") as file:
        np.save(file, np.array(offsets, np.int64))
    return {"documents": len(paths), "tokens": offsets[-1], "characters": characters}


def text_groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of about GROUP characters."""
    group = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if characters > GROUP:
            yield group
            group = []
            characters = 0
    if group:
        yield group


def token_dtype(tokenizer: Tokenizer) -> str:
    """The smallest type that holds every id."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


@contextlib.contextmanager
def replaced_folder(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` when the block ends well. Until then the one
    before stays, and a program that has its files open keeps them. A second process waits."""
    out = Path(os.path.realpath(out))   # a link to a folder stays one
    temporary, old = out.with_name(f".{out.name}.tmp"), out.with_name(f".{out.name}.old.tmp")
    with locked_beside(out, wait=True):
        if old.exists() and not out.exists():   # killed between the two renames
            os.rename(old, out)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            with contextlib.suppress(FileNotFoundError):
                os.rename(out, old)
            os.rename(temporary, out)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def main() -> None:
    prepare(parse(PrepareConfig, __doc__))


if __name__ == "__main__":
    run_command(main)
