"""Who is told, and what happens where that fails: it is said, and changes no verdict."""

import json
import shlex
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from lowprec.config import WebhookConfig, WindowConfig
from lowprec.core.errors import ConfigError, ResultsError, TrafficError
from lowprec.gate import verify_plan
from lowprec.monitor.judging.history import BreachHistory
from lowprec.monitor.notify.webhook import due_alerts, webhook_url
from lowprec.plan import Precision
from lowprec.results import ResultsStore


@pytest.fixture
def hook():
    """A server of webhooks: `answers` are given one after the other, then 200; `seen` are the bodies that came."""
    found = SimpleNamespace(answers=[], seen=[], keys=[], delay=0.0)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(found.delay)
            found.seen.append(json.loads(body))
            found.keys.append(self.headers["Idempotency-Key"])
            self.send_response(found.answers.pop(0) if found.answers else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}/hook"
    yield found
    server.shutdown()
    server.server_close()


def broken(deployed, *overrides):
    """A deployment whose promise breaks in the days that are watched."""
    return deployed(*overrides, precision=Precision.INT2, budget=0.3, longer=True)


def events(config):
    rows = ResultsStore(config.results.root).dataset("alerts").to_table().to_pylist()
    return sorted((row["window_start"], row["event"]) for row in rows)


def test_a_breach_is_told_once_with_its_evidence_and_a_plan(deployed, monitored, hook):
    config, plan = broken(deployed, f"monitor.webhook={{url: '{hook.url}'}}")
    outcome = monitored(config, plan)
    assert outcome.state == "breach"
    (told,) = hook.seen
    assert (told["event"], told["state"], told["name"]) == ("opened", "breach", "small")
    assert told["dedup_key"].startswith(outcome.deployment) and hook.keys == [
        f"{outcome.deployment}/{last(config)}/alert"
    ]
    assert told["proposed_plan"] and told["running_lower_pct"] > 0.3 and told["units"][0]["unit"].startswith("table:")
    assert [t["failed"] for t in outcome.told] == [None]
    monitored(config, plan)
    assert len(hook.seen) == 1


def last(config):
    return max(r["window_start"] for r in ResultsStore(config.results.root).read("monitor_windows").to_pylist())


def test_answers_that_may_pass_are_tried_again(deployed, monitored, hook):
    hook.answers = [500, 503]
    config, plan = broken(deployed, f"monitor.webhook={{url: '{hook.url}', retries: 3}}")
    assert [t["failed"] for t in monitored(config, plan).told] == [None]
    assert len(hook.seen) == 3 and len(set(hook.keys)) == 1


@pytest.mark.parametrize("answers, said", [([500] * 9, "HTTP 500"), ([404] * 9, "HTTP 404")])
def test_what_is_not_told_is_said_and_told_by_the_next_run(deployed, monitored, hook, answers, said):
    hook.answers = answers
    config, plan = broken(deployed, f"monitor.webhook={{url: '{hook.url}', retries: 1}}")
    first = monitored(config, plan)
    assert first.state == "breach" and said in first.told[0]["failed"]
    assert any("was not told" in note for note in first.notes)
    assert [event for _, event in events(config)].count("not_told") == 1
    hook.answers = []
    again = monitored(config, plan)
    assert again.state == "breach" and again.told[0]["failed"] is None
    assert [event for _, event in events(config)].count("told") == 1


def test_a_webhook_that_hangs_is_given_up(deployed, monitored, hook):
    hook.delay = 3.0
    config, plan = broken(deployed, f"monitor.webhook={{url: '{hook.url}', retries: 1, timeout_s: 0.2}}")
    outcome = monitored(config, plan)
    failed = outcome.told[0]["failed"]
    assert outcome.state == "breach" and "2 tries" in failed and "time" in failed, failed


def test_a_webhook_that_refuses_is_said_without_its_url(deployed, monitored, hook):
    config, plan = broken(deployed, "monitor.webhook={url: 'http://127.0.0.1:9/secret-token', retries: 0}")
    outcome = monitored(config, plan)
    assert outcome.state == "breach" and outcome.told[0]["failed"]
    assert "secret-token" not in json.dumps(outcome.told) + " ".join(outcome.notes)


def test_the_url_may_be_in_the_environment(monkeypatch):
    config = WebhookConfig(url_env="LOWPREC_HOOK")
    with pytest.raises(ConfigError, match=r"monitor.webhook.url_env: the environment has no LOWPREC_HOOK"):
        webhook_url(config)
    monkeypatch.setenv("LOWPREC_HOOK", "http://there")
    assert webhook_url(config) == "http://there"


