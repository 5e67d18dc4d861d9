"""Object stores by URL: one environment for the Arrow and Delta clients, and their errors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from lowprec.core.errors import ConfigError, StorageError

__all__ = ["bucket_of", "check_bucket", "delta_options", "filesystem_of", "is_of_the_store", "sentence"]

# An endpoint that refuses is told within seconds, one that never answers within about a minute.
_CONNECT_TIMEOUT_S = 5
_REQUEST_TIMEOUT_S = 10
_ATTEMPTS = 4
_DELTA_REQUEST_TIMEOUT_S = 30  # of a whole request, with its body
_DELTA_RETRY_S = 30
_GCS_RETRY_S = 60

# What both clients say, in words; the first pattern that is found decides.
_REASONS = (
    (r"NO_SUCH_BUCKET|NoSuchBucket|Bucket '.*' not found", 'there is no bucket "{bucket}" at {at}'),
    (r"latest/api/token|latest/meta-data|IMDS|loading credentials|[Nn]o credentials", "{credentials}"),
    (r"PutMode|If-None-Match|501 Not Implemented|NOT_IMPLEMENTED", "{conditional}"),
    (r"HTTP status 301|301 Moved|PermanentRedirect", "the bucket is in another region; set AWS_REGION"),
    (
        r"ACCESS_DENIED|AccessDenied|INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH"
        r"|SignatureDoesNotMatch|EXPIRED_TOKEN|ExpiredToken|HTTP status 40[13]|403 Forbidden|401 Unauthorized",
        "access is denied ({found}); {credentials}",
    ),
    (r"[Cc]onnection refused|[Cc]ould not connect", "{at} cannot be reached: nothing listens there; {endpoint}"),
    (r"[Cc]ould not resolve|dns error", "{at} cannot be reached: no such host is known; {endpoint}"),
    (r"[Tt]imeout was reached|timed out|REQUEST_TIMEOUT", "{at} cannot be reached: it does not answer; {endpoint}"),
    (
        r"TLS connect error.*wrong version number|corrupt message of type InvalidContentType",
        "{at} does not speak TLS; check whether {variable} begins with http:// or https://",
    ),
    (r"NETWORK_CONNECTION|error sending request", "{at} cannot be reached: {plain}; {endpoint}"),
    (r"URL scheme is not allowed", "{at} is plain http and AWS_ALLOW_HTTP says no; set AWS_ALLOW_HTTP=true"),
)
# What Arrow says of requests that came to nothing, for whatever other reason.
_OTHER_REASONS = r"AWS Error|curlCode|HTTP status"
_NO_CONDITIONAL_PUT = (
    "the store has no conditional put (If-None-Match: *), without which commits of two processes would overwrite each "
    "other; keep results in another store or in a folder"
)


@dataclass(frozen=True)
class _S3Settings:
    """What the environment says of S3. None: the clients find it out by themselves."""

    endpoint: str | None
    region: str | None
    has_keys: bool

    @classmethod
    def of_environment(cls) -> _S3Settings:
        keys = [bool(os.environ.get(name)) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
        if any(keys) and not all(keys):
            raise ConfigError("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: one is set without the other; set both")
        endpoint = _endpoint()
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ConfigError(f'AWS_ENDPOINT_URL "{endpoint}": must begin with http:// or https://')
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None
        # Stores other than Amazon's have no regions, but requests are signed with one.
        return cls(endpoint, region or ("us-east-1" if endpoint else None), all(keys))


def filesystem_of(url: str) -> tuple[pafs.FileSystem, str]:
    """Arrow's file system for a URL, and the path inside it; raises `OSError` and `pa.ArrowException` as Arrow does.

    Region, endpoint and credentials of `s3://` come from the usual AWS variables, as `delta_options` passes them on.
    """
    scheme, _, rest = url.partition("://")
    inner = unquote(rest).rstrip("/")
    # Options in the URL itself are Arrow's own way to say these things.
    if scheme == "s3" and "?" not in rest and "@" not in bucket_of(url):
        settings = _S3Settings.of_environment()
        return _s3(settings.endpoint, settings.region or _region_of(bucket_of(url))), inner
    if scheme in ("gs", "gcs") and "?" not in rest and "@" not in bucket_of(url):
        return pafs.GcsFileSystem(retry_time_limit=timedelta(seconds=_GCS_RETRY_S)), inner
    filesystem, inner = pafs.FileSystem.from_uri(url)
    return filesystem, inner.rstrip("/") or "/"


def delta_options(url: str) -> dict[str, str]:
    """The options with which Delta's client reaches what `filesystem_of` reaches."""
    options = {
        "connect_timeout": f"{_CONNECT_TIMEOUT_S}s",
        "timeout": f"{_DELTA_REQUEST_TIMEOUT_S}s",
        "max_retries": str(_ATTEMPTS),
        "retry_timeout": f"{_DELTA_RETRY_S}s",
    }
    if not url.startswith("s3://"):
        return options
    settings = _S3Settings.of_environment()
    region = settings.region or _region_of(bucket_of(url))
    if region is not None:
        options["AWS_REGION"] = region
    if settings.endpoint is not None:
        options["AWS_ENDPOINT_URL"] = settings.endpoint
        # Delta's client refuses plain http until it is told a second time.
        if settings.endpoint.startswith("http://") and "AWS_ALLOW_HTTP" not in os.environ:
            options["AWS_ALLOW_HTTP"] = "true"
    if not settings.has_keys:
        # Else it looks for profiles and roles only where the endpoint is Amazon's.
        options["AWS_FORCE_CREDENTIAL_LOAD"] = "true"
    return options


