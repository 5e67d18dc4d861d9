"""The client against servers that are not what it hopes for."""

import json
import os
import socket
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from lowprec.core.errors import ConfigError, JobError
from lowprec.jobs import JobsApi, follow_job, stop_job
from lowprec.jobs import client as client_module
from lowprec.jobs import follow as follow_module

VERSION = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "x"}


class HeadNode:
    """What a test wants the head node to answer, by path: a status and a document or text."""

    def __init__(self):
        self.answers = {"/api/version": (200, VERSION)}
        self.asked = []

    def job(self, job_id, status, log, **known):
        details = {"type": "SUBMISSION", "submission_id": job_id, "entrypoint": "sh", "status": status, **known}
        self.answers[f"/api/jobs/{job_id}"] = (200, details)
        self.answers[f"/api/jobs/{job_id}/logs"] = (200, {"logs": log})


@contextmanager
def serving(head, port=0, on_request=lambda path: None):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            on_request(self.path)
            head.asked.append((self.command, self.path, dict(self.headers)))
            status, answer = head.answers.get(self.path, (404, f"Job {self.path} does not exist"))
            body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _no_addresses(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_JOB_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(follow_module, "POLL_S", 0.01)
    monkeypatch.setattr(follow_module, "POLL_TO_REQUEST", 0.0)


def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_an_address_that_is_given_wins_over_the_environment(monkeypatch):
    with serving(HeadNode()) as address, serving(HeadNode()) as other:
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            monkeypatch.setenv(name, other)
            assert JobsApi(address).address == address and JobsApi().address == other
            assert os.environ[name] == other
            monkeypatch.delenv(name)
        monkeypatch.setattr(client_module, "DEFAULT_ADDRESS", address)
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        assert JobsApi().address == address
        assert JobsApi(address.removeprefix("http://")).address == address and JobsApi(address + "/").address == address
        assert JobsApi(address).is_here


@pytest.mark.parametrize("address", ["ray://host:10001", "host", "host:", "s3://bucket"])
def test_an_address_that_is_none_is_wrong_usage(address):
    with pytest.raises(ConfigError, match=rf"--address {address}: expected .* http://HOST:8265"):
        JobsApi(address)


@pytest.mark.parametrize("form", ["http://127.0.0.1:{}", "127.0.0.1:{}"])
def test_nobody_listens(form):
    address = form.format(unused_port())
    with pytest.raises(JobError, match=rf"no Jobs API of Ray answers at {address}: Connection refused; start a"):
        JobsApi(address)


def test_a_server_that_never_answers_is_left_after_a_while(monkeypatch):
    monkeypatch.setattr(client_module, "TIMEOUTS_S", (0.2, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(JobError, match=rf"answers at {address}: timed out"):
            JobsApi(address)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((404, "not here"), "no Jobs API of Ray answers at .*: Version check returned 404"),
        ((200, "<html>"), "no Jobs API of Ray answers at .*: something else listens there"),
        ((200, ["some", "list"]), "no Jobs API of Ray answers at .*: something else listens there"),
        ((200, {"ray_version": "1.8.0"}), "no Jobs API of Ray answers at .*: Ray version 1.8.0 is running"),
        ((503, "later"), "no Jobs API of Ray answers at .*503"),
        ((200, VERSION | {"version": "5"}), r"has version 5 \(Ray 2.60.0\), this lowprec speaks version 4"),
        ((401, "Missing"), "asks for a token: set RAY_AUTH_MODE=token"),
    ],
    ids=["404", "html", "json", "old", "503", "api-version", "token"],
)
def test_what_answers_is_not_what_was_meant(answer, said):
    head = HeadNode()
    head.answers["/api/version"] = answer
    with serving(head) as address, pytest.raises(JobError, match=said) as error:
        JobsApi(address)
    assert "\n" not in str(error.value)


def test_another_ray_is_said():
    head = HeadNode()
    head.answers["/api/version"] = (200, VERSION | {"ray_version": "2.9.3"})
    with serving(head) as address:
        (note,) = JobsApi(address).notes
    assert "the cluster has Ray 2.9.3, this machine" in note


def test_headers_of_the_environment_are_sent(monkeypatch):
    head = HeadNode()
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"X-Proxy": "open"}')
    with serving(head) as address:
        JobsApi(address)
        assert head.asked[-1][2]["X-Proxy"] == "open"
        for wrong in ("nothing", "[1]"):
            monkeypatch.setenv("RAY_JOB_HEADERS", wrong)
            with pytest.raises(ConfigError, match="RAY_JOB_HEADERS: expected a JSON object"):
                JobsApi(address)


def test_an_unknown_job_is_wrong_usage():
    with serving(HeadNode()) as address:
        api = JobsApi(address)
        for ask in (api.job, api.log, api.stop, lambda job: stop_job(api, job)):
            for job in ("nothing", "../version", "a b"):
                with pytest.raises(ConfigError, match=rf"job {job}: the cluster at {address} knows no such job"):
                    ask(job)


