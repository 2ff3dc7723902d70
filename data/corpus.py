"""Token folders, as prepare.py writes them, and the documents on which models are measured."""
import hashlib
import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import read_json, read_json_object, write_json
from data.prepare import (DEFAULT_MB, PrepareConfig, prepare, read_part, replaced_folder,
                          token_dtype, write_split)
from data.sources import read_text, text_files, unwanted
from data.tokenizer import Tokenizer, open_tokenizer

CORPORA = Path("data/corpora")
CHARACTERS_A_TOKEN = 4  # of prose, in tokenizers of 50,000 pieces; smaller ones have fewer


class TokenFile:
    """One split of a token folder, memory-mapped: `tokens`, the ids of all documents, and
    `offsets`, the index at which each document begins, and the end."""

    def __init__(self, folder: str | Path, split: str):
        folder = Path(folder)
        meta = read_json(folder / "meta.json")
        try:
            self.offsets = np.load(folder / f"{split}.docs.npy")
            check_format(self.offsets, meta["dtype"])
            if len(self.offsets) == 1:
                raise UserError(f"{folder}: no document is in the {split} split: prepare it with "
                                "a --val-fraction between 0 and 1")
            self.tokens = np.memmap(folder / f"{split}.bin", dtype=meta["dtype"], mode="r")
            self.tokenizer_sha256 = meta["tokenizer_sha256"]
            written = self.offsets[-1]
        except UserError:
            raise
        except (OSError, EOFError, ValueError, TypeError, LookupError) as error:
            raise UserError(f"{folder}: the {split} split cannot be read ({error}): prepare it "
                            "again with data/prepare.py") from None
        if written != len(self.tokens):
            raise UserError(f"{folder}: {split}.bin holds {len(self.tokens)} tokens, {written} "
                            "were written: prepare it again with data/prepare.py")

        self.vocab_size = math.inf  # unknown before require_same_tokenizer

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1, int64."""
        ids = self.tokens[start:stop].astype(np.int64)
        if len(ids) > 0 and ids.max() >= self.vocab_size:
            raise UserError(f"{self.tokens.filename}: holds the token {ids.max()}, the tokenizer "
                            f"has {self.vocab_size}: prepare it again with data/prepare.py")
        return ids

    def documents(self, at_least: int = 1) -> Iterator[np.ndarray]:
        """The documents of that many tokens or more, in order: int64 ids, BOS first, EOS last."""
        for start, end in zip(self.offsets[:-1], self.offsets[1:]):
            if end - start >= at_least:
                yield self.read(start, end)


def check_format(offsets: np.ndarray, dtype: str) -> None:
    """A ValueError for what prepare.py does not write."""
    if dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype {dtype!r:.30} of the tokens")
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) == 0:
        raise ValueError("the offsets of its documents are no row of whole numbers")
    if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any():
        raise ValueError("the offsets of its documents do not rise from 0")


def require_same_tokenizer(corpus: TokenFile, tokenizer: Tokenizer) -> None:
    """Refuse a corpus of another tokenizer: its ids would mean other text. From here on ids beyond
    its vocabulary are refused, too."""
    if corpus.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(f"the corpus was tokenised with another tokenizer than {tokenizer.path}: "
                        f"prepare it again with data/prepare.py --tokenizer {tokenizer.path}")
    corpus.vocab_size = tokenizer.vocab_size


def validation_documents(folder: str | Path, at_least: int, max_tokens: int, tokenizer: Tokenizer,
                         whole: bool = False) -> list[np.ndarray]:
    """Held-out documents of a token folder, all cut to `at_least` tokens, or `whole`; as many as
    have about `max_tokens` tokens together when cut, if there are so many."""
    corpus = TokenFile(folder, "val")
    require_same_tokenizer(corpus, tokenizer)
    count = max(1, max_tokens // at_least)
    chosen = list(itertools.islice(corpus.documents(at_least), count))
    if not chosen:
        raise UserError(f"no validation document has {at_least} tokens: give a larger corpus, "
                        "or text with --text, or a shorter window")
    return chosen if whole else [document[:at_least] for document in chosen]


def read_documents(paths: Sequence[str | Path], tokenizer: Tokenizer, max_tokens: int,
                   window: int) -> list[np.ndarray]:
    """Text files as documents, BOS in front, of at most `max_tokens` tokens (0: whole). At least
    one has to be longer than `window`."""
    documents = []
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; --text takes UTF-8 text files")
        documents.append(np.array(read_tokens(path, tokenizer, max_tokens), np.int64))
    longest = max(len(document) for document in documents)
    if longest <= window:
        raise UserError(f"the longest text has {longest} tokens, the window {window}: "
                        "give a longer text or a shorter --window")
    return documents


def read_tokens(path: str | Path, tokenizer: Tokenizer, max_tokens: int) -> list[int]:
    """The first `max_tokens` ids (0: all) of a text file, BOS in front. Of a long file only as much
    is read as that takes."""
    whole = os.path.getsize(path)
    size = 16 * max_tokens + 4096 if max_tokens else whole      # a token is rarely longer
    while True:
        text = read_text(path, size)
        if text is None:
            raise UserError(f"{path}: not UTF-8 text; convert it first (iconv -t utf-8)")
        ids = tokenizer.encode(text, bos=True)
        # 100 more than asked for: the last ids of a cut text may be others than those of the whole.
        if size >= whole or len(ids) > max_tokens + 100:
            return ids[:max_tokens or None]
        size *= 4


def check_max_tokens(max_tokens: int, window: int) -> None:
    """Refuse a --max-tokens (0: no limit) that cuts every text to the window or less. The window
    reads `window` tokens and predicts the one after each, so it needs one more."""
    if 0 < max_tokens <= window:
        raise UserError(f"--max-tokens {max_tokens} is below the window {window} and the token "
                        f"after it: give at least {window + 1}, or 0 for the whole text, or a "
                        "shorter --window")


def evaluation_documents(corpus: TokenFile, lengths: Sequence[int], max_tokens: int | None,
                         tokenizer: Tokenizer, quiet: bool = False
                         ) -> tuple[list[np.ndarray], list[int]]:
    """Held-out documents to measure at all `lengths` on, as good as the corpus has them, and the
    lengths that fit into them. What had to be done is said in a line.

    They are cut to twice the longest length: in shorter ones few tokens would have a full window.
    If none is so long, the longest serves, if it is longer than all lengths, or documents are
    joined. max_tokens: to score in all of them together [16,384, or one document].
    """
    require_same_tokenizer(corpus, tokenizer)
    longest = max(lengths)
    wanted = min(2 * longest, len(corpus))
    if max_tokens is not None:
        wanted = min(wanted, max_tokens + 1)
    count = max(1, (max_tokens or 16384) // wanted)
    notes = []
    chosen = [document[:wanted] for document in itertools.islice(corpus.documents(wanted), count)]
    if not chosen:
        chosen = sorted(corpus.documents(longest + 1), key=len)[-1:]
    if not chosen:
        ids = corpus.read(0, min(2 * count * wanted, len(corpus)))
        if tokenizer.bos_id != tokenizer.eos_id:
            ids = ids[ids != tokenizer.bos_id]              # BOS stands once, at the start of each
        ids = ids[:count * (wanted - 1)]
        size = min(wanted - 1, len(ids))
        pieces = [ids[i:i + size] for i in range(0, len(ids), size)]
        chosen = [np.concatenate([[tokenizer.bos_id], piece])
                  for piece in pieces if len(piece) == size]
        notes.append(f"no document has {wanted:,} tokens: shorter ones are joined")
    fitting = [n for n in lengths if n < len(chosen[0])]
    if not fitting:
        raise UserError(f"{len(chosen[0]):,} held-out tokens are fewer than the shortest length, "
                        f"{min(lengths)}, needs: give more text (or --max-tokens), shorter "
                        "--lengths, or --no-eval")
    if fitting != list(lengths):
        missing = ", ".join(str(n) for n in lengths if n not in fitting)
        notes.append(f"{len(chosen[0]):,} tokens in a row: too few to measure {missing}")
    for note in notes if not quiet else []:
        print(f"held out   {note}")
    return chosen, fitting


# --------------------------------------------------------------------------------------------------
# A user's own text

def corpus_of_text(names: Sequence[str], tokenizer: Tokenizer, held_out: int) -> Path:
    """A token folder of the user's files and folders of them, made once. A text counts once.

    The end of the longest text is held out: a tenth of all text, or about `held_out` tokens if that
    is more, but at most a third of it.
    """
    texts = {}
    for path, _ in text_files(list(names)):
        text = read_text(path)
        if unwanted(text) is None:
            texts.setdefault(" ".join(text.split()), (path, text))
    if not texts:
        raise UserError(f"--text {' '.join(map(str, names))}: no text in it")
    texts = dict(texts.values())
    longest = max(texts, key=lambda path: len(texts[path]))
    total = sum(map(len, texts.values()))
    share = max(total / 10, CHARACTERS_A_TOKEN * held_out) / len(texts[longest])
    share = min(share, 1 / 3)
    key = json.dumps([list(texts.values()), tokenizer.sha256, held_out]).encode()
    out = CORPORA / f"text-{hashlib.sha256(key).hexdigest()[:12]}"
    if find_problem(out, read_json_object(out / "meta.json"), tokenizer) is None:
        return out

    validation = read_part(texts.get, "val", share, longest)
    texts[longest] = read_part(texts.get, "train", share, longest)
    with replaced_folder(out) as folder:
        splits = {"train": write_split(folder, "train", list(texts), texts.get, tokenizer),
                  "val": write_split(folder, "val", [validation], str, tokenizer)}
        write_json(folder / "meta.json", {
            "source": "text", "files": list(map(str, texts)), "splits": splits,
            "tokenizer_sha256": tokenizer.sha256, "dtype": token_dtype(tokenizer)})
    print(f"text       {splits['train']['tokens']:,} tokens to train on; the last {share:.0%} of "
          f"{longest} are held out, {splits['val']['tokens']:,} tokens -> {out}")
    return out


# --------------------------------------------------------------------------------------------------
# The default corpus, which is prepared when it is first needed

def corpus_for(folder: str | Path, tokenizer: Tokenizer, max_mb: float | None = None) -> Path:
    """The folder of the default corpus for this tokenizer, of max_mb or more (None: any size).

    That is `folder`, or a neighbour of it:
        python-0a1b2c3d    if the default corpus in `folder` has another tokenizer
        python-96mb        if it is smaller, or not there yet and to have another size than 32 MB
    So two models, and two sizes, can take turns: a training on more text does not change the
    held-out documents on which all others are measured.
    """
    folder = Path(folder)
    is_default = folder.name == "python"  # and not a name that somebody chose
    meta = read_json_object(folder / "meta.json")
    if meta.get("source", "python") != "python":
        return folder
    own_name = f"{folder.name}-{tokenizer.sha256[:8]}"  # of this tokenizer
    if meta.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        folder = folder.with_name(own_name)
        meta = read_json_object(folder / "meta.json")
    if max_mb is None:
        return folder
    another_size = is_smaller(meta, max_mb) if meta else (
        is_default and max_mb != DEFAULT_MB["python"])
    if another_size:
        folder = folder.with_name(f"{folder.name}-{max_mb:g}mb")
        meta = read_json_object(folder / "meta.json")
        if meta.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
            folder = folder.with_name(f"{own_name}-{max_mb:g}mb")
    return folder


def is_python(folder: Path) -> bool:
    return read_json_object(folder / "meta.json").get("source") == "python"


def is_default_corpus(folder: Path) -> bool:
    """Whether this is the default corpus, or its neighbour of another tokenizer or size."""
    inside = folder.parent.resolve() == CORPORA.resolve()
    return inside and bool(re.fullmatch(r"python(-[0-9a-f]{8})?(-[\d.e+-]+mb)?", folder.name))


def is_smaller(meta: dict, max_mb: float) -> bool:
    """Whether the default corpus holds less than max_mb although its source has more."""
    is_part = "beyond --max-mb" in meta.get("left_out", {})
    return is_part and meta.get("max_mb", 0) < max_mb


def ensure_corpus(folder: str | Path, tokenizer_path: str | Path,
                  max_mb: float | None = None) -> Path:
    """A token folder that is whole, of this tokenizer and of at least max_mb (None: any size).

    This is corpus_for(folder). The default corpus is made if it is missing or damaged, and so is a
    neighbour of another folder of Python source. Any other missing folder is a UserError, as its
    name may be mistyped; so is one of other text that does not serve.
    """
    tokenizer = open_tokenizer(tokenizer_path)
    asked, folder = Path(folder), corpus_for(folder, tokenizer, max_mb)
    if (folder / "meta.json").exists():
        meta = read_json_object(folder / "meta.json")
        problem = find_problem(folder, meta, tokenizer)
        if problem is None:
            return folder
        if meta.get("source") != "python":
            raise UserError(f"{folder}: {problem}: prepare it again: python data/prepare.py "
                            f"--out {folder} --tokenizer {tokenizer_path} ...")
        warnings.warn(f"{folder}: {problem}: it is made again", stacklevel=1)
    elif not (is_default_corpus(folder) or is_python(asked)):
        raise UserError(f"{folder}: no such token folder: name one that is there, or make it with "
                        f"python data/prepare.py --out {folder} --tokenizer {tokenizer_path} ...")
    return prepare(PrepareConfig(tokenizer=str(tokenizer_path), out=str(folder), max_mb=max_mb))


def find_problem(folder: Path, meta: dict, tokenizer: Tokenizer) -> str | None:
    """Why a token folder does not serve, in a few words; None if it does."""
    try:
        bytes_per_token = np.dtype(meta["dtype"]).itemsize
        for split, counts in meta["splits"].items():
            size = os.path.getsize(folder / f"{split}.bin")
            offsets = folder / f"{split}.docs.npy"
            if size != counts["tokens"] * bytes_per_token or not offsets.exists():
                return "a file is missing or cut off"
        if meta["tokenizer_sha256"] != tokenizer.sha256:
            return f"made with another tokenizer than {tokenizer.path}"
    except (OSError, KeyError, TypeError, AttributeError):
        return "not a whole token folder"
    return None
