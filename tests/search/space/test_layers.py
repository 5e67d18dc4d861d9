"""Layers in the search: their forms are fitted, they join profile, plans and bytes, and everything that follows."""

import json
from dataclasses import replace

import numpy as np
import pytest

import lowprec
from lowprec.config import load_config
from lowprec.config.sections import ResultsConfig
from lowprec.core.errors import ConfigError, PlanError
from lowprec.evaluation.evaluate import evaluate_plans
from lowprec.evaluation.workers.worker import LocalWorkers
from lowprec.gate import verify_plan
from lowprec.latency.calibration import Calibration, LatencyPoint, LayerPoint
from lowprec.latency.calibration_file import read_calibration, write_calibration
from lowprec.latency.measure import calibrate
from lowprec.models.adapter import inputs_of
from lowprec.models.called import layer_rows
from lowprec.monitor import run_monitor
from lowprec.ops.timing import default_grid
from lowprec.plan import TABLE_PRECISIONS, Plan, Precision, read_plan
from lowprec.plan.layer_form import Arithmetic, FloatFormat, LayerForm
from lowprec.search import open_job, run_search
from lowprec.search.record.describe import what_to_time
from lowprec.search.space.layer_forms import fitted_forms, forms_beside
from lowprec.session import open_workers

LAYERS = "space.layers=[fp32, fp16, bf16, int8_dynamic, int8_static]"
# The model is so small that at one budget its tables leave nothing over for its layers.
ONLY_LAYERS = 'space.units=[{match: "table:*", fixed: fp16}]'
NAMES = ["layer:bottom.0", "layer:bottom.2", "layer:top.0", "layer:top.2"]
INT8 = {Precision.INT8_DYNAMIC, Precision.INT8_STATIC}


def units_of(outcome):
    """The units of a plan file, with their forms."""
    return json.loads(outcome.plan_paths[0].read_bytes())["units"]


def fitted(config, job=None):
    job = job or open_job(config)
    workers = LocalWorkers(job.spec, job.adapter)
    forms = fitted_forms(workers, job.window("search"), job.space, config.space.layers, batches_per_task=2)
    return job, workers, forms


def test_layers_are_units_where_the_config_says_so(small_config):
    assert [u.name for u in open_job(small_config()).units if u.is_layer] == []
    job = open_job(small_config(LAYERS, 'space.units=[{match: "layer:top.2", fixed: fp32}]'))
    assert [u.name for u in job.units if u.is_layer] == NAMES
    choices = {d.name: [str(p) for p in d.choices] for d in job.space.decisions}
    # bf16 has the bytes of fp16 and fewer digits; which int8 is better is not known before it is measured.
    assert choices["layer:top.0"] == ["fp32", "fp16", "int8_dynamic", "int8_static"]
    assert choices["layer:top.2"] == ["fp32"] and "int4" in choices["table:c0"]
    assert {(d.name, d.precision) for d in job.space.dominated} >= {("layer:top.0", Precision.BF16)}


def test_forms_cover_what_plans_may_choose_and_are_the_best_of_those_tried(small_config):
    config = small_config(LAYERS)
    job, workers, forms = fitted(config)
    choices = {u: d.choices for d in job.space.decisions for u in d.units}
    assert forms.keys() == {(n, p) for n in NAMES for p in INT8 if p in choices[n]}
    assert all(form.is_static == (p is Precision.INT8_STATIC) for (_, p), form in forms.items())
    reference = Plan.uniform(job.units, Precision.FP32)

    def divergence(unit, precision, form):
        plan = reference.replace({unit: precision})
        found = evaluate_plans(
            workers,
            job.window("search"),
            [plan],
            forms={(unit, precision): form},
            confidence=0.95,
            batches_per_task=4,
        )
        return found.metrics[0].kl_pct

    for weights in ("channel", "tensor"):
        narrow = small_config(
            f"space.layers={{precisions: [fp32, int8_dynamic, int8_static], weights: [{weights}], ranges: [minmax]}}"
        )
        for (unit, precision), form in fitted(narrow, job)[2].items():
            assert form.weights == weights
            assert divergence(unit, precision, forms[unit, precision]) <= 1.1 * divergence(unit, precision, form)