def test_only_jobs_of_lowprec_are_listed_in_the_order_of_their_begin():
    head = HeadNode()
    ours = {"lowprec": "0.1.0", "lowprec_job": "search", "lowprec_name": "demo", "lowprec_results": "/runs"}
    shared = {"type": "SUBMISSION", "entrypoint": "sh", "status": "RUNNING"}
    jobs = [{**shared, "submission_id": f"job{k}", "start_time": k * 1000, "metadata": ours} for k in (3, 1, 2)]
    others = [{**shared, "submission_id": "other"}, {**shared, "submission_id": "other", "metadata": {"a": "b"}}]
    head.answers["/api/jobs/"] = (200, jobs + others)
    with serving(head) as address:
        found = JobsApi(address).jobs()
    assert [job.submission_id for job in found] == ["job1", "job2", "job3"]
    first = found[0]
    assert (first.job, first.name, first.results_root, first.state) == ("search", "demo", "/runs", "running")
    assert first.to_dict()["started_at"] == "1970-01-01T00:00:01+00:00"


def test_a_connection_that_comes_back_loses_and_repeats_nothing():
    head, shown, lost = HeadNode(), [], []
    head.job("mine", "RUNNING", "one\n")
    port = unused_port()
    first, second = ExitStack(), ExitStack()
    api = JobsApi(first.enter_context(serving(head, port)))

    def on_log(text):
        shown.append(text)
        first.close()

    def on_lost(error):
        lost.append(error)
        head.job("mine", "FAILED", "one\ntwo\n", driver_exit_code=2)
        second.enter_context(serving(head, port))

    with first, second:
        followed = follow_job(api, "mine", on_log=on_log, on_lost=on_lost)
    assert followed.job.exit_code == 2 and shown == ["one\n", "two\n"] and len(lost) == 1


def test_a_connection_that_is_lost_ends_with_how_to_go_on():
    head, lost = HeadNode(), []
    head.job("mine", "RUNNING", "run 20261121-163552-af9d98\n")
    ends = ExitStack()
    api = JobsApi(ends.enter_context(serving(head)))
    with pytest.raises(JobError) as error:
        follow_job(api, "mine", on_log=lambda _: ends.close(), on_lost=lost.append, lost_after_s=0.05)
    assert lost == [f"no Jobs API of Ray answers at {api.address}: Connection refused"]
    assert str(error.value) == (
        f"lost job mine, which may still run: {lost[0]}; look at it with: lowprec submit logs mine --follow --address "
        f"{api.address}; if it is gone with its cluster, go on with: lowprec submit search CONFIG --resume "
        "20261121-163552-af9d98"
    )


def test_a_cluster_that_comes_back_without_the_job_has_lost_it():
    head = HeadNode()
    head.job("mine", "RUNNING", "run 20261121-163552-af9d98\n")

    def restart(_):
        del head.answers["/api/jobs/mine"]

    with (
        serving(head) as address,
        pytest.raises(JobError, match="lost job mine, .* knows no such job; .* --resume 2026"),
    ):
        follow_job(JobsApi(address), "mine", on_log=restart, on_lost=pytest.fail)
    with serving(HeadNode()) as address, pytest.raises(ConfigError, match="knows no such job"):
        follow_job(JobsApi(address), "mine", on_log=print, on_lost=pytest.fail)


def test_a_job_that_was_killed_has_the_code_that_shells_give():
    head = HeadNode()
    with serving(head) as address:
        for code, said in ((-9, 137), (137, 137), (0, 0), (2, 2)):
            head.job("mine", "FAILED", "", driver_exit_code=code)
            assert JobsApi(address).job("mine").result_code == said


def test_a_log_that_cannot_be_read_does_not_hide_the_end():
    head, shown = HeadNode(), []
    head.job("mine", "SUCCEEDED", "", driver_exit_code=0)
    head.answers["/api/jobs/mine/logs"] = (500, "Traceback\nUnicodeDecodeError: 'utf-8' codec can't decode byte 0xff")
    with serving(head) as address:
        followed = follow_job(JobsApi(address), "mine", on_log=shown.append, on_lost=pytest.fail)
    assert followed.job.exit_code == 0 and not shown


def test_a_log_that_cannot_be_read_when_the_job_ends_is_asked_for_again():
    head, shown, asked = HeadNode(), [], []
    head.job("mine", "SUCCEEDED", '{\n  "schema_version": 1,\n  "command": "search"\n}\nthe end\n', driver_exit_code=0)
    readable = head.answers["/api/jobs/mine/logs"]
    head.answers["/api/jobs/mine/logs"] = (500, "No available agent to get log")

    def answer_again(path):
        asked.append(path)
        if asked.count("/api/jobs/mine/logs") == 2:
            head.answers[path] = readable

    with serving(head, on_request=answer_again) as address:
        followed = follow_job(JobsApi(address), "mine", on_log=shown.append, on_lost=pytest.fail)
    assert followed.document == {"schema_version": 1, "command": "search"} and shown == ["the end\n"]


def test_a_slow_log_is_asked_for_less_often_but_is_asked_for(monkeypatch):
    monkeypatch.setattr(follow_module, "POLL_TO_REQUEST", 20.0)
    assert [follow_module._pause(request_s) for request_s in (0.0, 0.1, 60.0)] == [0.01, 2.0, 30.0]


def test_a_job_that_does_not_stop_is_said(monkeypatch):
    monkeypatch.setattr(follow_module, "STOPPED_AFTER_S", 0.05)
    head = HeadNode()
    head.job("mine", "RUNNING", "")
    head.answers["/api/jobs/mine/stop"] = (200, {"stopped": True})
    with (
        serving(head) as address,
        pytest.raises(JobError, match="job mine: is running 0 s after it was told to stop"),
    ):
        stop_job(JobsApi(address), "mine")
    assert ("POST", "/api/jobs/mine/stop") in [asked[:2] for asked in head.asked]
