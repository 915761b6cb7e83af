"""Local paths and s3:// or gs:// URLs as pyarrow filesystems."""

import re
from functools import lru_cache

import pyarrow as pa
from pyarrow import fs

from saltern.schemas.errors import UserError

_URL = re.compile(r"(\w[\w+.-]*)://|pipe:")

CONNECT_S = 10.0
STALLED_S = 20.0  # without a byte
REQUESTS = 5  # attempts at one request to S3


def filesystem(url: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of a local path or an s3:// or gs:// URL, and the path in it.

    Raises:
        UserError: the URL is none of these, or the bucket is not accessible.
        OSError: the network fails.
    """
    check_url(url)
    if _URL.match(url) is None:
        return fs.LocalFileSystem(), url
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    return _bucket(scheme, host), f"{host.removeprefix('anonymous@')}/{path}".rstrip("/")


def check_url(url: str) -> None:
    """Check that a URL names a bucket and holds no credentials. Local paths pass.

    Raises:
        UserError: it does not. The message repeats no credentials.
    """
    match = _URL.match(url)
    if match is None:
        return
    scheme, host = match[1], url[match.end() :].partition("/")[0].removeprefix("anonymous@")
    if ":" in host or "@" in host or (scheme in ("s3", "gs") and not host):
        raise UserError(
            "write s3://BUCKET/PATH or a local path; credentials come from the environment, not from the URL"
        )
    if scheme not in ("s3", "gs"):
        raise UserError(
            f"{url.partition('?')[0]}: give a local path, an s3:// or a gs:// URL; anything else must be downloaded or "
            "mounted"
        )


@lru_cache(maxsize=64)
def _bucket(scheme: str, bucket: str) -> fs.FileSystem:
    try:
        made = fs.FileSystem.from_uri(f"{scheme}://{bucket}")[0]
        return _configured(made) if scheme == "s3" else made
    except pa.ArrowInvalid as error:
        raise UserError(f"{scheme}://{bucket} is not a bucket: {error}") from error
    except OSError as error:
        if re.search("ACCESS_DENIED|not found", str(error)):
            raise UserError(f"{scheme}://{bucket}: {error}") from error
        raise


def _configured(made: fs.S3FileSystem) -> fs.S3FileSystem:
    """Bound the attempts at a request, and write small files by one request.

    Without a bound, a body that stalls is requested again for minutes. By default, each file takes three requests.
    """
    _, (options,) = made.__reduce__()
    own = {"connect_timeout": CONNECT_S, "request_timeout": STALLED_S, "allow_delayed_open": True}
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=REQUESTS)
    return fs.S3FileSystem(**{**options, **own, "retry_strategy": retries})
