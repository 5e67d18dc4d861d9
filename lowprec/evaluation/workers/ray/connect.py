"""Ray itself: one started for the command, or a cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private.services import get_ray_address_from_environment

from lowprec.core.errors import WorkerError
from lowprec.evaluation.workers.auto_workers import is_ray_job

__all__ = ["cluster_resources", "init_ray"]

CONNECT_TIMEOUT_S = 10.0
# Of an AF_UNIX address, without the zero at its end.
MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107


def cluster_resources(address: str) -> dict[str, Any]:
    """Address, nodes, CPUs and GPUs of the Ray cluster at `address` ("auto": the one that runs on this machine).

    Raises `WorkerError` where none answers. Ray must not be in use by this process.
    """
    init_ray(0, address)
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        return {
            "address": ray.get_runtime_context().gcs_address,
            "num_nodes": sum(bool(node["Alive"]) for node in ray.nodes()),  # type: ignore[no-untyped-call]
            "num_cpus": resources.get("CPU", 0.0),
            "num_gpus": resources.get("GPU", 0.0),
        }
    finally:
        ray.shutdown()


def init_ray(num_cpus: int, address: str | None) -> bool:
    """Join the cluster at `address`; without one that of the Ray job that this is, else start Ray on this machine.

    Returns whether Ray was started here: then what it has is what this machine has.

    Raises `WorkerError` where that cannot be done.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    is_given = address is not None
    if address is None and is_ray_job():
        address = "auto"  # a Ray beside the job's own cluster would not find the job's files
    if address is None:
        _check_socket_length()
    try:
        with _own_termination():
            if address is None:
                # "local" never joins a cluster that an old address file points to.
                ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **_own_niceness(), **quiet)
            else:
                _check_reachable(address)
                ray.init(address=address, **quiet)
        return address is None
    except Exception as error:  # a Ray that takes too long to start raises that very class
        if address is None:
            raise WorkerError(
                f"Ray cannot be started on this machine: {_sentence(error)}; set evaluation.num_workers to 0 to "
                "evaluate in this process, without Ray"
            ) from error
        # Ray sends no token to an address that it was given, and a cluster that wants one does not say so.
        asks_token = "RAY_AUTH_MODE" not in os.environ and "Failed to connect" in str(error)
        named = os.environ.get("RAY_ADDRESS") if address == "auto" else None
        raise WorkerError(
            f"Ray at {f'{named} (RAY_ADDRESS)' if named else address}: cannot be reached: {_sentence(error)}; "
            + ("set RAY_AUTH_MODE=token if the cluster asks for a token; " if asks_token else "")
            + _address_advice(named, is_given=is_given)
        ) from error


def _address_advice(named: str | None, *, is_given: bool) -> str:
    if named:
        return "correct RAY_ADDRESS in the environment, or unset it"
    if not is_given:
        return "this process belongs to a Ray job, whose cluster has to be there"
    return "check the address (evaluation.address, --address), or leave it out to run on this machine"


def _own_niceness() -> dict[str, Any]:
    """Options of a Ray of ours: workers as nice as this process. Ray's default is 15 above it, which gives them what
    other processes leave.
    """
    return {} if "RAY_worker_niceness" in os.environ else {"_system_config": {"worker_niceness": 0}}


def _check_socket_length() -> None:
    """Raise `WorkerError` where Ray's Unix sockets would have longer paths than there can be: it takes long to fail."""
    folder: str = get_default_ray_temp_dir()  # type: ignore[no-untyped-call]
    session = f"session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}"
    length = len(os.fsencode(os.path.join(folder, session, "sockets", "plasma_store")))
    if length > MAX_SOCKET_PATH:
        named = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "RAY_TMPDIR")
        raise WorkerError(
            f"Ray cannot be started on this machine: the paths of its sockets below {folder} (by {named}) would have "
            f"{length} bytes, and at most {MAX_SOCKET_PATH} are possible; set RAY_TMPDIR to a shorter path such as "
            "/tmp, or evaluation.num_workers to 0 to evaluate in this process, without Ray"
        )


def _sentence(error: Exception) -> str:
    """What Ray says, which takes several lines to get to the point."""
    return " ".join(str(error).split())[:500].rstrip(".")


@contextmanager
def _own_termination() -> Iterator[None]:
    """Keep what this process does when it is asked to end: Ray would end it on the spot, with code 1."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    ended: object = None
    try:
        yield
    except SystemExit as error:
        ended = error.code
        if ended != signal.SIGTERM:
            raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if ended == signal.SIGTERM:
        # Asked while it began: by Ray's handler, which ends the process with the signal's number.
        signal.raise_signal(signal.SIGTERM)


def _check_reachable(address: str) -> None:
    """Ray itself waits without end for a head node that is not there, or no longer."""
    if address == "auto":
        # The cluster of this machine: one that was killed has left its address behind.
        address = get_ray_address_from_environment(address, None) or address
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
