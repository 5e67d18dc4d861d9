"""The search: profile the window once, search its quadratic model, race a few plans exactly, confirm the best."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lowprec.config import Config, SearchConfig
from lowprec.core.errors import ConfigError
from lowprec.core.progress import Progress, Silent
from lowprec.evaluation.profile.profile_file import read_profile, write_profile
from lowprec.evaluation.profile.window_profile import MeasuredProfile
from lowprec.evaluation.workers.worker import Workers
from lowprec.models.uncovered import uncovered_parameters
from lowprec.plan import Forms, Plan, Precision, write_plan
from lowprec.search.confirm.alpha_spending import confidence_of_attempt
from lowprec.search.confirm.choice import finalists
from lowprec.search.confirm.confirm import Recommendation, Tries, confirm
from lowprec.search.job import SearchJob, open_job
from lowprec.search.proposals.waves import next_wave
from lowprec.search.race_policy import Finish, race
from lowprec.search.raced_window import RacedWindow
from lowprec.search.record.describe import describe_profile, notes_on
from lowprec.search.record.outcome import SearchOutcome, plan_file
from lowprec.search.record.record import RunRecord, on_same_traffic
from lowprec.search.record.trial import Trial, pareto_front, trial_keys
from lowprec.search.rule import Forecast
from lowprec.search.space.layer_forms import fitted_forms, num_passes
from lowprec.search.surrogate.sensitivity import Sensitivity, sensitivities, single_swaps
from lowprec.search.surrogate.surrogate import Surrogate, build_surrogate
from lowprec.session import open_workers
from lowprec.storage import AnyPath, Location

__all__ = ["run_search"]

# Swaps raced together while sensitivities are sampled; more would only hold more logits in memory.
SWAPS_AT_ONCE = 64


def run_search(
    config: Config,
    *,
    resume: str | None = None,
    profile: AnyPath | None = None,
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
            outcome = _search(_Run(job, record, workers, listener))
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


@dataclass(frozen=True)
class _Run:
    """What every step of a search has at hand. The job has the forms of layers once they are known."""

    job: SearchJob
    record: RunRecord[SearchJob]
    workers: Workers
    progress: Progress
    began: float = field(default_factory=time.monotonic)

    @property
    def settings(self) -> SearchConfig:
        return self.job.config.search

    @property
    def quarantine(self) -> Location:
        return self.record.artifacts / "quarantine"

    @property
    def is_over(self) -> bool:
        """Whether the time for waves is over."""
        limit = self.settings.timeout_s
        return limit is not None and time.monotonic() - self.began > limit


def _search(begun: _Run) -> SearchOutcome:
    begun.job.window("confirm")  # opened first: an empty window must not cost a search
    run = replace(begun, job=begun.job.with_forms(_kept_forms(begun)))
    _known_trials(run)  # a resumption on other traffic ends here, before anything is measured
    measured = _kept_profile(run)
    if measured is None:
        run = replace(run, job=run.job.with_forms(_fitted_forms(run)))
        measured = _measured_profile(run)
    surrogate = _solved(run, measured)
    raced = _raced_window(run)
    _add_sensitivities(run, surrogate, raced)
    trials = _waves(run, surrogate, raced)
    num_spent = run.record.num_confirmations(run.job.window_text("confirm"))
    recommendations = _confirmed(run, surrogate, trials, num_spent)
    return _outcome(run, surrogate, trials, recommendations, num_spent)


def _kept_forms(run: _Run) -> Forms:
    """The forms of layers that the run's profile is of."""
    if run.job.config.space.layers is None:
        return {}
    kept = _kept_profile(run)
    return {} if kept is None else kept.forms


def _kept_profile(run: _Run) -> MeasuredProfile | None:
    """The profile of the search window that the run has already, None where it has to be measured."""
    path = run.record.profile_path
    if path.kind() != "file":
        return None
    return read_profile(path, run.job.profile_origin("search"), advice=_OTHER_TRAFFIC)


def _fitted_forms(run: _Run) -> Forms:
    """The forms of layers, calibrated on the search window."""
    layers, window = run.job.config.space.layers, run.job.window("search")
    if layers is None:
        return {}
    run.progress.stage("layers", num_passes(window, run.job.space, layers))
    return fitted_forms(
        run.workers,
        window,
        run.job.space,
        layers,
        batches_per_task=run.job.config.evaluation.batches_per_task,
        on_progress=run.progress.advance,
    )


