"""The search: profile the window once, search its quadratic model, race a few plans exactly, confirm the best."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace

from lowprec.config import Config
from lowprec.core.errors import ConfigError
from lowprec.core.progress import Progress, Silent
from lowprec.evaluation.profile.profile_file import read_profile, write_profile
from lowprec.evaluation.profile.window_profile import MeasuredProfile
from lowprec.models.uncovered import uncovered_parameters
from lowprec.plan import Forms, Plan, Precision
from lowprec.search.confirm.alpha_spending import confidence_of_attempt
from lowprec.search.confirm.confirm import Recommendation, Tries, confirm
from lowprec.search.job import open_job
from lowprec.search.raced_window import RacedWindow
from lowprec.search.record.describe import describe_profile, notes_on
from lowprec.search.record.outcome import SearchOutcome
from lowprec.search.record.record import RunRecord, on_same_traffic
from lowprec.search.record.trial import Trial, pareto_front, trial_keys
from lowprec.search.rule import Forecast
from lowprec.search.space.layer_forms import fitted_forms, num_passes
from lowprec.search.surrogate.sensitivity import Sensitivity, sensitivities, single_swaps
from lowprec.search.surrogate.surrogate import Surrogate, build_surrogate
from lowprec.search.trials import SearchRun, known_trials, run_waves, save_plan
from lowprec.session import open_workers
from lowprec.storage import AnyPath

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
            outcome = _search(SearchRun(job, record, workers, listener))
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


def _search(begun: SearchRun) -> SearchOutcome:
    begun.job.window("confirm")  # opened first: an empty window must not cost a search
    run = replace(begun, job=begun.job.with_forms(_kept_forms(begun)))
    known_trials(run)  # a resumption on other traffic ends here, before anything is measured
    measured = _kept_profile(run)
    if measured is None:
        run = replace(run, job=run.job.with_forms(_fitted_forms(run)))
        measured = _measured_profile(run)
    surrogate = _solved(run, measured)
    raced = _raced_window(run)
    _add_sensitivities(run, surrogate, raced)
    trials = run_waves(run, surrogate, raced)
    num_spent = run.record.num_confirmations(run.job.window_text("confirm"))
    recommendations = _confirmed(run, surrogate, trials, num_spent)
    return _outcome(run, surrogate, trials, recommendations, num_spent)


def _kept_forms(run: SearchRun) -> Forms:
    """The forms of layers that the run's profile is of."""
    if run.job.config.space.layers is None:
        return {}
    kept = _kept_profile(run)
    return {} if kept is None else kept.forms


def _kept_profile(run: SearchRun) -> MeasuredProfile | None:
    """The profile of the search window that the run has already, None where it has to be measured."""
    path = run.record.profile_path
    if path.kind() != "file":
        return None
    return read_profile(path, run.job.profile_origin("search"), advice=_OTHER_TRAFFIC)


def _fitted_forms(run: SearchRun) -> Forms:
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


def _measured_profile(run: SearchRun) -> MeasuredProfile:
    """The profile of the search window, measured and kept."""
    window = run.job.window("search")
    run.progress.stage("profile", window.num_batches)
    measured = run.job.measure_profile(
        run.workers, "search", window, quarantine=run.quarantine, on_progress=run.progress.advance
    )
    run.record.keep_profile(measured, run.job.profile_origin("search"))
    return measured


def _solved(run: SearchRun, measured: MeasuredProfile) -> Surrogate:
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


def _raced_window(run: SearchRun) -> RacedWindow:
    window = run.job.window("search")
    return RacedWindow.of(
        window,
        run.workers,
        seed=run.settings.seed,
        name=f"{run.job.window_text('search')} {window.fingerprint}",
        columns=run.job.columns,
        forms=run.job.forms,
    )


def _add_sensitivities(run: SearchRun, surrogate: Surrogate, raced: RacedWindow) -> None:
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


def _confirmed(run: SearchRun, surrogate: Surrogate, trials: Sequence[Trial], num_spent: int) -> list[Recommendation]:
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


def _add_try(run: SearchRun, chosen: Sequence[Trial], confidence: float, attempt: int) -> list[Trial]:
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
    run: SearchRun,
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
        plan_paths=tuple(save_plan(run, r.best.choice.trial, r.budget_pct, r) for r in recommendations),
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