def bucket_of(url: str) -> str:
    """The bucket (or container) of a URL."""
    return url.partition("://")[2].partition("/")[0]


def check_bucket(url: str) -> None:
    """Raise `StorageError` where what is missing is the whole bucket; Arrow says the same of a missing file."""
    if not url.startswith("s3://"):
        return
    filesystem, inner = filesystem_of(url)
    bucket = inner.partition("/")[0]
    if filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
        raise StorageError(f'there is no bucket "{bucket}" at {_endpoint() or "Amazon S3"}')


# The stack frames of a Rust library, and its structures as a debugger prints them, at the end of a message.
_RUST = re.compile(r"(?: stack backtrace:)? 0: .* 1: .*$|: [A-Z]\w+ \{ .*$")


def sentence(error: BaseException, where: str) -> str:
    """What a client said of a URL (or Arrow of a path), as one clause for the end of a message."""
    text = _plain(error)[:400] or type(error).__name__
    if "://" not in where:
        return text
    endpoint = _endpoint() if where.startswith("s3:") else None
    words: Mapping[str, str] = {
        "bucket": bucket_of(where),
        "at": endpoint or "the object store",
        "variable": "AWS_ENDPOINT_URL" if endpoint else "the endpoint",
        "endpoint": f"check {'AWS_ENDPOINT_URL' if endpoint else 'the URL'} and the network",
        "credentials": _credentials_hint(where),
        "conditional": _NO_CONDITIONAL_PUT,
        "plain": text,
    }
    for pattern, reason in _REASONS:
        if found := re.search(pattern, text):
            return reason.format(found=found[0], **words)
    return text


def is_of_the_store(error: BaseException, where: str) -> bool:
    """Whether what a client said of a URL is about the store or the way there, and not about what it holds."""
    patterns = (*(pattern for pattern, _ in _REASONS), _OTHER_REASONS)
    return "://" in where and any(re.search(pattern, _plain(error)) for pattern in patterns)


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _plain(error: BaseException) -> str:
    """One line, without Arrow's details, the colours and arrows that Delta draws between causes, and stack frames."""
    lines = re.sub("\x1b\\[[0-9;]*m", "", str(error)).replace("↳", ":").splitlines()
    text = re.sub(r"\s+:", ":", " ".join(" ".join(lines).split())).partition(". Detail:")[0]
    return _RUST.sub("", text).removesuffix(".")


def _credentials_hint(url: str) -> str:
    if not url.startswith("s3:"):
        return "check the credentials in the environment"
    known = [name for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN") if os.environ.get(name)]
    if known:
        return f"check {known[0]}"
    return "no credentials are set: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"


@lru_cache(maxsize=16)
def _s3(endpoint: str | None, region: str | None) -> pafs.FileSystem:
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_REQUEST_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    )


@lru_cache(maxsize=64)
def _region_of(bucket: str) -> str | None:
    """Where Amazon keeps a bucket; None where it does not say, and whatever is wrong shows when it is used."""
    try:
        return str(pafs.resolve_s3_region(bucket))
    except (OSError, pa.ArrowException):
        return None