def _measured_profile(run: _Run) -> MeasuredProfile:
    """The profile of the search window, measured and kept."""
    window = run.job.window("search")
    run.progress.stage("profile", window.num_batches)
    measured = run.job.measure_profile(
        run.workers, "search", window, quarantine=run.quarantine, on_progress=run.progress.advance
    )
    run.record.keep_profile(measured, run.job.profile_origin("search"))
    return measured


def _solved(run: _Run, measured: MeasuredProfile) -> Surrogate:
    """The solved quadratic model of a profile."""
    costs = run.job.search_costs(measured.use)
    for note in costs.notes:
        run.progress.note(note)
    forecast = Forecast.of(
        confidence=confidence_of_attempt(run.settings.confidence, 0),
        num_search=run.job.window("search").num_rows,
        num_confirm=run.job.window("confirm").num_rows,
    )
    budgets = run.settings.all_budgets
    surrogate = build_surrogate(measured, run.job.space, costs, budgets=budgets, forecast=forecast)
    if surrogate.front.infeasible:
        raise ConfigError(f"search: {surrogate.front.infeasible}")
    return surrogate


def _raced_window(run: _Run) -> RacedWindow:
    window = run.job.window("search")
    return RacedWindow.of(
        window,
        run.workers,
        seed=run.settings.seed,
        name=f"{run.job.window_text('search')} {window.fingerprint}",
        columns=run.job.columns,
        forms=run.job.forms,
    )


def _add_sensitivities(run: _Run, surrogate: Surrogate, raced: RacedWindow) -> None:
    """What every choice does by itself; for people, the search does not need it."""
    window = run.job.window_text("search")
    swaps = single_swaps(run.job.space)
    if not swaps or run.record.has_sensitivities(window):
        return
    sample = raced.sample(run.settings.sensitivity_examples)
    run.progress.stage("sensitivities", len(swaps))
    sampled = []
    for first in range(0, len(swaps), SWAPS_AT_ONCE):
        part = swaps[first : first + SWAPS_AT_ONCE]
        sampled.append(raced.lap([swap.plan for swap in part], sample))
        run.progress.advance(len(part))
    found: list[Sensitivity] = sensitivities(
        run.job.space,
        surrogate.profile,
        surrogate.first_order,
        swaps,
        sampled,
        confidence=run.settings.confidence,
    )
    run.record.add_sensitivities(found, window)


def _waves(run: _Run, surrogate: Surrogate, raced: RacedWindow) -> list[Trial]:
    """All trials on the search window: those that the run has already, and wave after wave of new ones."""
    settings = run.settings
    trials = _known_trials(run)
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
            new = _raced(run, surrogate, raced, plans, before)
            trials += _add_wave(run, surrogate, new, wave, kind, first=len(trials))
            _save_best(run, surrogate, trials)
        wave += 1
    return trials


def _known_trials(run: _Run) -> list[Trial]:
    """The trials that the run has already; raises `ConfigError` where the search window is another one now."""
    trials, key = run.record.trials("exact"), trial_keys(run.job, "search")
    for trial in trials:
        if trial.key != key(trial.plan):
            raise run.record.changed(
                f"the traffic of windows.search is not what trial {trial.number} was evaluated on; begin a new run"
            )
    return trials


def _raced(
    run: _Run, surrogate: Surrogate, raced: RacedWindow, plans: Sequence[Plan], before: Sequence[Trial]
) -> list[Finish]:
    """Where each of the plans stopped in a race on the search window."""
    return race(
        plans,
        [surrogate.costs.cost(plan) for plan in plans],
        raced.lap,
        surrogate.profile,
        raced.order,
        forecast=surrogate.forecast,
        corrections_pct=surrogate.corrections_pct(plans).tolist(),
        rivals=before,
        budgets=run.settings.all_budgets,
        confidence=run.settings.confidence,
    )


