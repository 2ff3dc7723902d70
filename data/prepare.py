"""Documents -> token files, which train.py and finetune.py read.

    python data/prepare.py                                     # Python source text, which every machine with PyTorch has: no network
    python data/prepare.py --text my_books/ notes.txt          # your own UTF-8 files, and folders of them
    python data/prepare.py --source gutenberg --books 1342 84  # Project Gutenberg books by number
    python data/prepare.py --source pg19 --max-mb 200          # PG-19: validation is its test split, on which papers report

A token folder holds, for each split (train, val):
    SPLIT.bin        the ids of all documents, one after another, uint16 (uint32 if the vocabulary needs it); each document is BOS ... EOS
    SPLIT.docs.npy   int64 offsets, one more than there are documents: document i is ids[offset[i]:offset[i + 1]]
and meta.json: where it came from, the tokenizer's sha256, counts. The folder appears under its name only when it is complete.

Documents are ordered by a hash of their content, and that hash chooses the validation split. So neither depends on where a file lies,
no text is in both splits, and a part of a source (--max-mb) is a fair sample of it.
"""
import base64
import contextlib
import dataclasses
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import sysconfig
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # run as a script: import from the repository's root, not from data/

from cli import UserError, command_line, field, parse, read_json, run, versions, whole_file, write_json
from data.passkey import GARBAGE, INFORMATION, INTRODUCTION, QUESTION
from data.tokenizer import open_tokenizer, train_tokenizer

TOKENIZER = ROOT / "data" / "tiny" / "tokenizer.model"
PYTHON_MB, PG19_MB = 32.0, 256.0  # taken unless --max-mb says otherwise; 32 MB of Python are 13 million tokens of our own tokenizer
LARGEST_MB = 64                   # a document is read and encoded whole, which takes about 25 times its size
GROUP = 4_000_000                 # characters read and encoded at a time


@dataclasses.dataclass
class PrepareConfig:
    source: str = field("python", "where documents come from, unless --text names them", choices=["python", "gutenberg", "pg19"])
    text: list[str] = field([], "your own UTF-8 files, and folders of them")
    books: list[int] = field([], "numbers of Project Gutenberg books, for --source gutenberg")
    tokenizer: str = field("", "SentencePiece model, tokenizer.json or GGUF file "
                          f"[{TOKENIZER.relative_to(ROOT)}, trained on the documents if it is not there]")
    train_tokenizer: int = field(0, "first train a tokenizer of this many pieces on the documents, and write it to --tokenizer")
    out: str = field("", "token folder to write [data/corpora/SOURCE]")
    val_fraction: float = field(0.02, "share of the documents that is for validation (pg19 has its own)")
    max_mb: float | None = field(None, "million characters to take, in the order of the documents' hashes "
                                       f"[python {PYTHON_MB:g}, pg19 {PG19_MB:g}, else all]")
    mirror: str = field("", "another server in place of a download's own, with the same paths: https://HOST")


# ---------------------------------------------------------------------------------------------------------------------
# Sources. Each lists its documents as (path, split): the split is None where the content's hash decides.

PYTHON_SKIPPED = {"__pycache__", "test", "tests", "testing", "_vendor", "_vendored", "encodings", "lib2to3", "idlelib", "site-packages",
                  "dist-packages"}  # tests and tables are monotonous; vendored copies are near-duplicates
GENERATED = re.compile(r"auto-?(matically )?-?generated|generated (by|from|using|with|file|code)|@generated|do not (edit|modify|change)",
                       re.IGNORECASE)


