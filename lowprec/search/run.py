"""The search: sensitivities, then waves of plans, then the best of them confirmed on a later window."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

import numpy as np

from lowprec.config import Config
from lowprec.errors import ModelError
from lowprec.evaluation.evaluate import Evaluation
from lowprec.evaluation.worker import Workers
from lowprec.plan import Plan, write_plan
from lowprec.progress import Progress, Silent
from lowprec.search.choice import Choice, Confirmed, finalists, recommended
from lowprec.search.describe import notes_on
from lowprec.search.greedy import Sensitivity, greedy_path, plans_around_budget, single_swaps, uniform_plans
from lowprec.search.job import Job, open_job, open_workers
from lowprec.search.outcome import SearchOutcome, plan_file
from lowprec.search.record import RunRecord
from lowprec.search.study import propose
from lowprec.search.trial import Trial, pareto_front, plan_key
from lowprec.traffic import TrafficWindow

__all__ = ["run_search"]

# Plans evaluated together while sensitivities are measured; more would only hold more logits in memory.
SWAPS_AT_ONCE = 64


def run_search(config: Config, *, resume: str | None = None, progress: Progress | None = None) -> SearchOutcome:
    """Search as the config says and confirm the best plan; `resume` continues a run that was stopped or killed.

    Every wave is committed before the next begins, and a wave is a function of the trials before it: a resumed run does
    the same trials as one left alone. The best plan so far is always in the run's `plan.json`. `search.timeout_s` stops
    the waves; the confirmation still runs.
    """
    job = open_job(config)
    listener = progress or Silent()
    for note in notes_on(job):
        listener.note(note)
    record = RunRecord(job, resume)
    record.state("running")
    try:
        with open_workers(job) as workers:
            outcome = _Search(job, record, workers, listener).run()
    except KeyboardInterrupt:
        record.state("stopped", message="interrupted")
        listener.note(f"interrupted; go on with: lowprec search CONFIG --resume {record.run_id}")
        raise
    except Exception as error:
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
    def __init__(self, job: Job, record: RunRecord, workers: Workers, progress: Progress) -> None:
        self._job, self._record, self._workers, self._progress = job, record, workers, progress
        self._began = time.monotonic()
        self._window = job.window("search")
        self._confirm_window = job.window("confirm")  # opened first: an empty window must not cost a search
        self._plan_path = record.artifacts / "plan.json"
        progress.note(f"run {record.run_id}")

    def run(self) -> SearchOutcome:
        trials = self._waves(self._sensitivities())
        choices = finalists(trials, self._job.config.search.budget)
        if not choices:
            raise ModelError("search: no plan gives finite logits; look for huge weights in the checkpoint")
        if not choices[0].meets_budget:
            self._progress.note(f"no plan meets the budget of {self._job.config.search.budget} percent")
        confirmed = self._confirm(choices)
        best = recommended(confirmed)
        rows = {"search": trials[-1].rows, "confirm": confirmed[0].rows}
        for name in rows["confirm"].never_looked_up:
            self._progress.note(
                f"{name}: no row of it was looked up in the confirm window, which says nothing about it"
            )
        self._save(best.choice.trial, best)
        return SearchOutcome(
            run_id=self._record.run_id,
            best=best,
            finalists=tuple(confirmed),
            budget_pct=self._job.config.search.budget,
            front=tuple(pareto_front(trials)),
            num_trials=len(trials),
            fp32_bytes=self._job.space.fp32_bytes,
            rows=rows,
            plan_path=self._plan_path,
            windows={name: self._job.window_text(name) for name in ("search", "confirm")},
            seconds=time.monotonic() - self._began,
        )

    def _sensitivities(self) -> list[Sensitivity]:
        """Single swaps on a random sample of batches, or what the run measured before."""
        search = self._job.config.search
        evaluated_on = self._job.window_text("search")
        known = self._record.sensitivities(evaluated_on)
        swaps = single_swaps(self._job.space)
        if known or not swaps:
            return known
        order = np.random.default_rng(search.seed).permutation(self._window.num_batches)
        sample = [int(k) for k in order[: search.sensitivity_batches]]
        self._progress.stage("sensitivities", len(swaps))
        base = self._job.space.size_bytes(self._job.space.most_exact)
        found: list[Sensitivity] = []
        for first in range(0, len(swaps), SWAPS_AT_ONCE):
            part = swaps[first : first + SWAPS_AT_ONCE]
            evaluation = self._evaluate("search", self._window, [swap.plan for swap in part], batches=sample)
            found += [
                Sensitivity(s.decision, s.precision, base - self._job.space.size_bytes(s.plan), m)
                for s, m in zip(part, evaluation.metrics, strict=True)
            ]
            self._progress.advance(len(part))
        self._record.add_sensitivities(found, evaluated_on)
        return found

    def _waves(self, sensitivities: Sequence[Sensitivity]) -> list[Trial]:
        search = self._job.config.search
        trials = self._known_trials()
        self._progress.stage("trials", search.max_trials)
        self._progress.advance(len(trials))
        wave = trials[-1].wave if trials else 0
        while len(trials) < search.max_trials:
            if trials and search.timeout_s and time.monotonic() - self._began > search.timeout_s:
                self._progress.note(f"stopped by the time limit after {len(trials)} trials")
                break
            kind, plans = self._next_wave([t for t in trials if t.wave < wave], sensitivities, wave)
            if not plans:
                self._progress.note("there are no more plans to evaluate")
                break
            # A wave that the limit on trials cut short is made whole first.
            done = {trial.plan for trial in trials}
            plans = [plan for plan in plans if plan not in done]
            if plans:
                trials += self._wave(kind, wave, plans[: search.max_trials - len(trials)], len(trials))
                self._save_best(trials)
            wave += 1
        return trials

    def _known_trials(self) -> list[Trial]:
        trials = self._record.trials("exact")
        for trial in trials:
            if trial.key != self._key("search", self._window, trial.plan):
                raise self._record.changed(
                    f"the traffic of windows.search is not what trial {trial.number} was evaluated on; begin a new run"
                )
        return trials

    def _next_wave(
        self, before: Sequence[Trial], sensitivities: Sequence[Sensitivity], wave: int
    ) -> tuple[str, list[Plan]]:
        """The plans of a wave: nothing decides them but the config and the trials of the waves before."""
        search, space = self._job.config.search, self._job.space
        if not before:
            return "uniform", uniform_plans(space)
        if before[-1].kind == "uniform":
            known = {trial.plan for trial in before}
            path = greedy_path(space, sensitivities)
            plans = [p for p in plans_around_budget(path, search.budget, search.wave_size) if p not in known]
            if plans:
                return "greedy", plans
        seed = int(np.random.SeedSequence([search.seed, wave]).generate_state(1)[0])
        return "optuna", propose(space, before, count=search.wave_size, budget_pct=search.budget, seed=seed)

    def _wave(self, kind: str, wave: int, plans: Sequence[Plan], first: int) -> list[Trial]:
        evaluation = self._evaluate("search", self._window, plans)
        trials = self._trials("search", self._window, evaluation, range(first, first + len(plans)), wave, kind)
        self._record.add_trials(trials, evaluation="exact", window=self._job.window_text("search"))
        self._progress.advance(len(trials))
        return trials

    def _confirm(self, choices: Sequence[Choice]) -> list[Confirmed]:
        """Every finalist on the confirm window; those confirmed before a resumption are taken as they were found."""
        budget = self._job.config.search.budget
        found = {trial.plan: trial for trial in self._record.trials("confirm")}
        new = [choice.trial for choice in choices if choice.trial.plan not in found]
        if new:
            confidence = self._job.config.search.confidence
            if found:
                confidence = 1 - (1 - confidence) / (1 + len(found))
                self._progress.note(
                    f"{len(found)} plans of this run were confirmed on the same window before: new ones are held to "
                    f"{100 * confidence:.4g} percent confidence"
                )
            self._progress.stage("confirm", self._confirm_window.num_batches)
            evaluation = self._evaluate(
                "confirm",
                self._confirm_window,
                [trial.plan for trial in new],
                confidence=confidence,
                on_progress=self._progress.advance,
            )
            numbers = [trial.number for trial in new]
            trials = self._trials("confirm", self._confirm_window, evaluation, numbers, new[0].wave, "finalist")
            self._record.add_trials(trials, evaluation="confirm", window=self._job.window_text("confirm"))
            found |= {trial.plan: trial for trial in trials}
        return [
            Confirmed(
                c, found[c.trial.plan].metrics, found[c.trial.plan].metrics.verdict(budget), found[c.trial.plan].rows
            )
            for c in choices
        ]

    def _evaluate(
        self,
        name: str,
        window: TrafficWindow,
        plans: Sequence[Plan],
        *,
        batches: Sequence[int] | None = None,
        confidence: float | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Evaluation:
        return self._job.evaluate(
            self._workers,
            name,
            window,
            plans,
            quarantine=self._record.artifacts / "quarantine",
            batches=batches,
            confidence=confidence,
            on_progress=on_progress,
        )

    def _trials(
        self, name: str, window: TrafficWindow, evaluation: Evaluation, numbers: Sequence[int], wave: int, kind: str
    ) -> list[Trial]:
        return [
            Trial(
                key=self._key(name, window, plan),
                number=number,
                wave=wave,
                kind=kind,
                plan=plan,
                size_bytes=self._job.space.size_bytes(plan),
                metrics=metrics,
                rows=evaluation.rows,
            )
            for number, plan, metrics in zip(numbers, evaluation.plans, evaluation.metrics, strict=True)
        ]

    def _key(self, name: str, window: TrafficWindow, plan: Plan) -> str:
        return plan_key(self._job.checkpoint_sha256, self._job.evaluated_on(name, window), plan)

    def _save_best(self, trials: Sequence[Trial]) -> None:
        """Keep the safest finalist so far where a person finds it, with the evidence that there is."""
        choices = finalists(trials, self._job.config.search.budget)
        if choices:
            self._save(choices[0].trial, None)

    def _save(self, trial: Trial, confirmed: Confirmed | None) -> None:
        name = "confirm" if confirmed else "search"
        file = plan_file(
            self._job,
            trial,
            confirmed.metrics if confirmed else trial.metrics,
            run_id=self._record.run_id,
            kind="confirm" if confirmed else "exact",
            window=self._job.window_text(name),
            verdict=confirmed.verdict if confirmed else None,
        )
        write_plan(file, self._plan_path)