def alert(start, event, state="breach", incident="i", key=None):
    return {
        "window_start": start,
        "event": event,
        "state": state,
        "incident": incident,
        "alert_key": key or f"{incident}/{start}",
    }


@pytest.mark.parametrize(
    "rows, due",
    [
        ([], []),
        ([alert(0, "opened")], [(0, "opened")]),
        ([alert(0, "opened"), alert(0, "told")], []),
        # One incident is told again after the cooldown, with its latest window.
        ([alert(0, "opened"), alert(0, "told"), alert(5, "continues")], []),
        ([alert(0, "opened"), alert(0, "told"), alert(5, "continues"), alert(12, "continues")], [(12, "continues")]),
        # What nobody was told of is opened late, the worst of it, also where it has passed since.
        ([alert(0, "opened"), alert(5, "continues")], [(5, "opened")]),
        ([alert(0, "opened"), alert(5, "continues"), alert(9, "continues", "warn")], [(5, "opened")]),
        ([alert(0, "opened"), alert(5, "resolved", "ok")], [(0, "opened"), (5, "resolved")]),
        ([alert(0, "opened", "error"), alert(5, "opened"), alert(9, "continues", "error")], [(5, "opened")]),
        # What only warned, and nobody was told of, needs no end.
        ([alert(0, "opened", "warn"), alert(5, "resolved", "ok")], []),
        # It got worse between two runs, and was better again when they were over.
        (
            [alert(0, "opened", "error"), alert(0, "told"), alert(3, "opened"), alert(5, "continues", "error")],
            [(3, "opened")],
        ),
        ([alert(0, "opened"), alert(0, "told"), alert(5, "resolved", "ok")], [(5, "resolved")]),
        # A warning is not told where only breaches are, but a breach that follows it is.
        ([alert(0, "opened", "warn")], []),
        ([alert(0, "opened", "warn"), alert(5, "opened")], [(5, "opened")]),
        ([alert(0, "opened"), alert(1, "opened", incident="j")], [(0, "opened"), (1, "opened")]),
    ],
)
def test_which_alerts_are_due(rows, due):
    found = due_alerts(rows, ("breach", "error"), 10)
    assert [(row["window_start"], row["event"]) for row in found] == due


def metrics(path):
    found = {}
    for family in text_string_to_metric_families(path.read_text()):
        for sample in family.samples:
            key = (sample.name, sample.labels.get("state")) if "state" in sample.labels else sample.name
            found[key] = sample.value
    return found


def test_the_textfile_has_the_last_window_and_one_state(deployed, monitored, tmp_path):
    path = tmp_path / "metrics" / "lowprec.prom"
    config, plan = deployed(f"monitor.textfile={path}", precision=Precision.INT4)
    outcome = monitored(config, plan)
    found = metrics(path)
    assert found["lowprec_ne_gap_pct"] == outcome.windows[-1]["gap_pct"]
    assert found["lowprec_ne_gap_pct_lower"] < found["lowprec_ne_gap_pct"] < found["lowprec_ne_gap_pct_upper"]
    assert found["lowprec_kl_gap_pct"] == outcome.windows[-1]["kl_pct"]
    assert found["lowprec_budget_pct"] == 5.0
    assert found["lowprec_last_success_timestamp_seconds"] == 1768089600
    assert [k for k in found if isinstance(k, tuple) and found[k] == 1] == [("lowprec_state", "ok")]
    assert sum(isinstance(k, tuple) for k in found) == 5
    assert [p.name for p in path.parent.iterdir()] == ["lowprec.prom"]
    # With nothing due it is written again, with the same window.
    monitored(config, plan)
    assert metrics(path) == found


def test_a_textfile_that_cannot_be_written_changes_no_verdict(deployed, monitored, tmp_path):
    (tmp_path / "file").touch()
    config, plan = deployed(f"monitor.textfile={tmp_path}/file/lowprec.prom")
    outcome = monitored(config, plan)
    assert outcome.state == "ok"
    assert "cannot be written" in outcome.told[0]["failed"]
    assert any("monitor.textfile" in note and "the verdict is kept" in note for note in outcome.notes)


def test_a_breach_that_has_passed_when_the_run_is_over_is_told_with_its_plan(deployed, monitored, hook, monkeypatch):
    """Two days that break the promise and one that does not, judged by one run."""
    config, plan = broken(deployed, f"monitor.webhook={{url: '{hook.url}'}}")
    real, days = BreachHistory.after, []

    def passing(self, start):
        found = real(self, start)
        days.append(start)
        is_over = len(set(days)) > 4
        state = replace(found.state, in_breach=found.state.in_breach and not is_over, ended=is_over)
        return replace(found, state=state)

    monkeypatch.setattr(BreachHistory, "after", passing)
    outcome = monitored(config, plan)
    assert outcome.state == "breach" != outcome.current_state
    told = hook.seen[0]
    assert (told["event"], told["state"]) == ("opened", "breach") and told["proposed_plan"]
    # The run's message is that of a window in its state, not of the last one.
    assert "is found to be above" in outcome.message or "was found to be above" in outcome.message


