"""Where documents come from. Each source lists its files as (path, split); the split is None where
the hash of the content decides."""
import base64
import codecs
import hashlib
import json
import os
import re
import sysconfig
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from common.files import is_stream
from data.download import download

Files = list[tuple[str | Path, str | None]]

LARGEST_MB = 64  # a document is read and encoded whole, which takes about 25 times its size
# Tests and tables are monotonous; vendored copies are near-duplicates.
PYTHON_SKIPPED = {"__pycache__", "test", "tests", "testing", "_vendor", "_vendored", "encodings",
                  "lib2to3", "idlelib", "site-packages", "dist-packages"}
GENERATED = re.compile(r"auto-?(matically )?-?generated|generated (by|from|using|with|file|code)|"
                       r"@generated|do not (edit|modify|change)", re.IGNORECASE)


def unwanted(text: str | None) -> str | None:
    """Why a text is no document; None if it is one."""
    if text is None:
        return "binary or not UTF-8"
    return None if text.strip() else "empty"


def read_text(path: str | Path, size: int | None = None) -> str | None:
    """A UTF-8 file as text, with line ends "\\n" and no byte order mark; None if it is binary.
    size: read only its first bytes, so many; a character that they cut is dropped."""
    length = os.path.getsize(path)
    taken = min(length, size or length)
    megabytes = taken / 1e6
    if megabytes > LARGEST_MB:
        raise UserError(f"{path}: {megabytes:.0f} MB is too large for one document (at most "
                        f"{LARGEST_MB}): split it into several files")
    with open(path, "rb") as file:
        data = file.read(taken)     # some of /proc have no bytes, and no end
    if b"\0" in data:
        return None
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        text = decoder.decode(data, final=len(data) == length)  # else it may end in a character
    except UnicodeDecodeError:
        return None
    return text.replace("\r\n", "\n")


def text_files(names: list[str]) -> Files:
    """The named files, and all files in the named folders except hidden ones."""
    found = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found += files_in(path)
            continue
        if not path.is_file():
            raise UserError(f"--text {name}: no such file or folder")
        text = read_text(path)
        if text is None:
            raise UserError(f"--text {name}: binary, or not UTF-8: convert it, for example with "
                            "iconv -f latin1 -t utf-8")
        if not text.strip():
            raise UserError(f"--text {name}: the file is empty")
        found.append(path)
    return [(path, None) for path in found]


def files_in(root: Path) -> list[Path]:
    """All files in a folder and its subfolders, except hidden ones."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        found += [path for path in paths if path.is_file() and not is_stream(path)]
    return found


def python_files() -> Files:
    """The Python source of this interpreter: its standard library and the installed packages."""
    paths = sysconfig.get_paths()
    roots = [os.path.realpath(paths[k]) for k in ("stdlib", "platstdlib", "purelib", "platlib")]
    found = {}  # as an ordered set: site-packages may lie inside the standard library
    for root in dict.fromkeys(roots):
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(set(folders) - PYTHON_SKIPPED)
            for file in sorted(files):
                if file.endswith(".py"):
                    found[os.path.join(folder, file)] = None
    return list(found.items())


def python_unwanted(text: str | None) -> str | None:
    """Why a Python file is not something that a person wrote to be read; None if it is."""
    if unwanted(text):
        return unwanted(text)
    lines = text.split("\n")
    if len(text) < 500:
        return "shorter than 500 characters"
    if GENERATED.search(text, 0, 1000):
        return "generated"
    if len(text) > 100 * len(lines) or max(len(line) for line in lines) > 1000:
        return "huge lines"
    if sum(text.count(digit) for digit in "0123456789") > 0.15 * len(text):
        return "mostly digits"
    return None


def gutenberg_files(books: list[int], folder: Path, host: str) -> Files:
    """Download Project Gutenberg books by number."""
    if not books:
        raise UserError("--source gutenberg needs --books N ..., the numbers of the books: "
                        "1342 is Pride and Prejudice")
    found = []
    for book in tqdm(books, desc="downloading", unit=" books", disable=None):
        url = f"{host or 'https://www.gutenberg.org'}/cache/epub/{book}/pg{book}.txt"
        path = download(url, folder / f"pg{book}.txt")
        if not read_gutenberg(path):  # a log-in page, or half a book, may come with status 200 too
            path.unlink()
            raise UserError(f"{url}: not the whole plain text of a Project Gutenberg book: look at "
                            "it in a browser, or leave this book out")
        found.append((path, None))
    return found


def read_gutenberg(path: str | Path) -> str:
    """The text of a downloaded book, without Project Gutenberg's header and licence."""
    return strip_gutenberg(read_text(path) or "")


def strip_gutenberg(text: str) -> str:
    """The text between Project Gutenberg's START and END lines; "" where they are not."""
    line = r"\*\*\* ?{} OF TH(?:E|IS) PROJECT GUTENBERG EBOOK[^*]*\*\*\*"
    start = re.search(line.format("START"), text, re.IGNORECASE)
    end = re.search(line.format("END"), text, re.IGNORECASE)
    return text[start.end():end.start()].strip() + "\n" if start and end else ""


def pg19_files(folder: Path, host: str, max_mb: float) -> Files:
    """Download PG-19 (Rae et al. 2019, arXiv 1911.05507) from its public bucket.

    Validation is the whole test split (100 books, 41 MB); training is max_mb megabytes of the train
    split (28,602 books, 11 GB), in the order of the hashes of the books' names.
    """
    host = host or "https://storage.googleapis.com"
    books = pg19_listing(folder, host, "test")
    splits = ["val"] * len(books)
    taken = 0
    for book in pg19_listing(folder, host, "train"):
        taken += book[1]
        if taken > max_mb * 1e6:
            break
        books.append(book)
        splits.append("train")
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(download, f"{host}/deepmind-gutenberg/{name}", folder / name, md5)
                for name, _, md5 in books]
        try:
            bar = tqdm(jobs, desc="downloading", unit=" books", disable=None)
            return [(job.result(), split) for job, split in zip(bar, splits)]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def pg19_listing(folder: Path, host: str, split: str) -> list[tuple[str, int, str]]:
    """(name, bytes, md5 in hex) of each book of a split, in the order of the names' hashes. The
    bucket lists its files as JSON, in pages of 1,000."""
    query = {"prefix": f"{split}/", "fields": "nextPageToken,items(name,size,md5Hash)"}
    path = folder / "listing.json"
    found = []
    more = True
    while more:
        url = f"{host}/storage/v1/b/deepmind-gutenberg/o?{urllib.parse.urlencode(query)}"
        path.unlink(missing_ok=True)
        content = download(url, path).read_bytes()
        try:
            listing = json.loads(content)
            for item in listing.get("items", []):
                md5 = base64.b64decode(item["md5Hash"]).hex()
                if re.fullmatch(rf"{split}/\d+\.txt", item["name"]):
                    found.append((item["name"], int(item["size"]), md5))
            more = "nextPageToken" in listing
            query["pageToken"] = listing.get("nextPageToken")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{url}: not a listing of the PG-19 bucket: look at it in a browser "
                            "(a log-in page?), or name a --mirror") from None
    return sorted(found, key=lambda book: hashlib.sha256(book[0].encode("utf-8")).digest())
