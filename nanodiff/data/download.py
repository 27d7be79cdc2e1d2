"""Fetch an archive that may take several tries, and unpack it so that it is there whole or not at all."""

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
    """Download url to path and return path; a file that is already there is checked and kept.

    What has come so far lies in `path`.part, and the next call goes on from there. UserError when the connection fails
    or the bytes are not those of the checksum.
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
        got = part.stat().st_size if part.is_file() else 0
        raise UserError(f"downloading {url} stopped after {got} bytes ({error}): run the same command again to go on,"
                        f" or put the file at {path} by hand") from None
    found = _md5(part)
    if found != md5:
        part.unlink()
        raise UserError(f"{url} gave a file with MD5 {found} where {md5} is expected: it was thrown away, try again")
    os.replace(part, path)
    return path


def _receive(url, part, timeout):
    """Append to `part` what it still lacks."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "User-Agent": "nanodiff"})
    try:
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            return  # nothing beyond what we have: the checksum tells whether that is all
        raise
    with answer, open(part, "ab") as file:
        if not (answer.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            file.truncate(0)  # the server starts from the beginning
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        while block := answer.read(1 << 20):
            file.write(block)
            have += len(block)
            if sys.stderr.isatty():
                print(f"\r{url}: {have >> 20} of {total >> 20 if total else '?'} MiB", end="", file=sys.stderr)
        if sys.stderr.isatty():
            print(file=sys.stderr)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and have < total:
        raise OSError(f"the connection ended before byte {total}")


def _md5(path):
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive, folder, name):
    """Put the folder `name` of a tar archive below `folder`, whole or not at all.

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
            raise UserError(f"{Path(folder) / name} is in the way of what {archive} holds: move it away") from None
