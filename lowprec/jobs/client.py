"""Ray's Jobs API, in bounded time and in sentences."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.job_submission import JobDetails, JobSubmissionClient

from lowprec._version import __version__
from lowprec.core.errors import ConfigError, JobError, LowprecError
from lowprec.jobs.job import SIGNALS, SubmittedJob
from lowprec.jobs.staging import StagedJob

__all__ = ["JobsApi"]

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# Of the Jobs API that this client speaks; since Ray 2.6.
API_VERSION = "4"
# To connect and to read. Ray itself waits without end; the head node answers a submission after up to 10 s.
TIMEOUTS_S = (10.0, 30.0)
# A cluster that was started a moment ago takes no jobs yet.
READY_AFTER_S = 30.0

# The job is asked to stop as Ctrl-C does: it notes the run as stopped, and has more than Ray's 3 s for that.
STOP_WAIT_S = 30
_ENVIRONMENT = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}

_METADATA = ("lowprec", "lowprec_job", "lowprec_name", "lowprec_results")

# They tell of every package that they upload.
_TALKATIVE = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env")


class _Client(JobSubmissionClient):
    """Ray's client, which has no timeouts of its own."""

    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        return super()._do_request(*args, timeout=TIMEOUTS_S, **kwargs)

    def version(self) -> dict[str, Any]:
        answer: dict[str, Any] = self._do_request("GET", "/api/version").json()
        return answer


class JobsApi:
    """The Jobs API of a Ray cluster. `notes` are sentences that a person should read once."""

    def __init__(self, address: str | None = None) -> None:
        """Connect; without an address, to that of the environment, else to the cluster on this machine.

        Raises `JobError` where no Jobs API answers that this version understands, `ConfigError` where the address is
        none.
        """
        given = address or _address_of_environment() or DEFAULT_ADDRESS
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        self.address, headers = given, _headers()
        with self._in_sentences():
            self.address = _http_address(given)
            try:
                with _environment_without_addresses():
                    self._client = _Client(self.address, headers=headers)
                version = self._client.version()
            except RuntimeError as error:  # somebody else's server, or a Ray before the Jobs API
                raise OSError(str(error)) from None
            except (KeyError, TypeError, ValueError):
                raise OSError("something else listens there") from None
        if version.get("version") != API_VERSION:
            raise JobError(
                f"the Jobs API at {self.address} has version {version.get('version')} (Ray "
                f"{version.get('ray_version')}), this lowprec speaks version {API_VERSION} (Ray {ray.__version__}); "
                "submit with the lowprec and Ray that the cluster has"
            )
        self.notes: tuple[str, ...] = ()
        if _minor(version["ray_version"]) != _minor(ray.__version__):
            self.notes = (
                f"the cluster has Ray {version['ray_version']}, this machine {ray.__version__}: a lowprec made for "
                "the former has to be installed there",
            )

    @property
    def is_here(self) -> bool:
        """Whether its address is one of this machine's, which that of a forwarded port is too."""
        try:
            with socket.create_server((urlsplit(self.address).hostname or "", 0)):
                return True
        except OSError:
            return False

    def submit(self, staged: StagedJob) -> SubmittedJob:
        """Send a job; it runs from now on, whatever becomes of this process."""
        name, root = staged.config.name, staged.config.results.root
        job_id = f"lowprec-{staged.job}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        deadline = time.monotonic() + READY_AFTER_S
        with self._in_sentences(job_id):
            while True:
                try:
                    self._client.submit_job(
                        submission_id=job_id,
                        entrypoint=staged.entrypoint,
                        runtime_env={"working_dir": str(staged.folder), "env_vars": dict(_ENVIRONMENT)},
                        metadata=dict(zip(_METADATA, (__version__, staged.job, name, root), strict=True)),
                    )
                    return SubmittedJob(job_id, staged.job, name, root, "pending", None, "", None, None)
                except OSError as error:
                    raise JobError(
                        f"the connection to {self.address} broke while job {job_id} was sent ({_reason(error)}); "
                        f"see whether it runs: lowprec submit status {job_id} --address {self.address}"
                    ) from error
                except RuntimeError as error:
                    if "No available agent" not in str(error) or time.monotonic() > deadline:
                        raise

    def job(self, submission_id: str) -> SubmittedJob:
        """How a job stands; raises `ConfigError` where the cluster knows none of that id."""
        return _submitted(self._details(submission_id))

    def jobs(self) -> list[SubmittedJob]:
        """The jobs of lowprec's that the cluster remembers, in the order in which they began."""
        with self._in_sentences():
            found = [_submitted(d) for d in self._client.list_jobs() if "lowprec" in (d.metadata or {})]
        return sorted(found, key=lambda job: (job.started_at or datetime.max.replace(tzinfo=UTC), job.submission_id))

    def log(self, submission_id: str) -> str | None:
        """All that a job has printed; None where the cluster cannot read it (just now, or as it is not UTF-8)."""
        self._check_id(submission_id)
        with self._in_sentences(submission_id):
            try:
                text: str = self._client.get_job_logs(submission_id)
            except RuntimeError as error:
                if _status(error) == 500:
                    return None
                raise
        return text

    def stop(self, submission_id: str) -> bool:
        """Ask a job to stop as Ctrl-C would, and return whether it ran; it has ended a while later."""
        self._check_id(submission_id)
        with self._in_sentences(submission_id):
            stopped: bool = self._client.stop_job(submission_id)
        return stopped

    def _details(self, submission_id: str) -> JobDetails:
        self._check_id(submission_id)
        with self._in_sentences(submission_id):
            return self._client.get_job_info(submission_id)

    def _check_id(self, submission_id: str) -> None:
        if not re.fullmatch(r"[\w.-]+", submission_id):
            raise self._unknown(submission_id)

    def _unknown(self, submission_id: str) -> ConfigError:
        return ConfigError(
            f"job {submission_id}: the cluster at {self.address} knows no such job; lowprec submit status lists them"
        )

    @contextmanager
    def _in_sentences(self, submission_id: str = "") -> Iterator[None]:
        try:
            yield
        except LowprecError:
            raise
        except ray.exceptions.AuthenticationError as error:
            raise JobError(f"the cluster at {self.address} {_about_token(error)}") from error
        except (OSError, ValueError, http.client.HTTPException, ray.exceptions.RayError) as error:
            raise JobError(
                f"no Jobs API of Ray answers at {self.address}: {_reason(error)}; start a cluster (ray start --head), "
                "or say where its dashboard is: --address http://HOST:8265"
            ) from error
        except RuntimeError as error:
            if submission_id and _status(error) == 404:
                raise self._unknown(submission_id) from None
            raise JobError(f"the cluster at {self.address} cannot do that: {_reason(error)}") from error


