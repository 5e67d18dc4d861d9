"""Trials on the search window: wave after wave, each committed before the next begins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lowprec.config import SearchConfig
from lowprec.core.progress import Progress
from lowprec.evaluation.workers.worker import Workers
from lowprec.plan import Plan, write_plan
from lowprec.search.confirm.choice import finalists
from lowprec.search.confirm.confirm import Recommendation
from lowprec.search.job import SearchJob
from lowprec.search.proposals.waves import next_wave
from lowprec.search.race_policy import Finish, race
from lowprec.search.raced_window import RacedWindow
from lowprec.search.record.outcome import plan_file
from lowprec.search.record.record import RunRecord
from lowprec.search.record.trial import Trial, trial_keys
from lowprec.search.surrogate.surrogate import Surrogate
from lowprec.storage import Location

__all__ = ["SearchRun", "known_trials", "run_waves", "save_plan"]


@dataclass(frozen=True)
class SearchRun:
    """What every step of a search has at hand. The job has the forms of layers once they are known."""

    job: SearchJob
    record: RunRecord[SearchJob]
    workers: Workers
    progress: Progress
    began: float = field(default_factory=time.monotonic)

    @property
    def settings(self) -> SearchConfig:
        """The section `search` of the config."""
        return self.job.config.search

    @property
    def quarantine(self) -> Location:
        """Where bad rows are set aside."""
        return self.record.artifacts / "quarantine"

    @property
    def is_over(self) -> bool:
        """Whether the time for waves is over."""
        limit = self.settings.timeout_s
        return limit is not None and time.monotonic() - self.began > limit


def run_waves(run: SearchRun, surrogate: Surrogate, raced: RacedWindow) -> list[Trial]:
    """All trials on the search window: those that the run has already, and wave after wave of new ones."""
    settings = run.settings
    trials = known_trials(run)
    run.progress.stage("trials", settings.max_trials)
    run.progress.advance(len(trials))
    wave = trials[-1].wave if trials else 0
    while len(trials) < settings.max_trials:
        if trials and run.is_over:
            run.progress.note(f"stopped by the time limit after {len(trials)} trials")
            break
        before = [t for t in trials if t.wave < wave]
        kind, plans = next_wave(surrogate, run.job.space, settings, before, wave, run.record.start)
        if not plans:
            run.progress.note("there are no more plans to evaluate")
            break
        # A wave that the limit on trials cut short is made whole first.
        done = {trial.plan for trial in trials}
        plans = [plan for plan in plans if plan not in done]
        if plans:
            plans = plans[: settings.max_trials - len(trials)]
            corrections = surrogate.corrections_pct(plans).tolist()
            finishes = _raced(run, surrogate, raced, plans, corrections, before)
            trials += _add_wave(run, surrogate, finishes, corrections, wave, kind, first=len(trials))
            _save_best(run, surrogate, trials)
        wave += 1
    return trials


def known_trials(run: SearchRun) -> list[Trial]:
    """The trials that the run has already; raises `ConfigError` where the search window is another one now."""
    trials, key = run.record.trials("exact"), trial_keys(run.job, "search")
    for trial in trials:
        if trial.key != key(trial.plan):
            raise run.record.changed(
                f"the traffic of windows.search is not what trial {trial.number} was evaluated on; begin a new run"
            )
    return trials


def _raced(
    run: SearchRun,
    surrogate: Surrogate,
    raced: RacedWindow,
    plans: Sequence[Plan],
    corrections_pct: Sequence[float],
    before: Sequence[Trial],
) -> list[Finish]:
    """Race plans on the search window.

    corrections_pct: of each plan, its expected gap less the measured one. before: trials of earlier waves.
    """
    return race(
        plans,
        [surrogate.costs.cost(plan) for plan in plans],
        raced.lap,
        surrogate.profile,
        raced.order,
        forecast=surrogate.forecast,
        corrections_pct=corrections_pct,
        rivals=before,
        budgets=run.settings.all_budgets,
        confidence=run.settings.confidence,
    )


def _add_wave(
    run: SearchRun,
    surrogate: Surrogate,
    finishes: Sequence[Finish],
    corrections_pct: Sequence[float],
    wave: int,
    kind: str,
    *,
    first: int,
) -> list[Trial]:
    """Commit the trials of a wave at once, numbered from `first`."""
    plans, key = [finish.plan for finish in finishes], trial_keys(run.job, "search")
    promised = surrogate.promised_pct(plans)
    trials = [
        Trial(
            key=key(finish.plan),
            number=first + k,
            wave=wave,
            kind=kind,
            plan=finish.plan,
            size_bytes=run.job.storage.size_bytes(finish.plan),
            latency_ns=surrogate.costs.plan_latency_ns(finish.plan),
            cost=surrogate.costs.cost(finish.plan),
            promised_pct=float(promised[k]),
            metrics=finish.estimate.metrics,
            risk_on_window=finish.risk_on_window,
            rows=surrogate.measured.rows,
            expected_pct=finish.estimate.metrics.gap_pct + corrections_pct[k],
        )
        for k, finish in enumerate(finishes)
    ]
    run.record.add_trials(trials, evaluation="exact", window=run.job.window_text("search"))
    run.progress.advance(len(trials))
    return trials


def _save_best(run: SearchRun, surrogate: Surrogate, trials: Sequence[Trial]) -> None:
    """Write the plan files of the safest finalists so far, with the evidence of the search window."""
    for budget in run.settings.all_budgets:
        choices = finalists(trials, budget, surrogate.forecast)
        if choices:
            save_plan(run, choices[0].trial, budget, None)


def save_plan(run: SearchRun, trial: Trial, budget: float, confirmed: Recommendation | None) -> Location:
    """Write the plan file of a budget: with the evidence of the confirm window, where it was confirmed."""
    file = plan_file(
        run.job,
        trial,
        confirmed.best.metrics if confirmed else trial.metrics,
        run_id=run.record.run_id,
        kind="confirm" if confirmed else "exact",
        window=run.job.window_text("confirm" if confirmed else "search"),
        budget_pct=budget,
        verdict=confirmed.verdict if confirmed else None,
    )
    is_only_one = len(run.settings.all_budgets) == 1
    path = run.record.artifacts / ("plan.json" if is_only_one else f"plan-{budget:g}.json")
    write_plan(file, path)
    return path
