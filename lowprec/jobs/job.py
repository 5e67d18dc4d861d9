"""What a cluster knows of a job, and what the job's log says."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from lowprec.core.errors import first_line
from lowprec.core.exit_codes import ERROR, INTERRUPTED, STATES, TERMINATED, USAGE, VERDICTS

__all__ = ["SIGNALS", "JobLog", "SubmittedJob", "run_in_log"]

_VERDICT_OF = {code: verdict for verdict, code in VERDICTS.items()}
# What the exit codes of commands say that do not end with a verdict.
_RESULT_OF = {
    "monitor": {code: state for state, code in STATES.items()},
    "debug": {0: "all is as planned", VERDICTS["rejected"]: "not all is as planned"},
}
# A process that was killed has the signal's number above this, as shells say it.
SIGNALS = 128

_OVER = ("stopped", "succeeded", "failed")
_RUN = re.compile(r"^run (\d{8}-\d{6}-[0-9a-f]{6})$", re.MULTILINE)


@dataclass(frozen=True)
class SubmittedJob:
    """A job of lowprec's on a cluster.

    state: pending, running, stopped, succeeded or failed, as Ray says; to Ray every exit code but 0 has failed, also
    that of a plan that was rejected. exit_code: of lowprec; None while it runs, and where it never ran to an end.
    """

    submission_id: str
    job: str
    name: str
    results_root: str
    state: str
    exit_code: int | None
    message: str
    started_at: datetime | None
    ended_at: datetime | None

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in _OVER

    @property
    def result_code(self) -> int:
        """What a command that waits for the job exits with: the job's own code wherever it has one."""
        if self.exit_code is not None:
            return self.exit_code
        return INTERRUPTED if self.state == "stopped" else ERROR

    @property
    def outcome(self) -> str:
        """How it stands, in a few words for people."""
        code = self.exit_code
        if code is None:
            why = first_line(self.message)[:300] or "Ray does not say why"
            return f"failed: {why}" if self.state == "failed" else self.state
        results = _RESULT_OF.get(self.job, _VERDICT_OF)
        if code in results:
            return results[code]
        known = {ERROR: "error", USAGE: "wrong usage or config", INTERRUPTED: "interrupted", TERMINATED: "terminated"}
        if code > SIGNALS and code not in known:
            return f"killed by signal {code - SIGNALS}, most often for want of memory on the cluster's head node"
        return known.get(code, f"exit code {code}")

    def to_dict(self) -> dict[str, Any]:
        """The job for documents: `job` is its id, which commands take, `job_command` what it runs.

        verdict: of a search or a verification. result: that, or the state of a monitor and the like.
        """
        known = asdict(self)
        named = {"job": known.pop("submission_id"), "job_command": known.pop("job")}
        times = {key: value and value.isoformat() for key, value in known.items() if key.endswith("_at")}
        result = None if self.exit_code is None else _RESULT_OF.get(self.job, _VERDICT_OF).get(self.exit_code)
        verdict = None if self.job in _RESULT_OF else result
        return {**named, **known, **times, "verdict": verdict, "result": result, "outcome": self.outcome}


def run_in_log(log: str) -> str | None:
    """The id of the run that a job has begun, which `--resume` takes; None where it has not come to that."""
    found = _RUN.findall(log)
    return found[-1] if found else None


class JobLog:
    """A log that grows: gives what is new in it, and keeps back the document that lowprec prints with `--json`."""

    def __init__(self) -> None:
        self.document: dict[str, Any] | None = None
        self.text = ""
        self._num_given = 0

    def grown(self, text: str, *, is_over: bool = False) -> str:
        """What to show of a log that now reads `text`: whole lines, and the rest of it once the job is over."""
        self.text = text
        shown = []
        while self._num_given < len(text):
            line_end = text.find("\n", self._num_given) + 1
            if not line_end and not is_over:
                break
            part = text[self._num_given : line_end or len(text)]
            if part == "{\n":
                document_end = text.find("\n}\n", self._num_given) + 3
                if document_end == 2 and not is_over:
                    break  # the rest of it comes later
                whole = text[self._num_given : document_end]
                if document_end > 2 and (document := _document(whole)):
                    self.document, part = document, ""
                    self._num_given += len(whole)
            self._num_given += len(part)
            shown.append(part)
        return "".join(shown)


def _document(text: str) -> dict[str, Any] | None:
    """The document of a command of ours, None where the text is something else."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"schema_version", "command"} <= found.keys() else None