def test_a_redirection_is_no_delivery(deployed, monitored, hook):
    hook.answers = [302]
    config, plan = broken(deployed, f"monitor.webhook={{url: '{hook.url}', retries: 0}}")
    assert [t["failed"] for t in monitored(config, plan).told] == ["HTTP 302 Found"]
    assert [t["failed"] for t in monitored(config, plan).told] == [None]


def test_traffic_that_cannot_be_read_is_told_and_so_is_its_end(deployed, monitored, hook, traffic_copy, tmp_path):
    folder = traffic_copy()
    textfile = tmp_path / "lowprec.prom"
    config, plan = deployed(
        f"traffic.path={folder}", f"monitor.textfile={textfile}", f"monitor.webhook={{url: '{hook.url}'}}"
    )
    whole = (folder / "part.parquet").read_bytes()
    (folder / "part.parquet").write_bytes(whole[:-100])
    for _ in range(2):
        with pytest.raises(TrafficError):
            monitored(config, plan)
    (told,) = hook.seen
    assert (told["event"], told["state"]) == ("opened", "error") and "part.parquet" in told["message"]
    assert 'state="error"} 1.0' in textfile.read_text()
    (folder / "part.parquet").write_bytes(whole)
    assert monitored(config, plan).state == "ok"
    assert [t["event"] for t in hook.seen] == ["opened", "resolved"]
    assert len({t["dedup_key"] for t in hook.seen}) == 1
    # The next one is an incident of its own.
    (folder / "part.parquet").write_bytes(whole[:-100])
    with pytest.raises(TrafficError):
        monitored(config, plan)
    assert hook.seen[2]["event"] == "opened" and hook.seen[2]["dedup_key"] != told["dedup_key"]


def test_what_cannot_be_told_hides_no_error(deployed, monitored, traffic_copy, monkeypatch):
    folder = traffic_copy()
    config, plan = deployed(f"traffic.path={folder}")
    (folder / "part.parquet").write_bytes(b"no Parquet")
    notes = []

    def full(*_):
        raise ResultsError("results: no space left")

    monkeypatch.setattr("lowprec.monitor.record.MonitorRecord.add_failed_run", full)
    with pytest.raises(TrafficError, match=r"part\.parquet"):
        monitored(config, plan, progress=SimpleNamespace(note=notes.append))
    assert notes == ["no notification is sent: results: no space left"]


def test_the_textfile_has_the_state_of_the_deployment_and_not_of_the_run(deployed, monitored, tmp_path, monkeypatch):
    textfile = tmp_path / "lowprec.prom"
    config, plan = broken(deployed, f"monitor.textfile={textfile}")
    first = monitored(config, plan)
    text = textfile.read_text()
    again = monitored(config, plan)
    assert again.windows == () and again.state == again.current_state == first.current_state

    def states(text):
        return [line for line in text.splitlines() if line.startswith("lowprec_state{")]

    assert states(textfile.read_text()) == states(text)


def test_a_webhook_without_its_secret_is_said_before_there_is_anything_to_tell(deployed, monitored, monkeypatch):
    monkeypatch.delenv("NO_SUCH_HOOK", raising=False)
    config, plan = deployed("monitor.webhook={url_env: NO_SUCH_HOOK}")
    outcome = monitored(config, plan)
    assert outcome.state == "ok" and any("NO_SUCH_HOOK" in note for note in outcome.notes)


def test_the_proposed_plan_is_tried_on_the_window_that_asked_for_it(deployed, monitored):
    config, plan = broken(deployed)
    proposal = monitored(config, plan).windows[-1]["proposal"]
    assert (
        f"--plan {proposal['plan']} --set 'windows.confirm={{start: 2026-01-10T00:00:00Z, end: 2026-01-11T00:00:00Z}}'"
        in (proposal["verify"])
    )
    assert proposal["verify"].endswith("--budget 0.3")
    arguments = shlex.split(proposal["verify"])
    override = arguments[arguments.index("--set") + 1]
    changed = config.with_(windows=confirm_of(override))
    assert verify_plan(changed, proposal["plan"], budget_pct=0.3).verdict == "inconclusive"


def confirm_of(override):
    return {"confirm": WindowConfig(**yaml.safe_load(override.partition("=")[2]))}
