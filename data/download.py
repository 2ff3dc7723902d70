"""Files from the network: whole or not there, whatever the connection does."""
import dataclasses
import errno
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from common.errors import UserError

ATTEMPTS = 6  # failures in a row
FIRST_PAUSE, LONGEST_PAUSE, TIMEOUT = 1.0, 30.0, 30.0  # seconds


def download(url: str, path: str | Path, md5: str | None = None) -> Path:
    """Fetch `url` to `path`, unless that is there; returns `path`. md5: in hex, if known.

    Until the file is whole it is PATH.part. With an md5 a later run goes on from there; else
    nothing tells whether the part belongs to the same file.
    """
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "ab+") as file:
        if md5 is None:
            file.truncate(0)
        Transfer(url, file, md5).run()
        os.fsync(file.fileno())
    os.replace(part, path)
    return path


@dataclasses.dataclass
class Transfer:
    """`url` on its way into the open `file`."""
    url: str
    file: IO[bytes]
    md5: str | None
    validator: str | None = None  # the server's name for this version of the file

    def run(self) -> None:
        """Request what the file lacks until it is whole, after pauses that double.

        A UserError after ATTEMPTS failures in a row that brought nothing new, or at once if the
        server refuses the address.
        """
        failures = 0
        most = self.size()
        while True:
            try:
                return self.receive()
            # urllib's errors are OSErrors; what cannot be an address is a ValueError, too
            except (OSError, ValueError, http.client.HTTPException) as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise  # the disk's fault, not the network's
                failures = 0 if self.size() > most else failures + 1
                most = max(most, self.size())
                self.give_up_if_hopeless(error, failures)
                time.sleep(min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE))

    def size(self) -> int:
        """Bytes received so far."""
        return self.file.seek(0, os.SEEK_END)

    def give_up_if_hopeless(self, error: Exception, failures: int) -> None:
        """A UserError where another request would not help."""
        code = getattr(error, "code", 0)
        reason = getattr(error, "reason", None) or error or type(error).__name__
        message = f"{self.url}: {f'HTTP {code} ' if code else ''}{reason}"
        # 4xx: the request is wrong, unless it is a timeout, a range, or one of too many.
        refused = 400 <= code < 500 and code not in (408, 416, 429)
        if isinstance(error, urllib.error.URLError) and not code:
            refused = isinstance(error.reason, str)     # the network's reasons are exceptions
        if refused or isinstance(error, (ValueError, http.client.InvalidURL)):
            raise UserError(f"{message}: check the number or the address") from None
        if failures >= ATTEMPTS:
            raise UserError(f"{message}: check the network and run the same command again, "
                            "or name a --mirror") from None

    def receive(self) -> None:
        """One request for the rest of the file. If its length or md5 is not the announced one
        after that, it is a ConnectionError."""
        have = self.size()
        request = urllib.request.Request(self.url, headers={"User-Agent": "python data/prepare.py"})
        if have and (self.md5 or self.validator):
            request.add_header("Range", f"bytes={have}-")
            if self.validator:  # the rest if it is still the same version, else all of it
                request.add_header("If-Range", self.validator)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                headers = answer.headers
                etag = headers.get("ETag", "")
                self.validator = etag if etag.startswith('"') else headers.get("Last-Modified")
                is_rest = headers.get("Content-Range", "").startswith(f"bytes {have}-")
                if answer.status != 206 or not is_rest:
                    self.file.truncate(0)  # the server sends it from the start
                    have = 0
                length = headers.get("Content-Length")
                received = 0
                # read1 returns what has come; read would lose it when the connection stalls.
                while chunk := answer.read1(1 << 16):
                    received += self.file.write(chunk)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # there is no rest: the part is of another file
                self.file.truncate(0)
            raise
        if length is not None and received != int(length):
            raise ConnectionError(f"cut off after {have + received} of {have + int(length)} bytes")
        if self.md5:
            self.file.seek(0)
            if hashlib.md5(self.file.read(), usedforsecurity=False).hexdigest() != self.md5:
                self.file.truncate(0)
                raise ConnectionError("what arrived does not have the announced MD5 checksum")