def python_files():
    """The Python source of the running interpreter: its standard library and the packages installed for it."""
    paths = sysconfig.get_paths()
    found = {}  # a dict as an ordered set: site-packages may lie inside the standard library's folder
    for root in dict.fromkeys(os.path.realpath(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")):
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(set(folders) - PYTHON_SKIPPED)
            found.update(((os.path.join(folder, name), None), None) for name in sorted(files) if name.endswith(".py"))
    return list(found)


def python_unwanted(text):
    """Why a Python file is not something a person wrote to be read, or None."""
    if len(text) < 500:
        return "shorter than 500 characters"
    if GENERATED.search(text, 0, 1000):
        return "generated"
    if len(text) > 100 * (text.count("\n") + 1) or max(map(len, text.split("\n"))) > 1000:
        return "huge lines"
    if sum(map(text.count, "0123456789")) > 0.15 * len(text):
        return "mostly digits"
    return None


def text_files(names):
    """The files that are named, and every file in the folders that are, hidden ones left out."""
    found = []
    for name in map(Path, names):
        if name.is_dir():
            for folder, folders, files in os.walk(name):
                folders[:] = sorted(f for f in folders if not f.startswith("."))
                paths = (Path(folder, f) for f in sorted(files) if not f.startswith("."))
                found += [(path, None) for path in paths if path.is_file()]
        elif not name.is_file():
            raise UserError(f"--text {name}: no such file or folder")
        elif read_text(name) is None:
            raise UserError(f"--text {name}: binary, or not UTF-8: convert it, for example with iconv -f latin1 -t utf-8")
        elif not read_text(name).strip():
            raise UserError(f"--text {name}: the file is empty")
        else:
            found.append((name, None))
    return found


def gutenberg_files(books, folder, host):
    """Download Project Gutenberg books by number. Their START and END lines tell a whole book from whatever else comes with status 200."""
    if not books:
        raise UserError("--source gutenberg needs --books N ..., the numbers of the books: 1342 is Pride and Prejudice")
    found = []
    for book in tqdm(books, desc="downloading", unit=" books", disable=None):
        url = f"{host or 'https://www.gutenberg.org'}/cache/epub/{book}/pg{book}.txt"
        path = download(url, folder / f"pg{book}.txt")
        if not strip_gutenberg(read_text(path) or ""):
            path.unlink()
            raise UserError(f"{url}: not the whole plain text of a Project Gutenberg book: look at it in a browser, or leave this book out")
        found.append((path, None))
    return found


def strip_gutenberg(text):
    """The book between Project Gutenberg's START and END lines, without its header and licence; "" where they are not."""
    line = r"\*\*\* ?{} OF TH(?:E|IS) PROJECT GUTENBERG EBOOK[^*]*\*\*\*"
    begin, end = (re.search(line.format(word), text, re.IGNORECASE) for word in ("START", "END"))
    return text[begin.end():end.start()].strip() + "\n" if begin and end else ""


def pg19_files(folder, host, max_mb):
    """Download PG-19 (Rae et al. 2019, arXiv 1911.05507) from its public bucket: the whole test split (100 books, 41 MB) for validation,
    and max_mb megabytes of the train split (28,602 books, 11 GB) in the order of the hashes of the books' names.
    """
    host = host or "https://storage.googleapis.com"
    jobs, taken = [], 0
    for split in ("test", "train"):
        listing = pg19_listing(folder, host, split)
        for name, size, md5 in sorted(listing, key=lambda item: hashlib.sha256(item[0].encode("utf-8")).digest()):
            if split == "train" and (taken := taken + size) > max_mb * 1e6:
                break
            jobs.append((f"{host}/deepmind-gutenberg/{name}", folder / name, md5, "val" if split == "test" else "train"))
    with ThreadPoolExecutor(4) as pool:
        files = [(pool.submit(download, url, path, md5), split) for url, path, md5, split in jobs]
        try:
            return [(file.result(), split) for file, split in tqdm(files, desc="downloading", unit=" books", disable=None)]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def pg19_listing(folder, host, split):
    """[(name, bytes, md5 in hex)] of a split, as the bucket's JSON listing has them, a page of 1,000 at a time."""
    found, page, path = [], {}, folder / "listing.json"
    while page is not None:
        query = urllib.parse.urlencode({"prefix": f"{split}/", "fields": "nextPageToken,items(name,size,md5Hash)", **page})
        url = f"{host}/storage/v1/b/deepmind-gutenberg/o?{query}"
        path.unlink(missing_ok=True)
        content = download(url, path).read_bytes()
        try:
            listing = json.loads(content)
            found += [(item["name"], int(item["size"]), base64.b64decode(item["md5Hash"]).hex()) for item in listing.get("items", [])]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{url}: not a listing of the PG-19 bucket: look at it in a browser (a log-in page?), "
                            "or name a --mirror") from None
        page = {"pageToken": listing["nextPageToken"]} if "nextPageToken" in listing else None
    return [item for item in found if re.fullmatch(rf"{split}/\d+\.txt", item[0])]


# ---------------------------------------------------------------------------------------------------------------------
# Downloads

ATTEMPTS, PAUSE, LONGEST_PAUSE, TIMEOUT = 6, 1.0, 30.0, 30.0  # failures in a row; seconds


def download(url, path, md5=None):
    """Fetch `url` to `path`, unless it is there; returns `path`.

    A connection that stalls or breaks is taken up again where it stopped, after a pause that doubles each time; ATTEMPTS failures in a row
    that bring nothing new are a UserError, and so is an answer like 404 at once. The length that the server announces and the md5 (hex),
    if known, must be right: a file has its name only when it is whole. Until then it is PATH.part; if the md5 is known, a later run goes
    on from there, else nothing tells whether the rest belongs to the same file.
    """
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, known, failures = path.with_name(path.name + ".part"), {"md5": md5}, 0
    with open(part, "ab+") as file:
        if md5 is None:
            file.truncate(0)
        best = os.path.getsize(part)
        while True:
            try:
                receive(url, file, known)
                break
            except (OSError, http.client.HTTPException) as error:  # timeouts, resets and what urllib raises are OSErrors
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise  # the disk's fault, not the network's
                file.flush()
                have = os.path.getsize(part)
                failures, best = (0, have) if have > best else (failures + 1, best)
                code = getattr(error, "code", 0)
                hopeless = 400 <= code < 500 and code not in (408, 416, 429)
                if hopeless or failures >= ATTEMPTS:
                    reason = f"HTTP {code} {error.reason}" if code else getattr(error, "reason", None) or error or type(error).__name__
                    raise UserError(f"{url}: {reason}: " + ("check the number or the address" if hopeless else
                                    "check the network and run the same command again, or name a --mirror")) from None
                time.sleep(min(PAUSE * 2 ** failures / 2, LONGEST_PAUSE))
        os.fsync(file.fileno())
    os.replace(part, path)
    return path


def receive(url, file, known):
    """One request for what `file` lacks, written to its end. known: "md5" of the whole, or None; "validator" of the answer before."""
    have = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"User-Agent": "python data/prepare.py"})
    if have and (known["md5"] or known.get("validator")):
        request.add_header("Range", f"bytes={have}-")
        if known.get("validator"):
            request.add_header("If-Range", known["validator"])  # "the rest, if it is still the same file, else all of it"
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            etag = answer.headers.get("ETag", "")
            known["validator"] = etag if etag.startswith('"') else answer.headers.get("Last-Modified")
            if have and not (answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")):
                file.truncate(0)  # the server sends it from the start
                have = 0
            length = answer.headers.get("Content-Length")
            received = 0
            while chunk := answer.read1(1 << 16):  # what has come so far: read() would lose it when the connection stalls
                received += file.write(chunk)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is no rest: what is here is not the beginning of that file
            file.truncate(0)
        raise
    if length is not None and received != int(length):
        raise ConnectionError(f"cut off after {have + received} of {have + int(length)} bytes")
    if known["md5"]:
        file.seek(0)
        if hashlib.md5(file.read(), usedforsecurity=False).hexdigest() != known["md5"]:
            file.truncate(0)
            raise ConnectionError("what arrived does not have the announced MD5 checksum")


# ---------------------------------------------------------------------------------------------------------------------
# Documents -> token folder

def read_text(path):
    """A UTF-8 file as text, with line ends "\\n" and no byte order mark; None if it is binary or not UTF-8."""
    if os.path.getsize(path) > LARGEST_MB * 1e6:
        raise UserError(f"{path}: {os.path.getsize(path) / 1e6:.0f} MB is too large for one document (at most {LARGEST_MB}): "
                        "split it into several files")
    data = Path(path).read_bytes()
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def choose(files, read, unwanted, max_mb):
    """Read every file once. Returns [(hash, split, path)] in the order of the hashes, and a Counter of what was left out and why.

    The hash is SHA-256 of the text with every run of white space as one space: copies that differ in line ends or indentation are one
    document. A document that is listed for a split and once more for another belongs to the first.
    """
    documents, left_out = {}, Counter()
    for path, split in tqdm(files, desc="reading", unit=" files", disable=None):
        text = read(path)
        reason = "binary or not UTF-8" if text is None else "empty" if not text.strip() else unwanted(text)
        key = None if reason else hashlib.sha256(" ".join(text.split()).encode("utf-8")).digest()
        if key in documents:
            reason = "duplicate"
        if reason:
            left_out[reason] += 1
        else:
            documents[key] = (split, path, len(text))
    chosen, taken = [], 0
    for key in sorted(documents):
        split, path, characters = documents[key]
        if split is None and max_mb is not None:
            if chosen and taken + characters > max_mb * 1e6:
                left_out["beyond --max-mb"] = len(documents) - len(chosen)
                break
            taken += characters
        chosen.append((key, split, path))
    return chosen, left_out


def split_documents(documents, val_fraction):
    """{"train": [paths], "val": [paths]}. The hash's last 8 bytes, read as a number in [0, 1), are below val_fraction for validation.

    (Its first bytes are the order.) If no document is chosen so, the one that comes closest is: there is something to measure on.
    """
    draw = {key: int.from_bytes(key[-8:], "big") / 2**64 for key, *_ in documents}
    if val_fraction > 0 and len(documents) > 1:
        val_fraction = max(val_fraction, np.nextafter(min(draw.values()), 1.0))
    splits = {"train": [], "val": []}
    for key, split, path in documents:
        splits[split or ("val" if draw[key] < val_fraction else "train")].append(path)
    return splits


def tokenizer_sample(paths, read, megabytes=8.0):
    """Texts to train a tokenizer on: documents, and after each some passkey prompts, whose words thereby become single tokens."""
    total = 0
    for i, path in enumerate(paths):
        text = read(path)
        yield text
        total += len(text)
        for j in range(len(text) // 8000 + 1):  # about 5 % of the sample
            key = (i * 7919 + j * 104729) % 90000 + 10000
            yield f"{INTRODUCTION}{GARBAGE}{INFORMATION}{QUESTION[1:]} {{key}}.\n".format(key=key)
        if total > megabytes * 1e6:
            return


def write_split(folder, split, paths, read, tokenizer):
    """Encode documents into SPLIT.bin and SPLIT.docs.npy; returns their counts for meta.json. Holds about GROUP characters at a time."""
    dtype = token_dtype(tokenizer)
    offsets, characters, group, waiting = [0], 0, [], 0
    with whole_file(folder / f"{split}.bin") as file, tqdm(paths, desc=f"encoding {split}", unit=" documents", disable=None) as bar:
        for i, path in enumerate(bar):
            group.append(read(path))
            waiting += len(group[-1])
            if waiting > GROUP or i + 1 == len(paths):
                for ids in tokenizer.encode_batch(group, bos=True, eos=True):
                    file.write(np.array(ids, dtype).tobytes())
                    offsets.append(offsets[-1] + len(ids))
                characters, group, waiting = characters + waiting, [], 0
    with whole_file(folder / f"{split}.docs.npy") as file:
        np.save(file, np.array(offsets, np.int64))
    return {"documents": len(paths), "tokens": offsets[-1], "characters": characters}


def token_dtype(tokenizer):
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def prepare(config):
    """Make the token folder that a PrepareConfig describes; returns its Path."""
    started = time.time()
    source = "text" if config.text else config.source
    out = Path(config.out or ROOT / "data" / "corpora" / source)
    check(config, out)
    max_mb = config.max_mb if config.max_mb is not None else {"python": PYTHON_MB, "pg19": PG19_MB}.get(source)
    host, downloads = config.mirror.rstrip("/"), out.parent / "downloads" / source
    read, unwanted = read_text, lambda text: None
    if source == "text":
        files = text_files(config.text)
    elif source == "gutenberg":
        files, read = gutenberg_files(config.books, downloads, host), lambda path: strip_gutenberg(read_text(path))
    elif source == "pg19":
        files = pg19_files(downloads, host, max_mb)
    else:
        files, unwanted = python_files(), python_unwanted
    documents, left_out = choose(files, read, unwanted, max_mb)
    if not documents:
        raise UserError(f"no text in {' '.join(config.text) or source} ({dict(left_out) or 'no files'}): name other files with --text")
    splits = split_documents(documents, config.val_fraction)

    path = Path(config.tokenizer or TOKENIZER)
    if config.train_tokenizer or not config.tokenizer and not path.exists():
        tokenizer = train_tokenizer(tokenizer_sample(splits["train"] or splits["val"], read), path, config.train_tokenizer or 1024)
    else:
        tokenizer = open_tokenizer(path)

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        counts = {split: write_split(temporary, split, splits[split], read, tokenizer) for split in splits}
        write_json(temporary / "meta.json", {
            "source": source, "settings": dataclasses.asdict(config), "max_mb": max_mb, "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "dtype": token_dtype(tokenizer),
            "splits": counts, "left_out": dict(left_out), "command": command_line(), "versions": versions(),
            "seconds": round(time.time() - started, 1)})
        replace_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for split, n in counts.items():
        print(f"{split}: {n['documents']:,} documents, {n['tokens']:,} tokens, "
              f"{n['characters'] / max(n['tokens'], 1):.2f} characters a token")
    print(f"left out: {', '.join(f'{n} {reason}' for reason, n in left_out.items()) or 'nothing'}")
    print(f"{out}: {time.time() - started:.1f} s")
    return out


def check(config, out):
    """Refuse what cannot work before anything long begins."""
    if not 0 <= config.val_fraction <= 1:
        raise UserError(f"--val-fraction {config.val_fraction}: a share between 0 and 1")
    if config.max_mb is not None and not config.max_mb > 0:
        raise UserError(f"--max-mb {config.max_mb}: a number above 0")
    if config.books and (config.source != "gutenberg" or config.text):
        raise UserError("--books goes with --source gutenberg, and without --text")
    if config.mirror and not config.mirror.startswith(("http://", "https://")):
        raise UserError(f"--mirror {config.mirror}: an address that begins with https:// or http://")
    if out.exists() and not (out / "meta.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: there is something else than a token folder: name another folder")
    if config.train_tokenizer and (not config.tokenizer or Path(config.tokenizer).exists()):
        raise UserError("--train-tokenizer needs a --tokenizer PATH that does not exist yet: models depend on one that does")
    if config.tokenizer and not config.train_tokenizer:
        open_tokenizer(config.tokenizer)


def replace_folder(temporary, out):
    """Put a finished folder in its place. The one before gives way to it at the last moment; whoever has its files open keeps them."""
    old = temporary.with_suffix(".old.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.rename(out, old)
    os.rename(temporary, out)
    shutil.rmtree(old, ignore_errors=True)


def corpus_for(folder, tokenizer):
    """Where the default corpus of this tokenizer lies: `folder`, or a neighbour named after the tokenizer if `folder` was made, from the
    default source too, with another one. So two models take turns without making their corpora anew."""
    folder, meta = Path(folder), Path(folder) / "meta.json"
    made = read_json(meta) if meta.exists() else {}
    if isinstance(made, dict) and made.get("source") == "python" and made.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        return folder.with_name(f"{folder.name}-{tokenizer.sha256[:8]}")
    return folder


def ensure_corpus(folder, tokenizer_path, max_mb=None):
    """The token folder `folder` (or its neighbour, corpus_for) as a Path: as it is if it is whole, made with this tokenizer and not smaller
    than max_mb (None: any size), else prepared from the default source. A folder that someone made from other text is never written over:
    it has to fit.
    """
    tokenizer = open_tokenizer(tokenizer_path)
    folder, sha256 = corpus_for(folder, tokenizer), tokenizer.sha256
    if (folder / "meta.json").exists():
        meta = read_json(folder / "meta.json")
        try:
            problem, python, width = None, meta["source"] == "python", np.dtype(meta["dtype"]).itemsize
            for split, n in meta["splits"].items():
                if os.path.getsize(folder / f"{split}.bin") != n["tokens"] * width or not (folder / f"{split}.docs.npy").exists():
                    problem = "a file is missing or cut off"
            if meta["tokenizer_sha256"] != sha256:
                problem = f"made with another tokenizer than {tokenizer_path}"
            elif python and None not in (max_mb, meta["max_mb"]) and meta["max_mb"] < max_mb and "beyond --max-mb" in meta["left_out"]:
                problem = "smaller than asked"
        except (OSError, KeyError, TypeError, AttributeError):
            problem, python = "not a whole token folder", False
        if not problem:
            return folder
        if not python:
            raise UserError(f"{folder}: {problem}: prepare it again: "
                            f"python data/prepare.py --out {folder} --tokenizer {tokenizer_path} ...")
    return prepare(PrepareConfig(tokenizer=str(tokenizer_path), out=str(folder), max_mb=max_mb))


def main():
    prepare(parse(PrepareConfig, __doc__))


if __name__ == "__main__":
    run(main)
