"""The log of a job, and how a job stands."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowprec.jobs.job import JobLog, SubmittedJob, run_in_log

DOCUMENT = {"schema_version": 1, "command": "search", "plan": {"table:a": "int4"}, "notes": ["{", "}"]}
FOREIGN = {"lines": ["of the model's own"], "nested": {"a": 1}}
BEFORE = "run 20261121-163552-af9d98\nhalf a { line\n{\n" + json.dumps(FOREIGN, indent=2) + "\n"
AFTER = "}\nthe end, without a line break"
LOG = BEFORE + json.dumps(DOCUMENT, indent=2) + "\n" + AFTER


@given(cuts=st.lists(st.integers(0, len(LOG))))
def test_a_log_is_shown_once_and_without_its_document_however_it_grows(cuts):
    log, shown = JobLog(), ""
    for cut in sorted(cuts):
        shown += log.grown(LOG[:cut])
        assert (BEFORE + AFTER).startswith(shown)
    shown += log.grown(LOG)
    shown += log.grown(LOG, is_over=True)
    assert shown == BEFORE + AFTER and log.document == DOCUMENT


def test_lines_are_shown_as_soon_as_they_are_whole():
    log = JobLog()
    assert log.grown("one\ntw") == "one\n"
    assert log.grown("one\ntwo\n{\n  1") == "two\n"
    assert log.grown("one\ntwo\n{\n  1", is_over=True) == "{\n  1" and log.document is None


def test_the_run_of_a_log_is_the_one_it_began_itself():
    assert run_in_log(LOG) == "20261121-163552-af9d98"
    assert run_in_log("go on with run 20261121-163552-af9d98\n") is None


@pytest.mark.parametrize(
    ("state", "exit_code", "outcome", "verdict", "result"),
    [
        ("succeeded", 0, "certified", "certified", 0),
        ("failed", 2, "rejected", "rejected", 2),
        ("failed", 4, "inconclusive", "inconclusive", 4),
        ("failed", 3, "error", None, 3),
        ("failed", 64, "wrong usage or config", None, 64),
        ("failed", 77, "exit code 77", None, 77),
        ("failed", 137, "killed by signal 9, most often for want of memory on the cluster's head node", None, 137),
        ("failed", 130, "interrupted", None, 130),
        ("failed", None, "failed: no disk", None, 3),
        ("stopped", None, "stopped", None, 130),
        ("running", None, "running", None, 3),
    ],
)
def test_how_a_job_stands(state, exit_code, outcome, verdict, result):
    job = SubmittedJob("id", "search", "demo", "runs", state, exit_code, "no disk\ntraceback", None, None)
    assert (job.outcome, job.to_dict()["verdict"], job.result_code) == (outcome, verdict, result)
    assert job.is_over == (state != "running")


@pytest.mark.parametrize(
    ("command", "exit_code", "result", "verdict"),
    [
        ("verify", 2, "rejected", "rejected"),
        ("monitor", 0, "ok", None),
        ("monitor", 1, "warn", None),
        ("monitor", 2, "breach", None),
        ("monitor", 3, "error", None),
        ("monitor", 4, "insufficient_data", None),
        ("debug", 0, "all is as planned", None),
        ("debug", 2, "not all is as planned", None),
        ("", 0, "certified", "certified"),
    ],
)
def test_a_job_shows_the_verdict_or_the_state_of_its_command(command, exit_code, result, verdict):
    job = SubmittedJob("id", command, "demo", "runs", "failed", exit_code, "", None, None)
    document = job.to_dict()
    assert (job.outcome, document["result"], document["verdict"]) == (result, result, verdict)
    assert (document["job"], document["job_command"]) == ("id", command) and "submission_id" not in document