def test_a_search_gives_layers_precisions_and_what_follows_reproduces_them(small_config, tmp_path):
    config = small_config(LAYERS, ONLY_LAYERS, "search.budget=2")  # enough also where inputs have 7 bits
    outcome = run_search(config)
    trial = outcome.recommendations[0].best.choice.trial
    # The first layer has three inputs and the last one output: scales and outliers take the bytes that int8 saves.
    assert [trial.plan[name] in INT8 for name in NAMES] == [False, True, True, False]
    assert outcome.verdict == "certified"
    job = open_job(config)
    path = outcome.plan_paths[0]
    file = read_plan(path, units=job.units, checkpoint_sha256=job.checkpoint_sha256)
    assert set(file.layer_forms) == set(NAMES[1:3])
    assert all(isinstance(form, LayerForm) for form in file.layer_forms.values())
    assert file.size_bytes == job.space.size_bytes(file.plan) < job.space.fp32_bytes / 2
    verified = verify_plan(config, path)
    assert verified.metrics.gap_pct == outcome.recommendations[0].best.metrics.gap_pct
    assert verified.metrics.kl_pct == outcome.recommendations[0].best.metrics.kl_pct > 0
    found = lowprec.query("SELECT * FROM sensitivities WHERE unit LIKE 'layer:%'", config.results.root)
    assert set(found["unit"]) == set(NAMES) and set(found["precision"]) == {"fp16", "int8_dynamic", "int8_static"}
    # Seen from another config, the plan does not fit: it names layers that are no units there.
    with pytest.raises(PlanError, match="does not know layer:bottom.0"):
        verify_plan(small_config(), path)


def test_a_resumed_search_has_the_forms_of_its_profile(small_config, monkeypatch):
    config = small_config(LAYERS, ONLY_LAYERS)
    alone = run_search(config)
    short = run_search(small_config(LAYERS, ONLY_LAYERS, "search.max_trials=5"))

    def never(*_args, **_kwargs):
        raise AssertionError("forms are fitted again")

    monkeypatch.setattr("lowprec.search.search_run.fitted_forms", never)
    resumed = run_search(config, resume=short.run_id)
    assert units_of(resumed) == units_of(alone)
    sql = "SELECT plan_json, metrics_json FROM trials WHERE evaluation = 'exact' AND run_id = '{}' ORDER BY number"
    both = [lowprec.query(sql.format(run.run_id), config.results.root).to_dict("list") for run in (alone, resumed)]
    assert both[0] == both[1]
    # The profile of one run serves another one, with the forms that it is of.
    again = run_search(config, profile=alone.profile_path)
    assert again.recommendations[0].best.choice.trial.plan == alone.recommendations[0].best.choice.trial.plan


def test_the_proxy_of_layers_and_tables_together_agrees_with_what_is_exact(small_config, tmp_path):
    config = small_config(LAYERS, "cost.max_bytes=1000000000")
    job, workers, forms = fitted(config)
    job = job.with_forms(forms)
    profile = job.measure_profile(workers, "search", job.window("search"), quarantine=tmp_path).profile
    rng = np.random.default_rng(0)
    choices = {unit: d.choices for d in job.space.decisions for unit in d.units}
    plans = [Plan({u: c[rng.integers(len(c))] for u, c in choices.items()}) for _ in range(30)]
    exact = evaluate_plans(
        workers, job.window("search"), plans, forms=forms, confidence=0.95, batches_per_task=4
    ).metrics
    _, kl = profile.gaps_pct(profile.selected(plans))
    assert np.corrcoef(kl, [m.kl_pct for m in exact])[0, 1] > 0.995


def test_two_ray_workers_find_what_this_process_finds(small_config, tmp_path):
    config = small_config(LAYERS, ONLY_LAYERS, "search.max_trials=8")
    remote = small_config(LAYERS, ONLY_LAYERS, "search.max_trials=8", "evaluation.num_workers=2")
    remote = remote.model_copy(update={"results": ResultsConfig(root=str(tmp_path / "remote"))})
    here, there = run_search(config), run_search(remote)
    assert units_of(there) == units_of(here)
    assert there.recommendations[0].best.metrics == here.recommendations[0].best.metrics


