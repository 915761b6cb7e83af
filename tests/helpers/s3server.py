"""An object store on loopback with the part of S3 that a run needs. It can cut its answers short."""

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from saltern.pipeline.storage import filesystem

BUCKET = "bucket"
_WRITTEN = datetime(2015, 10, 21, 7, 28, tzinfo=UTC)
_DATED = {"Last-Modified": format_datetime(_WRITTEN, usegmt=True), "ETag": '"tag"'}


class S3(ThreadingHTTPServer):
    """One bucket."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []  # as "GET key" or "LIST prefix"
        self.parts: dict[str, dict[int, bytes]] = {}  # by unfinished upload
        self.cut = False  # whether to close the connection in the middle of each object
        self.stalled: threading.Event | None = None  # if set, the middle of each object waits for it
        self.written: dict[str, datetime] = {}  # time of an object's last change; not of those put into `objects`
        self.before: Callable[[str], None] = lambda request: None  # called before each answer about an object

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that was killed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, code: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.stalled is not None:
            self.wfile.write(body[: len(body) // 2])
            self.server.stalled.wait()
            self.close_connection = True
            return
        self.wfile.write(body)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if bucket != BUCKET:
            self._answer(404, b"<Error><Code>NoSuchBucket</Code></Error>", {})
        elif not key and self.command == "GET":
            self._list(query.get("prefix", ""), query.get("delimiter"))
        elif not key:
            self._answer(200, b"", {"x-amz-bucket-region": "us-east-1"})
        else:
            self._object(key)

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        key, query = self._target()
        body = self._body()
        source = unquote(self.headers.get("x-amz-copy-source") or "").lstrip("/").removeprefix(f"{BUCKET}/")
        if "uploadId" in query:
            self.server.parts[query["uploadId"]][int(query["partNumber"])] = body
        else:
            self._store(key, self.server.objects[source] if source else body)
        self.server.requests.append(f"PUT {key}")
        self.server.before(f"PUT {key}")
        self._answer(200, b"<CopyObjectResult><ETag>tag</ETag></CopyObjectResult>" if source else b"", _DATED)

    def _store(self, key: str, body: bytes) -> None:
        self.server.objects[key], self.server.written[key] = body, datetime.now(UTC).replace(microsecond=0)

    def do_POST(self) -> None:
        """Begin or complete a multipart upload, or delete several objects."""
        key, query = self._target()
        body = self._body()
        answer = ""
        if "delete" in query:
            for name in re.findall(rb"<Key>(.*?)</Key>", body):
                self.server.objects.pop(name.decode(), None)
            answer = "<DeleteResult></DeleteResult>"
        elif "uploads" in query:
            self.server.parts[key] = {}
            names = f"<Bucket>{BUCKET}</Bucket><Key>{key}</Key><UploadId>{key}</UploadId>"
            answer = f"<InitiateMultipartUploadResult>{names}</InitiateMultipartUploadResult>"
        else:
            parts = self.server.parts.pop(query["uploadId"])
            self._store(key, b"".join(parts[number] for number in sorted(parts)))
            done = f"<Bucket>{BUCKET}</Bucket><Key>{key}</Key><ETag>tag</ETag>"
            answer = f"<CompleteMultipartUploadResult>{done}</CompleteMultipartUploadResult>"
        self.server.before(f"POST {key}")
        self._answer(200, answer.encode(), {})

    def do_DELETE(self) -> None:
        key, _ = self._target()
        self.server.objects.pop(key, None)
        self.server.before(f"DELETE {key}")
        self._answer(204, b"", {})

    def _target(self) -> tuple[str, dict[str, str]]:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        return unquote(url.path).lstrip("/").partition("/")[2], query

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            raw = b""
            while length := int(self.rfile.readline().split(b";")[0], 16):
                raw += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        else:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" not in (self.headers.get("Content-Encoding") or ""):
            return raw
        body = b""
        while raw:
            size, _, raw = raw.partition(b"\r\n")
            length = int(size.split(b";")[0], 16)
            if length == 0:
                break
            body, raw = body + raw[:length], raw[length + 2 :]
        return body

    def _list(self, prefix: str, delimiter: str | None) -> None:
        self.server.requests.append(f"LIST {prefix}")
        keys = [key for key in sorted(self.server.objects) if key.startswith(prefix)]
        folders: set[str] = set()
        if delimiter:
            below = [key for key in keys if delimiter in key[len(prefix) :]]
            folders = {prefix + key[len(prefix) :].partition(delimiter)[0] + delimiter for key in below}
            keys = [key for key in keys if key not in below]
        body = "".join(
            f"<Contents><Key>{key}</Key>"
            f"<LastModified>{self.server.written.get(key, _WRITTEN):%FT%T.000Z}</LastModified>"
            f"<ETag>tag</ETag><Size>{len(self.server.objects[key])}</Size></Contents>"
            for key in keys
        )
        body += "".join(f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>" for folder in sorted(folders))
        body = f"<Name>{BUCKET}</Name><KeyCount>{len(keys)}</KeyCount><IsTruncated>false</IsTruncated>{body}"
        self._answer(200, f'<?xml version="1.0"?><ListBucketResult>{body}</ListBucketResult>'.encode(), {})

    def _object(self, key: str) -> None:
        self.server.requests.append(f"{self.command} {key}")
        self.server.before(self.server.requests[-1])
        whole = self.server.objects.get(key)
        if whole is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>", {})
            return
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        first, last = (int(wanted[1]), min(int(wanted[2]), len(whole) - 1)) if wanted else (0, len(whole) - 1)
        body = whole[first : last + 1]
        ranged = {"Content-Range": f"bytes {first}-{last}/{len(whole)}"} if wanted else {}
        given = body[: len(body) // 2] if self.server.cut else body
        dated = {**_DATED, "Last-Modified": format_datetime(self.server.written.get(key, _WRITTEN), usegmt=True)}
        self._answer(206 if wanted else 200, given, {**dated, **ranged}, len(body))
        self.close_connection = self.server.cut


def client_of(server: S3) -> dict[str, str]:
    """Return the environment in which clients use this store."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def used_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """Serve a store that the clients of this process use until the block ends."""
    with s3_server() as server:
        for name, value in client_of(server).items():
            monkeypatch.setenv(name, value)
        filesystem._bucket.cache_clear()
        yield server
        filesystem._bucket.cache_clear()


@contextmanager
def s3_server() -> Iterator[S3]:
    """Serve a store until the block ends."""
    with S3() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