def _address_of_environment() -> str | None:
    given = next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), None)
    return None if given in ("auto", "local") else given


def _http_address(given: str) -> str:
    """The HTTP address of a Jobs API, also where the address of Ray itself was given (HOST:6379)."""
    scheme, separator, _ = given.partition("://")
    if scheme in ("http", "https") and separator:
        return given.rstrip("/")
    host, _, port = given.rpartition(":")
    if separator or not host or not port.isdigit():
        raise ConfigError(f"--address {given}: expected the address of a cluster's dashboard, such as http://HOST:8265")
    if _speaks_http(host, int(port)):
        return f"http://{given}"
    with _environment_without_addresses():
        found: str = _Client(given).get_address()
    return found


def _speaks_http(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUTS_S[0])
    try:
        connection.request("GET", "/api/version")
        return connection.getresponse().status < 500
    except (http.client.HTTPException, TimeoutError):
        return False
    finally:
        connection.close()


@contextmanager
def _environment_without_addresses() -> Iterator[None]:
    """Ray's own client lets the environment win over the address that it is given."""
    kept = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _headers() -> dict[str, Any] | None:
    """What Ray's own command line sends along, for clusters behind a proxy."""
    text = os.environ.get("RAY_JOB_HEADERS")
    try:
        headers = None if not text else json.loads(text)
    except ValueError:
        headers = text
    if headers is not None and not isinstance(headers, dict):
        raise ConfigError("environment variable RAY_JOB_HEADERS: expected a JSON object of HTTP headers")
    return headers


def _submitted(details: JobDetails) -> SubmittedJob:
    _, job, name, root = ((details.metadata or {}).get(key, "") for key in _METADATA)
    return SubmittedJob(
        submission_id=details.submission_id or details.job_id or "",
        job=job,
        name=name,
        results_root=root,
        state=str(details.status).lower(),
        exit_code=SIGNALS - code if (code := details.driver_exit_code) is not None and code < 0 else code,
        message=details.message or "",
        started_at=_time(details.start_time),
        ended_at=_time(details.end_time),
    )


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _status(error: Exception) -> int | None:
    """The HTTP status, which Ray's client has in the text of its errors only."""
    found = re.search(r"status code (\d+)", str(error))
    return int(found[1]) if found else None


def _about_token(error: Exception) -> str:
    if "RAY_AUTH_MODE" not in os.environ or os.environ["RAY_AUTH_MODE"].lower() != "token":
        return (
            "asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH where "
            "~/.ray/auth_token is not its token"
        )
    missing = "Missing" in str(error)
    return (
        f"{'got no token' if missing else 'refuses the token'}: give it its own in RAY_AUTH_TOKEN, in a file that "
        "RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
    )


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: what wraps it repeats addresses and names of classes."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