def _add_wave(
    run: _Run, surrogate: Surrogate, finishes: Sequence[Finish], wave: int, kind: str, *, first: int
) -> list[Trial]:
    """The trials of a wave, numbered from `first`, committed at once."""
    plans, key = [finish.plan for finish in finishes], trial_keys(run.job, "search")
    promised, corrections = surrogate.promised_pct(plans), surrogate.corrections_pct(plans)
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
            expected_pct=finish.estimate.metrics.gap_pct + float(corrections[k]),
        )
        for k, finish in enumerate(finishes)
    ]
    run.record.add_trials(trials, evaluation="exact", window=run.job.window_text("search"))
    run.progress.advance(len(trials))
    return trials


def _confirmed(run: _Run, surrogate: Surrogate, trials: Sequence[Trial], num_spent: int) -> list[Recommendation]:
    """The recommended plan for each budget, confirmed on the whole confirm window.

    num_spent: tries of other runs on that window.
    """
    tries = Tries(
        lambda chosen, confidence, attempt: _add_try(run, chosen, confidence, attempt),
        confidence=run.settings.confidence,
        found=run.record.trials("confirm"),
        num_spent=num_spent,
    )
    return confirm(
        trials,
        run.settings.all_budgets,
        surrogate.forecast,
        tries,
        note=run.progress.note,
        reference_cost=surrogate.costs.cost(Plan.uniform(run.job.units, Precision.FP32)),
    )


def _add_try(run: _Run, chosen: Sequence[Trial], confidence: float, attempt: int) -> list[Trial]:
    """The trials of plans on the whole confirm window, committed as one try."""
    window, key = run.job.window("confirm"), trial_keys(run.job, "confirm")
    run.progress.stage("confirm", window.num_batches)
    evaluation = run.job.evaluate(
        run.workers,
        "confirm",
        window,
        [trial.plan for trial in chosen],
        quarantine=run.quarantine,
        confidence=confidence,
        on_progress=run.progress.advance,
    )
    trials = [
        replace(
            trial,
            key=key(trial.plan),
            wave=attempt,
            kind="finalist",
            metrics=metrics,
            risk_on_window=None,
            rows=evaluation.rows,
            expected_pct=None,
        )
        for trial, metrics in zip(chosen, evaluation.metrics, strict=True)
    ]
    run.record.add_trials(trials, evaluation="confirm", window=run.job.window_text("confirm"))
    return trials


def _outcome(
    run: _Run,
    surrogate: Surrogate,
    trials: Sequence[Trial],
    recommendations: Sequence[Recommendation],
    num_spent: int,
) -> SearchOutcome:
    """What the search found, with a plan file for each recommendation."""
    job, confirm_window = run.job, run.job.window("confirm")
    rows = {"search": surrogate.measured.rows, "confirm": recommendations[0].best.rows}
    for name in rows["confirm"].never_looked_up:
        run.progress.note(f"{name}: no row of it was looked up in the confirm window, which says nothing about it")
    plans = [r.best.choice.trial.plan for r in recommendations]
    return SearchOutcome(
        run_id=run.record.run_id,
        recommendations=tuple(recommendations),
        front=tuple(pareto_front(trials)),
        num_trials=len(trials),
        fp32_bytes=job.storage.fp32_bytes,
        rows=rows,
        plan_paths=tuple(_save(run, r.best.choice.trial, r.budget_pct, r) for r in recommendations),
        profile_path=run.record.profile_path,
        profiled=describe_profile(surrogate),
        windows={name: job.window_text(name) for name in ("search", "confirm")},
        row_ranges=job.spec.row_ranges,
        notes=tuple(note for plan in plans for note in job.rows_without_form(run.workers, plan)),
        seconds=time.monotonic() - run.began,
        confirm_days=confirm_window.num_days,
        by_group=job.config.traffic.group is not None,
        num_spent=num_spent,
        uncovered=uncovered_parameters(job.adapter),
    )


def _save_best(run: _Run, surrogate: Surrogate, trials: Sequence[Trial]) -> None:
    """Keep the safest finalists so far where a person finds them, with the evidence that there is."""
    for budget in run.settings.all_budgets:
        choices = finalists(trials, budget, surrogate.forecast)
        if choices:
            _save(run, choices[0].trial, budget, None)


def _save(run: _Run, trial: Trial, budget: float, confirmed: Recommendation | None) -> Location:
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
