"""The search: profile the window once, search its quadratic model, race a few plans exactly, confirm the best."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import numpy as np

from lowprec.config import Config
from lowprec.core.errors import ConfigError
from lowprec.core.progress import Progress, Silent
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.profile.profile_file import read_profile, write_profile
from lowprec.evaluation.race.race_sums import RaceSums
from lowprec.evaluation.rows import RowAccount
from lowprec.evaluation.stats.confidence import Interval
from lowprec.evaluation.workers.worker import Workers
from lowprec.models.uncovered import uncovered_parameters
from lowprec.plan import Forms, Plan, Precision, write_plan
from lowprec.search.confirm.alpha_spending import confidence_of_attempt
from lowprec.search.confirm.choice import finalists
from lowprec.search.confirm.confirm import Recommendation, confirm
from lowprec.search.job import SearchJob, open_job
from lowprec.search.proposals.waves import next_wave
from lowprec.search.race_policy import race
from lowprec.search.record.describe import describe_profile, notes_on
from lowprec.search.record.outcome import SearchOutcome, plan_file
from lowprec.search.record.record import RunRecord, on_same_traffic
from lowprec.search.record.trial import Trial, pareto_front, plan_key
from lowprec.search.rule import Forecast
from lowprec.search.slices import SLICE_EXAMPLES, race_tasks, slices_of
from lowprec.search.space.layer_forms import fitted_forms, num_passes
from lowprec.search.surrogate.sensitivity import Sensitivity, sensitivities, single_swaps
from lowprec.search.surrogate.surrogate import Surrogate, build_surrogate
from lowprec.session import open_workers
from lowprec.storage import Location, Where

__all__ = ["run_search"]

# Swaps raced together while sensitivities are sampled; more would only hold more logits in memory.
SWAPS_AT_ONCE = 64


def run_search(
    config: Config,
    *,
    resume: str | None = None,
    profile: Where | None = None,
    start: Plan | None = None,
    progress: Progress | None = None,
) -> SearchOutcome:
    """Search as the config says and confirm the best plans; `resume` continues a run that was stopped or killed.

    `profile` is the file of a profile of the same checkpoint, window and space, which then is not measured again.
    `start` is a plan to begin with, such as the one that was deployed on an earlier snapshot.
    Every wave is committed before the next begins, and a wave is a function of the profile and the trials before it: a
    resumed run does the same trials as one left alone. The best plan so far is always in the run's `plan.json`.
    `search.timeout_s` stops the waves; the confirmation still runs.
    """
    job = open_job(config if resume is None else on_same_traffic(config, resume))
    listener = progress or Silent()
    for note in notes_on(job):
        listener.note(note)
    # Read before the run begins: what is missing or of something else must cost no pass and leave no trace.
    job.search_costs({})
    if start is not None:
        job.space.check(start)
    record = RunRecord(job, resume, start=start)
    job = record.session
    given = None if profile is None else read_profile(profile, job.profile_origin("search"))
    with record.running(listener.note):
        if given is not None:
            write_profile(given, job.profile_origin("search"), record.profile_path)
        with open_workers(job, job.search_work(), listener.note) as workers:
            outcome = _Search(job, record, workers, listener).run()
        best = outcome.recommendations[0].best
        record.state(
            "done",
            message=best.choice.because,
            verdict=outcome.verdict,
            recommended_trial_key=best.choice.trial.key,
            summary_json=json.dumps(outcome.to_dict()),
        )
    return outcome


# What to do where the profile of a run that is resumed is not of its job.
_OTHER_TRAFFIC = "resume with the traffic, checkpoint and space that the run began with, or begin a new run"


class _Search:
    def __init__(self, job: SearchJob, record: RunRecord[SearchJob], workers: Workers, progress: Progress) -> None:
        self._job, self._record, self._workers, self._progress = job, record, workers, progress
        self._settings = job.config.search
        self._budgets = job.config.search.all_budgets
        self._began = time.monotonic()
        self._window = job.window("search")
        self._confirm_window = job.window("confirm")  # opened first: an empty window must not cost a search
        self._slices = slices_of(self._window)
        # The one random order in which slices are raced: plans of different waves meet on the same slices.
        self._order = [int(k) for k in np.random.default_rng(self._settings.seed).permutation(len(self._slices))]

    def run(self) -> SearchOutcome:
        self._use(self._kept_forms())
        self._known_trials()  # a resumption on other traffic ends here, before anything is measured
        surrogate = self._surrogate()
        self._sensitivities(surrogate)
        trials = self._waves(surrogate)
        num_spent = self._record.num_confirmations(self._job.window_text("confirm"))
        recommendations = confirm(
            trials,
            self._budgets,
            forecast=surrogate.forecast,
            found=self._record.trials("confirm"),
            confidence=self._settings.confidence,
            evaluate=lambda chosen, confidence, attempt: self._confirm(surrogate, chosen, confidence, attempt),
            note=self._progress.note,
            reference_cost=surrogate.costs.cost(Plan.uniform(self._job.units, Precision.FP32)),
            num_spent=num_spent,
        )
        rows = {"search": surrogate.measured.rows, "confirm": recommendations[0].best.rows}
        for name in rows["confirm"].never_looked_up:
            self._progress.note(
                f"{name}: no row of it was looked up in the confirm window, which says nothing about it"
            )
        return SearchOutcome(
            run_id=self._record.run_id,
            recommendations=tuple(recommendations),
            front=tuple(pareto_front(trials)),
            num_trials=len(trials),
            fp32_bytes=self._job.space.fp32_bytes,
            rows=rows,
            plan_paths=tuple(self._save(r.best.choice.trial, r.budget_pct, r) for r in recommendations),
            profile_path=self._record.profile_path,
            profiled=describe_profile(surrogate),
            windows={name: self._job.window_text(name) for name in ("search", "confirm")},
            row_ranges=self._job.spec.row_ranges,
            notes=tuple(
                n for r in recommendations for n in self._job.rows_without_form(self._workers, r.best.choice.trial.plan)
            ),
            seconds=time.monotonic() - self._began,
            confirm_days=self._confirm_window.num_days,
            by_group=self._job.config.traffic.group is not None,
            num_spent=num_spent,
            uncovered=uncovered_parameters(self._job.adapter),
        )

    def _surrogate(self) -> Surrogate:
        """The profile of the search window, measured or as the run has it, and its solved model."""
        path, origin = self._record.profile_path, self._job.profile_origin("search")
        if path.kind() == "file":
            measured = read_profile(path, origin, advice=_OTHER_TRAFFIC)
        else:
            self._use(self._fitted_forms())
            self._progress.stage("profile", self._window.num_batches)
            measured = self._job.measure_profile(
                self._workers,
                "search",
                self._window,
                quarantine=self._record.artifacts / "quarantine",
                on_progress=self._progress.advance,
            )
            self._record.keep_profile(measured, origin)
        costs = self._job.search_costs(measured.use)
        for note in costs.notes:
            self._progress.note(note)
        forecast = Forecast.of(
            confidence=confidence_of_attempt(self._settings.confidence, 0),
            num_search=self._window.num_rows,
            num_confirm=self._confirm_window.num_rows,
        )
        surrogate = build_surrogate(measured, self._job.space, costs, budgets=self._budgets, forecast=forecast)
        if surrogate.front.infeasible:
            raise ConfigError(f"search: {surrogate.front.infeasible}")
        return surrogate

    def _kept_forms(self) -> Forms:
        """The forms of layers that the run's profile is of."""
        if self._job.config.space.layers is None or self._record.profile_path.kind() != "file":
            return {}
        origin = self._job.profile_origin("search")
        return read_profile(self._record.profile_path, origin, advice=_OTHER_TRAFFIC).forms

    def _fitted_forms(self) -> Forms:
        """The forms of layers, calibrated on the search window."""
        layers = self._job.config.space.layers
        if layers is None:
            return {}
        space = self._job.space
        self._progress.stage("layers", num_passes(self._window, space, layers))
        return fitted_forms(
            self._workers,
            self._window,
            space,
            layers,
            batches_per_task=self._job.config.evaluation.batches_per_task,
            on_progress=self._progress.advance,
        )

    def _use(self, forms: Forms) -> None:
        """From here on layers have these forms."""
        if forms:
            self._job = self._job.with_forms(forms)

    def _sensitivities(self, surrogate: Surrogate) -> None:
        """What every choice does by itself; for people, the search does not need it."""
        window = self._job.window_text("search")
        swaps = single_swaps(self._job.space)
        if not swaps or self._record.has_sensitivities(window):
            return
        sample = self._order[: -(-self._settings.sensitivity_examples // SLICE_EXAMPLES)]
        self._progress.stage("sensitivities", len(swaps))
        sampled = []
        for first in range(0, len(swaps), SWAPS_AT_ONCE):
            part = swaps[first : first + SWAPS_AT_ONCE]
            sampled.append(self._lap(surrogate, [swap.plan for swap in part], sample))
            self._progress.advance(len(part))
        found: list[Sensitivity] = sensitivities(
            self._job.space,
            surrogate.profile,
            surrogate.first_order,
            swaps,
            sampled,
            confidence=self._settings.confidence,
        )
        self._record.add_sensitivities(found, window)

    def _waves(self, surrogate: Surrogate) -> list[Trial]:
        settings = self._settings
        trials = self._known_trials()
        self._progress.stage("trials", settings.max_trials)
        self._progress.advance(len(trials))
        wave = trials[-1].wave if trials else 0
        while len(trials) < settings.max_trials:
            if trials and settings.timeout_s and time.monotonic() - self._began > settings.timeout_s:
                self._progress.note(f"stopped by the time limit after {len(trials)} trials")
                break
            before = [t for t in trials if t.wave < wave]
            kind, plans = next_wave(surrogate, self._job.space, settings, before, wave, self._record.start)
            if not plans:
                self._progress.note("there are no more plans to evaluate")
                break
            # A wave that the limit on trials cut short is made whole first.
            done = {trial.plan for trial in trials}
            plans = [plan for plan in plans if plan not in done]
            if plans:
                plans = plans[: settings.max_trials - len(trials)]
                trials += self._wave(surrogate, kind, wave, plans, before, len(trials))
                self._save_best(surrogate, trials)
            wave += 1
        return trials

    def _known_trials(self) -> list[Trial]:
        trials = self._record.trials("exact")
        for trial in trials:
            if trial.key != self._key("search", trial.plan):
                raise self._record.changed(
                    f"the traffic of windows.search is not what trial {trial.number} was evaluated on; begin a new run"
                )
        return trials

    def _wave(
        self, surrogate: Surrogate, kind: str, wave: int, plans: Sequence[Plan], before: Sequence[Trial], first: int
    ) -> list[Trial]:
        corrections = surrogate.corrections_pct(plans)
        finishes = race(
            plans,
            [surrogate.costs.cost(plan) for plan in plans],
            lambda chosen, slices: self._lap(surrogate, chosen, slices),
            surrogate.profile,
            self._order,
            forecast=surrogate.forecast,
            corrections_pct=corrections.tolist(),
            rivals=before,
            budgets=self._budgets,
            confidence=self._settings.confidence,
        )
        promised = surrogate.promised_pct(plans)
        trials = [
            self._trial(
                surrogate,
                "search",
                f.plan,
                first + k,
                wave,
                kind,
                f.estimate.metrics,
                f.risk_on_window,
                surrogate.measured.rows,
                float(promised[k]),
                f.estimate.metrics.gap_pct + float(corrections[k]),
            )
            for k, f in enumerate(finishes)
        ]
        self._record.add_trials(trials, evaluation="exact", window=self._job.window_text("search"))
        self._progress.advance(len(trials))
        return trials

    def _lap(self, surrogate: Surrogate, plans: Sequence[Plan], slices: Sequence[int]) -> RaceSums:
        """Plans on slices of the search window, counted in its order."""
        name = f"{self._job.window_text('search')} {self._window.fingerprint}"
        tasks = race_tasks(
            plans,
            surrogate.profile.columns,
            [self._slices[k] for k in sorted(slices)],
            keep=name,
            forms=self._job.forms,
        )
        total: RaceSums | None = None
        for chunk in self._workers.run(self._window, tasks):
            total = chunk.sums if total is None else total + chunk.sums
        assert total is not None, "a lap has at least one slice"
        return total

    def _confirm(self, surrogate: Surrogate, chosen: Sequence[Trial], confidence: float, attempt: int) -> list[Trial]:
        """The trials of plans on the whole confirm window, committed as one try."""
        self._progress.stage("confirm", self._confirm_window.num_batches)
        evaluation = self._job.evaluate(
            self._workers,
            "confirm",
            self._confirm_window,
            [trial.plan for trial in chosen],
            quarantine=self._record.artifacts / "quarantine",
            confidence=confidence,
            on_progress=self._progress.advance,
        )
        trials = [
            self._trial(
                surrogate,
                "confirm",
                trial.plan,
                trial.number,
                attempt,
                "finalist",
                metrics,
                None,
                evaluation.rows,
                trial.promised_pct,
            )
            for trial, metrics in zip(chosen, evaluation.metrics, strict=True)
        ]
        self._record.add_trials(trials, evaluation="confirm", window=self._job.window_text("confirm"))
        return trials

    def _trial(
        self,
        surrogate: Surrogate,
        name: str,
        plan: Plan,
        number: int,
        wave: int,
        kind: str,
        metrics: PlanMetrics,
        risk_on_window: Interval | None,
        rows: RowAccount,
        promised_pct: float | None,
        expected_pct: float | None = None,
    ) -> Trial:
        return Trial(
            key=self._key(name, plan),
            number=number,
            wave=wave,
            kind=kind,
            plan=plan,
            size_bytes=self._job.space.size_bytes(plan),
            latency_ns=surrogate.costs.plan_latency_ns(plan),
            cost=surrogate.costs.cost(plan),
            promised_pct=promised_pct,
            metrics=metrics,
            risk_on_window=risk_on_window,
            rows=rows,
            expected_pct=expected_pct,
        )

    def _key(self, name: str, plan: Plan) -> str:
        window = self._window if name == "search" else self._confirm_window
        return plan_key(self._job.checkpoint_sha256, self._job.evaluated_on(name, window), plan)

    def _save_best(self, surrogate: Surrogate, trials: Sequence[Trial]) -> None:
        """Keep the safest finalists so far where a person finds them, with the evidence that there is."""
        for budget in self._budgets:
            choices = finalists(trials, budget, surrogate.forecast)
            if choices:
                self._save(choices[0].trial, budget, None)

    def _save(self, trial: Trial, budget: float, confirmed: Recommendation | None) -> Location:
        name = "confirm" if confirmed else "search"
        file = plan_file(
            self._job,
            trial,
            confirmed.best.metrics if confirmed else trial.metrics,
            run_id=self._record.run_id,
            kind="confirm" if confirmed else "exact",
            window=self._job.window_text(name),
            budget_pct=budget,
            verdict=confirmed.verdict if confirmed else None,
        )
        path = self._record.artifacts / ("plan.json" if len(self._budgets) == 1 else f"plan-{budget:g}.json")
        write_plan(file, path)
        return path