def test_an_accelerator_is_emulated_as_it_is_described(small_config):
    config = small_config(
        "space.layers={precisions: [fp32, emulated], arithmetic: {accumulate: fp16, block: 4}}", "search.max_trials=6"
    )
    job = open_job(config)
    with open_workers(job, job.search_work()) as workers:
        window = job.window("confirm")
        arithmetic = Arithmetic(accumulate=FloatFormat.FP16, block=4)
        forms = fitted_forms(workers, window, job.space, config.space.layers, batches_per_task=2)
        assert forms == {(name, Precision.EMULATED): arithmetic for name in NAMES}
        plan = Plan.uniform(job.units, Precision.FP32).replace(dict.fromkeys(NAMES, Precision.EMULATED))
        (found,) = evaluate_plans(workers, window, [plan], forms=forms, confidence=0.95, batches_per_task=8).metrics
    assert 0 < found.kl_pct < 0.01
    outcome = run_search(config)
    file = read_plan(outcome.plan_paths[0], units=job.units, checkpoint_sha256=None)
    assert file.layer_forms == {name: arithmetic for name in NAMES if file.plan[name] is Precision.EMULATED}


def test_a_plan_with_layers_is_watched_and_layers_have_their_share(small_config, tmp_path):
    config = small_config(
        LAYERS,
        ONLY_LAYERS,
        "windows.search={start: 2026-01-05, end: 2026-01-07}",
        "windows.confirm={start: 2026-01-07, end: 2026-01-08}",
        "monitor.end=2026-01-10",
        "search.max_trials=8",
    )
    outcome = run_search(config)
    found = run_monitor(config, outcome.plan_paths[0])
    assert len(found.windows) == 2
    for window in found.windows:
        units = {share["unit"]: share for share in window["units"]}
        assert {u for u in units if u.startswith("layer:")} and window["kl_pct"] > 0
    # What the layers do is nearly all that happens: tables are fp16.
    rows = lowprec.query("SELECT units_json, kl_pct FROM monitor_windows", config.results.root)
    for units, kl in zip(rows["units_json"], rows["kl_pct"], strict=True):
        of_layers = sum(share["kl_pct"] for share in json.loads(units) if share["unit"].startswith("layer:"))
        assert of_layers == pytest.approx(kl, rel=0.2)


def test_a_calibrated_form_has_one_beside_it_that_is_not(small_config):
    static = LayerForm(input_scale=0.1, input_zero_point=3)
    found = forms_beside({("layer:a", Precision.INT8_STATIC): static, ("layer:b", Precision.EMULATED): Arithmetic()})
    assert found["layer:a", Precision.INT8_DYNAMIC] == LayerForm() and len(found) == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("space.layers=[fp32, int4]", "int4 is not among fp32, fp16, bf16"),
        ("space.precisions=[bf16]", "bf16 is not among fp32, fp16, int8"),
        ("space.layers=[emulated]", "emulated and arithmetic come together"),
        ("space.layers={precisions: [fp32], arithmetic: {block: 4}}", "emulated and arithmetic come together"),
        ("space.layers={precisions: [fp32], input_bits: 6}", "space.layers.input_bits"),
    ],
)
def test_what_layers_cannot_be_is_refused(small_config, override, said):
    with pytest.raises(ConfigError, match=said):
        small_config(override)


def test_a_rule_for_units_that_cannot_have_it_is_refused(small_config):
    config = small_config(LAYERS, 'space.units=[{match: "*", fixed: int4}]')
    with pytest.raises(ConfigError, match=r"space.units\[0\]: layer:bottom.0 cannot be int4; a layer can be fp32"):
        open_job(config)


def test_a_model_without_layers_says_so(small_config, tmp_path, monkeypatch):
    monkeypatch.setattr("lowprec.models.layers.LayerModules.units", ())
    with pytest.raises(ConfigError, match="space.layers: the model has no nn.Linear"):
        open_job(small_config(LAYERS))


