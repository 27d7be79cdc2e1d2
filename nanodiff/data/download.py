"""Download an archive, resuming after interruptions, and unpack it atomically."""

import hashlib
import os
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from nanodiff.errors import UserError


def fetch(url, path, md5, timeout=60):
    """The path of the downloaded file. An existing file is checked and not downloaded again.

    An unfinished download lies in `path`.part; the next call resumes it. UserError when the connection fails or the
    checksum does not match.
    """
    path, part = Path(path), Path(f"{path}.part")
    if path.is_file():
        if _md5(path) != md5:
            raise UserError(f"{path} is not the file of {url}, its MD5 is not {md5}: move it away and try again")
        return path
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        _receive(url, part, timeout)
    except (OSError, HTTPException) as error:  # urllib's errors are OSErrors
        size = part.stat().st_size if part.is_file() else 0
        raise UserError(f"downloading {url} stopped after {size} bytes ({error}): run the same command again to resume,"
                        f" or put the file at {path} by hand") from None
    digest = _md5(part)
    if digest != md5:
        part.unlink()
        raise UserError(f"{url} gave a file with MD5 {digest} where {md5} is expected: it was deleted, try again")
    os.replace(part, path)
    return path


def _receive(url, part, timeout):
    """Appends the missing bytes of url to `part`."""
    received = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={received}-", "User-Agent": "nanodiff"})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and received:
            return  # the part is complete; the checksum confirms it
        raise
    with response, open(part, "ab") as file:
        if not (response.headers.get("Content-Range") or "").startswith(f"bytes {received}-"):
            file.truncate(0)  # the server ignores ranges and starts from the beginning
            received = 0
        length = response.headers.get("Content-Length")
        total = received + int(length) if length else None
        while block := response.read(1 << 20):
            file.write(block)
            received += len(block)
            if sys.stderr.isatty():
                print(f"\r{url}: {received >> 20} of {total >> 20 if total else '?'} MiB", end="", file=sys.stderr)
        if sys.stderr.isatty():
            print(file=sys.stderr)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and received < total:
        raise OSError(f"the connection ended before byte {total}")


def _md5(path):
    """The MD5 of a file as hex digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive, folder, name):
    """Unpacks the folder `name` of a tar archive into `folder`, atomically.

    UserError when the archive is damaged, lacks the folder, or has members that point outside.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as temporary:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UserError(f"{archive} cannot be unpacked: {error}") from None
        if not (Path(temporary) / name).is_dir():
            raise UserError(f"{archive} holds no folder '{name}'")
        try:
            os.replace(Path(temporary) / name, Path(folder) / name)
        except OSError:
            raise UserError(f"{Path(folder) / name} is in the way of the folder in {archive}: move it away") from None
