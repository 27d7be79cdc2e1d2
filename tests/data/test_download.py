import hashlib
import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanodiff.data.download import fetch, unpack
from nanodiff.errors import UserError

CONTENT = bytes(range(256)) * 20000  # 5 MB
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server():
    """A file server on this machine that knows ranges and can break off in the middle."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            byte_range = self.headers.get("Range", "bytes=0-")
            self.server.ranges.append(byte_range)
            start = int(byte_range.removeprefix("bytes=").rstrip("-")) if self.server.knows_ranges else 0
            if start >= len(CONTENT):
                return self.send_error(416)
            self.send_response(206 if self.server.knows_ranges else 200)
            if self.server.knows_ranges:
                self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            self.wfile.write(CONTENT[start:start + self.server.at_most])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.ranges, server.knows_ranges, server.at_most = [], True, len(CONTENT)
    server.url = f"http://127.0.0.1:{server.server_port}/file.tar.gz"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_arrives_whole_and_is_not_repeated(server, tmp_path):
    path = fetch(server.url, tmp_path / "new" / "file", MD5)
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ["file"]
    fetch(server.url, path, MD5)
    assert len(server.ranges) == 1


def test_a_broken_connection_is_resumed_where_it_stopped(server, tmp_path):
    server.at_most = 3_000_000
    with pytest.raises(UserError, match="stopped after 3000000 bytes.*run the same command again"):
        fetch(server.url, tmp_path / "file", MD5)
    assert not (tmp_path / "file").exists() and (tmp_path / "file.part").stat().st_size == 3_000_000
    assert fetch(server.url, tmp_path / "file", MD5).read_bytes() == CONTENT
    assert server.ranges == ["bytes=0-", "bytes=3000000-"]


def test_a_server_without_ranges_starts_again_from_the_beginning(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    server.knows_ranges = False
    assert fetch(server.url, tmp_path / "file", MD5).read_bytes() == CONTENT


def test_a_part_that_is_already_complete_is_recognised(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert fetch(server.url, tmp_path / "file", MD5).read_bytes() == CONTENT


def test_wrong_bytes_are_never_given_the_final_name(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match=f"MD5 .* where {MD5} is expected"):
        fetch(server.url, tmp_path / "file", MD5)
    assert not list(tmp_path.iterdir())
    assert fetch(server.url, tmp_path / "file", MD5).read_bytes() == CONTENT
    (tmp_path / "own").write_bytes(b"somebody's own file")
    with pytest.raises(UserError, match="move it away"):
        fetch(server.url, tmp_path / "own", MD5)
    assert (tmp_path / "own").read_bytes() == b"somebody's own file"


def test_no_server_is_one_sentence_and_no_file(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="stopped after 0 bytes"):
        fetch(server.url, tmp_path / "file", MD5, timeout=5)
    assert not (tmp_path / "file").exists()


def archive(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_an_archive_is_unpacked_whole_or_not_at_all(tmp_path):
    good = archive(tmp_path / "a.tar.gz", {"set/a": b"1", "set/b": b"2"})
    unpack(good, tmp_path, "set")
    assert (tmp_path / "set/a").read_bytes() == b"1"
    with pytest.raises(UserError, match="set is in the way"):
        unpack(good, tmp_path, "set")
    with pytest.raises(UserError, match="no folder 'other'"):
        unpack(good, tmp_path, "other")
    evil = archive(tmp_path / "evil.tar.gz", {"other/a": b"1", "../escaped": b"2"})
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(evil, tmp_path, "other")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(good.read_bytes()[:60])
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(cut, tmp_path, "other")
    assert not (tmp_path.parent / "escaped").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz", "cut.tar.gz", "evil.tar.gz", "set"]
