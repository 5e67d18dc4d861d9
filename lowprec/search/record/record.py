"""A run's memory: everything that must outlive its process, in the results store."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from lowprec._version import __version__
from lowprec.config import Config
from lowprec.core.errors import ConfigError, LowprecError, PoisonedWorkError, TrafficError, WorkerError
from lowprec.evaluation.profile.profile_file import ProfileOrigin, write_profile
from lowprec.evaluation.profile.window_profile import MeasuredProfile
from lowprec.evaluation.stats.confidence import Verdict
from lowprec.plan import Plan, Precision
from lowprec.results import ResultsStore
from lowprec.search.confirm.alpha_spending import Look
from lowprec.search.record.resume_state import RunOrigin
from lowprec.search.record.trial import Trial, plan_text
from lowprec.search.surrogate.sensitivity import Sensitivity
from lowprec.session import Session
from lowprec.storage import Location
from lowprec.traffic.window import overlap

__all__ = ["RunRecord", "on_same_traffic"]

S = TypeVar("S", bound=Session)

# Settings that may differ between a run and its resumption: they change how far or how fast it goes, not its trials.
# (How batches are grouped and how many threads compute them changes the last bits, so those must stay.) Files may lie
# elsewhere, as on the machines of a cluster: that they are the same is seen by what they hold. Tables stay cut as they
# were, whatever the workers.
FREE_TO_CHANGE = (
    "name",
    "traffic.path",
    "model.checkpoint",
    "search.max_trials",
    "search.timeout_s",
    "cost.calibration",
    "evaluation.num_workers",
    "evaluation.worker_memory",
    "evaluation.task_timeout_s",
    "evaluation.hung_after_s",
    "evaluation.start_timeout_s",
    "evaluation.address",
    "results",
    "train",
    "gate",
)


# What may be mended from outside, so that a run can go on: workers, files and stores, disks.
MENDED_OUTSIDE = (WorkerError, TrafficError, OSError)


def on_same_traffic(config: Config, run_id: str) -> Config:
    """The config of a resumption, with the version of a Delta table that the run read where it names none itself."""
    rows = ResultsStore(config.results.root).read("runs", run_id=run_id).to_pylist()
    if config.traffic.version is not None or not rows:  # `RunRecord` reports what does not fit
        return config
    begun = json.loads(max(rows, key=lambda row: int(row["version"]))["config_json"])
    return config.with_traffic_version(begun["traffic"].get("version"))


class RunRecord(Generic[S]):
    """The rows of one run in `runs`, `sensitivities` and `trials`. The driver alone writes.

    session: what the run works on; one that is resumed has its tables cut as they were.
    """

    def __init__(self, session: S, run_id: str | None, *, command: str = "search", start: Plan | None = None) -> None:
        """Begin a run, or take up `run_id`; raises `ConfigError` when that run does not exist or had another config.

        start: the plan that a new search begins with.
        """
        self.session = session
        # Settings of a run that is resumed with other ones, in words.
        self._changes: list[str] = []
        self._store = ResultsStore(session.config.results.root)
        self._command = command
        # Whether a resumption finds something that took work.
        self._has_work = run_id is not None
        if run_id is None:
            now = datetime.now(UTC)
            self.run_id = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
            self._started_at, self._version = now, 0
            self._origin = RunOrigin.of(session, start)
            self._kept: dict[str, Any] = {"verdict": None, "recommended_trial_key": None, "summary_json": None}
        else:
            before = self._run(run_id)
            self._changes = _changes(json.loads(before["config_json"]), json.loads(session.config.to_json()), run_id)
            if before["checkpoint_sha256"] != session.checkpoint_sha256:
                raise ConfigError(
                    f"--resume {run_id}: that run searched checkpoint {before['checkpoint_sha256'][:12]}, "
                    f"{session.config.model.checkpoint} is now {session.checkpoint_sha256[:12]}; begin a new run"
                )
            self.run_id = run_id
            self._started_at, self._version = before["started_at"], before["version"] + 1
            self._origin = RunOrigin.read(self.artifacts) or RunOrigin.of(session)
            if self._origin.calibration_sha256 != RunOrigin.of(session).calibration_sha256:
                raise self.changed("cost.calibration is another one than the run began with; begin a new run")
            self.session = session.with_cuts(self._origin.cuts)
            # What the run had found stays visible until it finds something else.
            self._kept = {key: before[key] for key in ("verdict", "recommended_trial_key", "summary_json")}

    @property
    def start(self) -> Plan | None:
        """The plan that the search begins with, None where it was given none."""
        if self._origin.start is None:
            return None
        return Plan({unit: Precision(p) for unit, p in self._origin.start.items()})

    @property
    def artifacts(self) -> Location:
        """The folder for the run's files, below the results root."""
        return self._store.artifacts(self.run_id)

    @property
    def profile_path(self) -> Location:
        """Where the run's profile is, once it has one."""
        return self.artifacts / "profile.npz"

    @contextmanager
    def running(self, note: Callable[[str], None]) -> Iterator[None]:
        """Commit that the run has begun, and when the block is left early how it ended; `note` is told what to do."""
        self.state("running")
        note(f"run {self.run_id}")
        for change in self._changes:
            note(f"resumed with {change}")
        is_search = self._command == "search"
        resume = f"go on with the options that it had and --resume {self.run_id}"
        try:
            self._origin.write(self.artifacts)
            yield
        except KeyboardInterrupt:
            self._try(lambda: self.state("stopped", message="interrupted"), note)
            note(f"interrupted; {resume if is_search else 'nothing of it is kept'}")
            raise
        except Exception as failure:
            error = failure
            self._try(lambda: self._failed(error, note), note)
            # Of work that is set aside the error says to resume.
            is_of_use = isinstance(error, PoisonedWorkError) or self._has_work
            if isinstance(error, MENDED_OUTSIDE) and is_search and is_of_use:
                note(f"what is committed is kept; {resume}")
            raise

    def state(self, status: str, *, message: str = "", **known: Any) -> None:
        """Commit a new state of the run: running, done, stopped or failed."""
        if status == "done":
            self._store.check_kept()
        config = self.session.config
        row = {
            "run_id": self.run_id,
            "version": self._version,
            "status": status,
            "command": self._command,
            "started_at": self._started_at,
            "updated_at": datetime.now(UTC),
            "name": config.name,
            "config_json": config.to_json(),
            "checkpoint_sha256": self.session.checkpoint_sha256,
            "lowprec_version": __version__,
            "budget_pct": config.search.all_budgets[0],
            "message": message,
            **self._kept,
            **known,
        }
        self._store.append("runs", [{"row_key": f"{self.run_id}/{self._version}", **row}])
        self._version += 1

    def _failed(self, error: Exception, note: Callable[[str], None]) -> None:
        """Commit that the run failed; work that failed again and again is set aside in a file."""
        self.state("failed", message=str(error))
        if not isinstance(error, PoisonedWorkError):
            return
        name = hashlib.sha256(error.work.encode()).hexdigest()[:16]
        path = self.artifacts / "quarantine" / f"work-{name}.json"
        document = {"run_id": self.run_id, "command": self._command, "work": error.work, "tries": error.tries}
        with path.whole_file() as partial:
            partial.write_text(json.dumps({**document, "message": str(error)}, indent=2))
        note(f"the work that failed is described in {path}")

    def _try(self, commit: Callable[[], None], note: Callable[[str], None]) -> None:
        """Commit how the run ended; where that fails too, what ended it is still what is raised."""
        try:
            commit()
        except (LowprecError, OSError) as error:
            note(f"run {self.run_id} still says that it is running: {error}")

    def keep_profile(self, profile: MeasuredProfile, origin: ProfileOrigin) -> None:
        """Write the profile that the run has measured, where a resumption looks for it."""
        write_profile(profile, origin, self.profile_path)
        self._has_work = True

    def has_sensitivities(self, window: str) -> bool:
        """Whether the sensitivities of that window are there; they are committed all at once."""
        return window in self._store.read("sensitivities", run_id=self.run_id).column("window").to_pylist()

    def add_sensitivities(self, found: Sequence[Sensitivity], window: str) -> None:
        """Commit all sensitivities of a window at once."""
        self._store.append(
            "sensitivities",
            [
                {
                    "row_key": f"{self.run_id}/{window}/{s.decision}/{s.precision}",
                    "run_id": self.run_id,
                    "window": window,
                    **s.to_row(),
                }
                for s in found
            ],
        )
        self._has_work = True

    def trials(self, evaluation: str) -> list[Trial]:
        """The trials of the run of one kind of evaluation (exact, confirm), in order."""
        rows = self._store.read("trials", run_id=self.run_id, evaluation=evaluation).to_pylist()
        return sorted((Trial.from_row(r) for r in rows), key=lambda t: t.number)

    def num_confirmations(self, window: str) -> int:
        """How many tries of other runs on this checkpoint confirmed plans on a window that overlaps with this one."""
        runs = self._store.read("runs", checkpoint_sha256=self.session.checkpoint_sha256).column("run_id").to_pylist()
        others = set(runs) - {self.run_id}
        rows = self._store.read("trials", evaluation="confirm").select(["run_id", "window", "wave"]).to_pylist()
        return len({(r["run_id"], r["wave"]) for r in rows if r["run_id"] in others and overlap(r["window"], window)})

    def looks(self, plan: Plan, window: str) -> list[Look]:
        """All looks so far at a plan of this checkpoint on this window or one that overlaps with it, in time."""
        runs = self._store.read("runs", checkpoint_sha256=self.session.checkpoint_sha256).column("run_id").to_pylist()
        of_checkpoint, text = set(runs), plan_text(plan)
        columns = ["run_id", "window", "trial_key", "plan_json", "looks", "confidence", "num_units", "committed_at"]
        found = [
            row
            for evaluation in ("confirm", "verify")
            for row in self._store.read("trials", evaluation=evaluation).select(columns).to_pylist()
            if row["plan_json"] == text and row["run_id"] in of_checkpoint and overlap(row["window"], window)
        ]
        found.sort(key=lambda row: row["committed_at"])
        return [Look(r["trial_key"], r["looks"], r["confidence"], r["num_units"]) for r in found]

    def add_trials(
        self,
        trials: Sequence[Trial],
        *,
        evaluation: str,
        window: str,
        gated: Callable[[Verdict], Verdict] = lambda verdict: verdict,
        floors: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Commit a wave at once: after a kill it is there whole or not at all.

        gated: what a verdict becomes at the launch gate, with the `floors` that the trials were held to.
        """
        fp32 = self.session.storage.fp32_bytes
        self._store.append(
            "trials",
            [
                {
                    "row_key": f"{self.run_id}/{evaluation}/{trial.key}",
                    "run_id": self.run_id,
                    "evaluation": evaluation,
                    "window": window,
                    "bytes_ratio": trial.size_bytes / fp32,
                    **self._verdict(trial, gated),
                    "floors_json": json.dumps(list(floors)) if floors else None,
                    **trial.to_row(),
                }
                for trial in trials
            ],
        )
        self._has_work = True

    def _verdict(self, trial: Trial, gated: Callable[[Verdict], Verdict]) -> dict[str, Any]:
        """The tightest budget that the trial is certified for, else the loosest with what is known of it."""
        budgets = self.session.config.search.all_budgets
        certified = [b for b in budgets if trial.metrics.verdict(b) == "certified"]
        budget = (certified or budgets[-1:])[0]
        return {"budget_pct": budget, "verdict": gated(trial.metrics.verdict(budget))}

    def changed(self, what: str) -> ConfigError:
        """The error that refuses to go on with this run."""
        return ConfigError(f"--resume {self.run_id}: {what}")

    def _run(self, run_id: str) -> dict[str, Any]:
        rows: list[dict[str, Any]] = self._store.read("runs", run_id=run_id).to_pylist()
        if not rows:
            known = self._store.read("runs").column("run_id").to_pylist()
            raise ConfigError(
                f"--resume {run_id}: no such run under {self.session.config.results.root}; "
                + (f"the latest are {', '.join(sorted(set(known))[-3:])}" if known else "there are no runs yet")
            )
        return max(rows, key=lambda row: row["version"])


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], run_id: str) -> list[str]:
    """What is another setting now, for a person; raises `ConfigError` for one that must stay."""
    found = _differences(before, now)
    wrong = [key for key in found if not any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)]
    if wrong:
        raise ConfigError(
            f"--resume {run_id}: that run had another config: {', '.join(wrong)} differ; begin a new run, or undo "
            f"the change (free to change: {', '.join(FREE_TO_CHANGE)})"
        )
    return [
        f"{key} {json.dumps(_value(now, key))}, where the run had {json.dumps(_value(before, key))}"
        for key in found
        if key.startswith(("search.", "evaluation."))
    ]


def _value(document: Any, key: str) -> Any:
    for name in key.split("."):
        document = document.get(name) if isinstance(document, Mapping) else None
    return document


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return [
            key
            for name in sorted({*a, *b})
            for key in _differences(a.get(name), b.get(name), f"{prefix}.{name}" if prefix else name)
        ]
    return [] if a == b else [prefix]
