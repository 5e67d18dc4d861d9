"""Ray itself: one started for the command, or a cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.services import get_ray_address_from_environment

from lowprec.errors import WorkerError

__all__ = ["cluster_resources", "init_ray"]

CONNECT_TIMEOUT_S = 10.0


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
    if address is None and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        address = "auto"  # a Ray job runs on its own cluster: a Ray beside that would not find the job's files
    try:
        with _own_termination():
            if address is None:
                # "local" never joins a cluster that an old address file points to.
                ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
            else:
                _check_reachable(address)
                ray.init(address=address, **quiet)
        return address is None
    except Exception as error:  # a Ray that takes too long to start raises that very class
        # Ray sends no token to an address that it was given, and a cluster that wants one does not say so.
        asks_token = address is not None and "RAY_AUTH_MODE" not in os.environ and "Failed to connect" in str(error)
        raise WorkerError(
            f"Ray at {address or 'this machine'}: cannot be reached or started: {_sentence(error)}; "
            + ("set RAY_AUTH_MODE=token if the cluster asks for a token; " if asks_token else "")
            + "check the address (evaluation.address, --address), or leave it out to run on this machine"
        ) from error


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
