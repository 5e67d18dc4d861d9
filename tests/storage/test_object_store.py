"""Both clients reach the same store by the same variables, and what goes wrong is one clear sentence, soon."""

import socket
import subprocess
import sys

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from lowprec.core.errors import ConfigError, StorageError
from lowprec.storage import Location, object_store
from lowprec.storage.object_store import delta_options, filesystem_of, sentence


def arrow_reads(url):
    return Location.of(f"{url}/file").read_bytes()


def delta_reads(url):
    try:
        return DeltaTable(f"{url}/table", storage_options=delta_options(url)).version()
    except OSError as error:
        raise StorageError(sentence(error, url)) from None


both_clients = pytest.mark.parametrize("reads", [arrow_reads, delta_reads])


@pytest.fixture
def filled(bucket):
    with Location.of(f"{bucket}/file").whole_file() as partial:
        partial.write_bytes(b"hello")
    write_deltalake(f"{bucket}/table", pa.table({"a": [1]}), storage_options=delta_options(bucket))
    return bucket


def why(reads, url):
    with pytest.raises(StorageError) as raised:
        reads(url)
    said = str(raised.value)
    assert "\n" not in said and "\x1b" not in said and len(said) < 300
    return said


@both_clients
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_endpoint_is_that_of_the_environment(reads, name, filled, s3, monkeypatch):
    """The one for S3 goes before the one for everything, as in Amazon's own tools."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv(name, s3.endpoint)
    reads(filled)


READ = """
import sys
from deltalake import DeltaTable
from lowprec.storage import Location
from lowprec.storage.object_store import delta_options
Location.of(f"{sys.argv[1]}/file").read_bytes()
DeltaTable(f"{sys.argv[1]}/table", storage_options=delta_options(sys.argv[1]))
"""


def test_a_profile_will_do(filled, s3, monkeypatch, tmp_path):
    """The server takes any key, and none: whose it was stands in the header. Arrow reads profiles once in a process."""
    came = []
    s3.answer = lambda environ: came.append(environ.get("HTTP_AUTHORIZATION", ""))
    (tmp_path / "credentials").write_text("[other]\naws_access_key_id = mine\naws_secret_access_key = b\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "other")
    subprocess.run([sys.executable, "-c", READ, filled], check=True)
    assert len(came) > 1 and all("Credential=mine/" in header for header in came)


@both_clients
def test_no_such_bucket(reads, s3):
    assert why(reads, "s3://nowhere") == f'there is no bucket "nowhere" at {s3.endpoint}'


@both_clients
@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [("http://127.0.0.1:1", "nothing listens there"), ("http://no-such-host.invalid", "no such host is known")],
)
def test_an_endpoint_that_cannot_be_reached(reads, endpoint, reason, filled, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setattr(object_store, "_ATTEMPTS", 1)  # each waits longer than the one before
    said = why(reads, filled)
    assert said == f"{endpoint} cannot be reached: {reason}; check AWS_ENDPOINT_URL and the network"


@both_clients
def test_an_endpoint_that_does_not_speak_tls(reads, filled, s3, monkeypatch):
    endpoint = s3.endpoint.replace("http://", "https://")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setattr(object_store, "_ATTEMPTS", 1)
    said = why(reads, filled)
    assert said == f"{endpoint} does not speak TLS; check whether AWS_ENDPOINT_URL begins with http:// or https://"


@both_clients
def test_access_denied(reads, filled, s3):
    s3.answer = lambda _: ("403 Forbidden", b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>")
    assert why(reads, filled).startswith("access is denied (")
    assert why(reads, filled).endswith("; check AWS_ACCESS_KEY_ID")


def test_no_credentials(bucket, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    said = why(delta_reads, bucket)
    assert said == "no credentials are set: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"


@both_clients
def test_half_of_a_key_and_half_of_an_endpoint(reads, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "minio:9000")
    with pytest.raises(ConfigError, match='AWS_ENDPOINT_URL "minio:9000": must begin with http'):
        reads(bucket)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match="one is set without the other"):
        reads(bucket)


def test_commits_need_a_conditional_put(bucket, s3):
    """As a store answers that does not know the header."""
    refused = (
        "501 Not Implemented",
        b"<Error><Code>NotImplemented</Code><Message>A header you provided</Message></Error>",
    )
    s3.answer = lambda environ: refused if environ.get("HTTP_IF_NONE_MATCH") else None
    with pytest.raises(OSError) as raised:
        write_deltalake(f"{bucket}/table", pa.table({"a": [1]}), storage_options=delta_options(bucket))
    assert "the store has no conditional put (If-None-Match: *)" in sentence(raised.value, bucket)


@both_clients
def test_an_endpoint_that_never_answers(reads, bucket, monkeypatch):
    """It takes connections and says nothing: waiting must end. (The limits are lowered, or a test took a minute.)"""
    limits = {"_CONNECT_TIMEOUT_S": 1, "_REQUEST_TIMEOUT_S": 1, "_ATTEMPTS": 2}
    for name, limit in (limits | {"_DELTA_REQUEST_TIMEOUT_S": 1, "_DELTA_RETRY_S": 1}).items():
        assert 0 < limit < getattr(object_store, name) <= 30
        monkeypatch.setattr(object_store, name, limit)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        said = why(reads, bucket)
    assert said == f"{endpoint} cannot be reached: it does not answer; check AWS_ENDPOINT_URL and the network"


def test_options_in_a_url_are_arrows_own(filled, s3, monkeypatch):
    """As `pyarrow.fs` reads them, for traffic that lies in another store than the rest."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    host = s3.endpoint.removeprefix("http://").replace(":", "%3A")
    url = f"{filled.replace('s3://', 's3://key:secret@')}/file?scheme=http&region=us-east-1&endpoint_override={host}"
    filesystem, inner = filesystem_of(url)
    with filesystem.open_input_file(inner) as file:
        assert file.read() == b"hello"