def test_a_config_with_layers_survives_being_written(small_config, tmp_path):
    config = small_config("space.layers={precisions: [fp32, emulated], arithmetic: {accumulate: bf16}}")
    path = tmp_path / "again.yaml"
    path.write_text(config.to_json())
    assert load_config(path) == config


def calibrated(job, path, ns):
    """A calibration in which layers take the nanoseconds a row that `ns` says, and lookups next to nothing."""
    points = tuple(
        LatencyPoint(p, 8, rows, pooling, 0.01 * pooling, 0.1)
        for p in TABLE_PRECISIONS
        for rows in (10, 10_000)
        for pooling in (1, 4)
    )
    shapes = {(unit.num_rows, unit.dim) for unit in job.adapter.layers.units}
    layers = tuple(LayerPoint(p, *shape, 1024, t, 0.1) for p, t in ns.items() for shape in shapes)
    write_calibration(Calibration(points, {}, layers), path)
    return f"cost.calibration={path}"


NS = {
    Precision.FP32: 100.0,
    Precision.FP16: 80.0,
    Precision.BF16: 50.0,
    Precision.INT8_DYNAMIC: 60.0,
    Precision.INT8_STATIC: 70.0,
}


def test_by_latency_layers_take_the_fastest_precision_that_the_budget_allows(small_config, tmp_path):
    """A machine on which bf16 is fastest; by its bytes it would be no choice at all."""
    job = open_job(small_config(LAYERS))
    calibration = calibrated(job, tmp_path / "calibration.json", NS)
    config = small_config(LAYERS, calibration, "cost.minimize=latency", "search.budget=5", "search.max_trials=12")
    trial = run_search(config).recommendations[0].best.choice.trial
    assert {trial.plan[name] for name in NAMES} == {Precision.BF16}
    tables = sum(0.01 for name in trial.plan if name.startswith("table:"))
    assert trial.latency_ns == pytest.approx(4 * 50.0 + tables, rel=0.01)


def test_a_layer_that_was_not_measured_says_how_to_measure_it(small_config, tmp_path):
    job = open_job(small_config(LAYERS))
    calibration = calibrated(job, tmp_path / "calibration.json", {Precision.FP32: 1.0})
    with pytest.raises(ConfigError, match="no time of a layer of .* at fp16; run `lowprec calibrate --config CONFIG`"):
        run_search(small_config(LAYERS, calibration, "cost.minimize=latency"))
    emulated = "space.layers={precisions: [fp32, emulated], arithmetic: {block: 4}}"
    with pytest.raises(ConfigError, match="may be emulated, and what that takes on the machine .* is not known"):
        run_search(small_config(emulated, calibration, "cost.minimize=latency"))


def test_every_layer_of_a_dlrm_gets_a_row_for_each_example(small_config):
    job = open_job(small_config(LAYERS))
    inputs = inputs_of(job.window("search").batch(0))
    assert layer_rows(job.adapter, inputs) == dict.fromkeys(NAMES, 1.0)


def test_the_layers_of_a_config_are_measured_and_read_back(small_config, tmp_path):
    config = small_config(LAYERS)
    dims, layers = what_to_time(config, config.traffic.batch_size)
    job = open_job(config)
    assert dims == (8,) and set(layers.shapes) == {(u.num_rows, u.dim) for u in job.units if u.is_layer}
    assert (layers.batch_size, layers.outliers) == (1024, 0.001)
    grid = replace(default_grid(quick=True, dims=dims), num_repeats=1, rows=(1000,), poolings=(1,))
    found = calibrate(grid, layers)
    assert len(found.layers) == 5 * len(set(layers.shapes)) and all(p.ns_per_row > 0 for p in found.layers)
    write_calibration(found, tmp_path / "found.json")
    assert read_calibration(tmp_path / "found.json") == found
    document = json.loads((tmp_path / "found.json").read_text())
    document["layers"][0]["precision"] = "int4"
    (tmp_path / "found.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"layers\[0\]: precision must be one of fp32, fp16, bf16"):
        read_calibration(tmp_path / "found.json")
