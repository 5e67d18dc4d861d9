"""The search: sensitivities, then waves of plans, then the best of them confirmed on a later window."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowprec.config import Config
from lowprec.errors import LowprecError
from lowprec.evaluation.confidence import Verdict
from lowprec.evaluation.evaluate import RowAccount
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.worker import Workers
from lowprec.plan import Plan, PlanFile, write_plan
from lowprec.progress import Progress, Silent
from lowprec.search.choice import Choice, Confirmed, finalists, recommended
from lowprec.search.greedy import Sensitivity, greedy_path, plans_around_budget, single_swaps, uniform_plans
from lowprec.search.job import Job, open_job, open_workers
from lowprec.search.record import SearchRecord
from lowprec.search.study import propose
from lowprec.search.trial import Trial, pareto_front, plan_key
from lowprec.traffic import TrafficWindow

__all__ = ["SearchOutcome", "run_search"]

# Plans evaluated together while sensitivities are measured; more would only hold more logits in memory.
SWAPS_AT_ONCE = 64


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found: the recommended plan with its evidence, all finalists (safest first), and the front."""

    run_id: str
    best: Confirmed
    finalists: tuple[Confirmed, ...]
    budget_pct: float
    front: tuple[Trial, ...]
    num_trials: int
    fp32_bytes: int
    rows: dict[str, RowAccount]
    plan_path: Path
    windows: dict[str, str]
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """That of the recommended plan on the confirm window."""
        return self.best.verdict

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the command."""
        trial = self.best.choice.trial
        return {
            "run_id": self.run_id,
            "verdict": self.verdict,
            "budget_pct": self.budget_pct,
            "meets_budget_in_search": self.best.choice.meets_budget,
            "because": self.best.choice.because,
            **self._plan(trial),
            "fp32_bytes": self.fp32_bytes,
            "plan_path": str(self.plan_path),
            "search": trial.metrics.to_dict(),
            "confirm": self.best.metrics.to_dict(),
            "finalists": [
                {**self._plan(f.choice.trial), "verdict": f.verdict, **f.metrics.to_dict()} for f in self.finalists
            ],
            "windows": self.windows,
            "num_trials": self.num_trials,
            "rows": {name: account.to_dict() for name, account in self.rows.items()},
            "front": [{**self._plan(t), **t.metrics.to_dict()} for t in self.front],
            "seconds": round(self.seconds, 1),
        }

    def _plan(self, trial: Trial) -> dict[str, Any]:
        return {
            "trial_key": trial.key,
            "plan": {name: str(p) for name, p in trial.plan.items()},
            "bytes": trial.size_bytes,
            "bytes_ratio": trial.size_bytes / self.fp32_bytes,
        }


def run_search(config: Config, *, resume: str | None = None, progress: Progress | None = None) -> SearchOutcome:
    """Search as the config says and confirm the best plan; `resume` continues a run that was stopped or killed.

    Every wave is committed before the next begins, and a wave is a function of the trials before it: a resumed run does
    the same trials as one left alone. `search.timeout_s` stops the waves; the confirmation still runs.
    """
    job = open_job(config)
    record = SearchRecord(job, resume)
    record.state("running")
    try:
        with open_workers(job) as workers:
            outcome = _Search(job, record, workers, progress or Silent()).run()
    except KeyboardInterrupt:
        record.state("stopped", message="interrupted")
        raise
    except LowprecError as error:
        record.state("failed", message=str(error))
        raise
    record.state(
        "done",
        message=outcome.best.choice.because,
        verdict=outcome.verdict,
        recommended_trial_key=outcome.best.choice.trial.key,
        summary_json=json.dumps(outcome.to_dict()),
    )
    return outcome


class _Search:
    def __init__(self, job: Job, record: SearchRecord, workers: Workers, progress: Progress) -> None:
        self._job, self._record, self._workers, self._progress = job, record, workers, progress
        self._began = time.monotonic()
        self._rows: dict[str, RowAccount] = {}
        progress.note(f"run {record.run_id}")

    def run(self) -> SearchOutcome:
        window = self._job.window("search")
        confirm_window = self._job.window("confirm")  # opened first: an empty window must not cost a search
        sensitivities = self._sensitivities(window)
        trials = self._waves(window, sensitivities)
        choices = finalists(trials, self._job.config.search.budget)
        if not choices[0].meets_budget:
            self._progress.note(f"no plan meets the budget of {self._job.config.search.budget} percent")
        confirmed = self._confirm(confirm_window, choices)
        outcome = SearchOutcome(
            run_id=self._record.run_id,
            best=recommended(confirmed),
            finalists=tuple(confirmed),
            budget_pct=self._job.config.search.budget,
            front=tuple(pareto_front(trials)),
            num_trials=len(trials),
            fp32_bytes=self._job.space.fp32_bytes,
            rows=self._rows,
            plan_path=self._record.artifacts / "plan.json",
            windows={name: self._job.window_text(name) for name in ("search", "confirm")},
            seconds=time.monotonic() - self._began,
        )
        write_plan(self._plan_file(outcome), outcome.plan_path)
        return outcome

    def _sensitivities(self, window: TrafficWindow) -> list[Sensitivity]:
        """Single swaps on a random sample of batches, or what the run measured before."""
        search = self._job.config.search
        evaluated_on = self._job.window_text("search")
        known = self._record.sensitivities(evaluated_on)
        swaps = single_swaps(self._job.space)
        if known or not swaps:
            return known
        order = np.random.default_rng(search.seed).permutation(window.num_batches)
        sample = [int(k) for k in order[: search.sensitivity_batches]]
        self._progress.stage("sensitivities", len(swaps))
        base = self._job.space.size_bytes(self._job.space.most_exact)
        found: list[Sensitivity] = []
        for first in range(0, len(swaps), SWAPS_AT_ONCE):
            part = swaps[first : first + SWAPS_AT_ONCE]
            metrics = self._evaluate("search", window, [swap.plan for swap in part], batches=sample)
            found += [
                Sensitivity(s.decision, s.precision, base - self._job.space.size_bytes(s.plan), m)
                for s, m in zip(part, metrics, strict=True)
            ]
            self._progress.advance(len(part))
        self._record.add_sensitivities(found, evaluated_on)
        return found

    def _waves(self, window: TrafficWindow, sensitivities: Sequence[Sensitivity]) -> list[Trial]:
        search = self._job.config.search
        trials = self._record.trials()
        self._progress.stage("trials", search.max_trials)
        self._progress.advance(len(trials))
        while len(trials) < search.max_trials:
            if trials and search.timeout_s and time.monotonic() - self._began > search.timeout_s:
                self._progress.note(f"stopped by the time limit after {len(trials)} trials")
                break
            wave = trials[-1].wave + 1 if trials else 0
            kind, plans = self._next_wave(trials, sensitivities, wave)
            if not plans:
                self._progress.note("every plan of the space has been evaluated")
                break
            done = self._wave(window, kind, wave, plans[: search.max_trials - len(trials)], len(trials))
            trials += done
            self._progress.advance(len(done))
        return trials

    def _next_wave(
        self, trials: Sequence[Trial], sensitivities: Sequence[Sensitivity], wave: int
    ) -> tuple[str, list[Plan]]:
        """The plans of a wave: nothing decides them but the config and the trials before."""
        search, space = self._job.config.search, self._job.space
        if not trials:
            return "uniform", uniform_plans(space)
        known = {trial.plan for trial in trials}
        if trials[-1].kind == "uniform":
            path = greedy_path(space, sensitivities)
            plans = [p for p in plans_around_budget(path, search.budget, search.wave_size) if p not in known]
            if plans:
                return "greedy", plans
        seed = int(np.random.SeedSequence([search.seed, wave]).generate_state(1)[0])
        return "optuna", propose(space, trials, count=search.wave_size, budget_pct=search.budget, seed=seed)

    def _wave(self, window: TrafficWindow, kind: str, wave: int, plans: Sequence[Plan], first: int) -> list[Trial]:
        metrics = self._evaluate("search", window, plans)
        trials = [
            self._trial("search", first + k, wave, kind, p, m)
            for k, (p, m) in enumerate(zip(plans, metrics, strict=True))
        ]
        self._record.add_trials(trials, evaluation="exact", window=self._job.window_text("search"))
        return trials

    def _confirm(self, window: TrafficWindow, choices: Sequence[Choice]) -> list[Confirmed]:
        self._progress.stage("confirm", window.num_batches)
        plans = [choice.trial.plan for choice in choices]
        metrics = self._evaluate("confirm", window, plans, on_progress=self._progress.advance)
        trials = [
            self._trial("confirm", c.trial.number, c.trial.wave, c.trial.kind, c.trial.plan, m)
            for c, m in zip(choices, metrics, strict=True)
        ]
        self._record.add_trials(trials, evaluation="confirm", window=self._job.window_text("confirm"))
        budget = self._job.config.search.budget
        return [Confirmed(c, m, m.verdict(budget)) for c, m in zip(choices, metrics, strict=True)]

    def _evaluate(
        self,
        name: str,
        window: TrafficWindow,
        plans: Sequence[Plan],
        *,
        batches: Sequence[int] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> tuple[PlanMetrics, ...]:
        evaluation = self._job.evaluate(
            self._workers,
            name,
            window,
            plans,
            quarantine=self._record.artifacts / "quarantine",
            batches=batches,
            on_progress=on_progress,
        )
        if batches is None:
            self._rows[name] = evaluation.rows
        return evaluation.metrics

    def _trial(self, name: str, number: int, wave: int, kind: str, plan: Plan, metrics: PlanMetrics) -> Trial:
        key = plan_key(self._job.checkpoint_sha256, self._job.evaluated_on(name), plan)
        return Trial(key, number, wave, kind, plan, self._job.space.size_bytes(plan), metrics)

    def _plan_file(self, outcome: SearchOutcome) -> PlanFile:
        return PlanFile(
            plan=outcome.best.choice.trial.plan,
            model=self._job.config.model.factory,
            checkpoint_sha256=self._job.checkpoint_sha256,
            size_bytes=outcome.best.choice.trial.size_bytes,
            row_alignment=self._job.space.row_alignment,
            evidence={
                "run_id": outcome.run_id,
                "kind": "confirm",
                "verdict": outcome.verdict,
                "budget_pct": self._job.config.search.budget,
                "window": outcome.windows["confirm"],
                **outcome.best.metrics.to_dict(),
            },
        )
