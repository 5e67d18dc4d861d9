"""Ray as a command starts it, and the advice where it cannot be started."""

import os

import pytest
import ray

from lowprec.core.errors import WorkerError
from lowprec.evaluation.workers.ray import connect


@pytest.fixture
def surroundings(monkeypatch):
    """An environment that says nothing of Ray, and a Ray that is not started."""
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_worker_niceness"):
        monkeypatch.delenv(name, raising=False)

    def never(**_):
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr(connect.ray, "init", never)


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_that_is_too_long_for_sockets_is_named(name, surroundings, monkeypatch):
    monkeypatch.setenv(name, f"/tmp/{'x' * 60}")
    with pytest.raises(WorkerError) as raised:
        connect.init_ray(1, None)
    message = str(raised.value)
    assert f"/ray (by {name})" in message and "at most 107" in message
    assert "RAY_TMPDIR to a shorter path" in message and "num_workers to 0" in message and "address" not in message


def test_the_length_is_that_of_rays_sockets(surroundings, monkeypatch, tmp_path):
    """Where the check lets a folder pass, Ray's own check does."""
    from ray._private.utils import validate_socket_filepath

    passed = []
    for length in range(1, 60):
        monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * length)
        session = f"session_2026-11-30_21-58-18_123456_{os.getpid()}"
        path = f"/{'x' * length}/ray/{session}/sockets/plasma_store"
        try:
            connect._check_socket_length()
            passed.append(length)
            validate_socket_filepath(path)
        except WorkerError:
            with pytest.raises(OSError, match="AF_UNIX"):
                validate_socket_filepath(path)
    assert passed == list(range(1, len(passed) + 1)) and len(passed) < 59


def test_a_ray_of_this_machine_does_not_advise_to_check_an_address(surroundings, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # which is not used
    with pytest.raises(WorkerError, match="cannot be started on this machine: .*num_workers to 0") as raised:
        connect.init_ray(1, None)
    assert "address" not in str(raised.value) and "RAY_ADDRESS" not in str(raised.value)


def test_what_gave_an_address_is_named(surroundings, monkeypatch):
    with pytest.raises(WorkerError, match=r"Ray at 127\.0\.0\.1:9: .*check the address \(evaluation\.address"):
        connect.init_ray(1, "127.0.0.1:9")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(WorkerError, match=r"Ray at 127\.0\.0\.1:9 \(RAY_ADDRESS\): .*correct RAY_ADDRESS"):
        connect.init_ray(1, "auto")
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(connect, "get_ray_address_from_environment", lambda *_: "127.0.0.1:9")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(WorkerError, match="belongs to a Ray job, whose cluster has to be there"):
        connect.init_ray(1, None)


def test_workers_are_as_nice_as_the_command(monkeypatch):
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    assert connect.init_ray(1, None)
    try:
        assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)
    finally:
        ray.shutdown()
