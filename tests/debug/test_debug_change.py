"""The single change that helps most, against the evaluation of the changed plan."""

import math

import numpy as np
import planted_faults as faults
import pytest
from plans import LOW_LAYERS

from lowprec import ops
from lowprec.debug import debug_plan
from lowprec.evaluation.workers.worker import evaluator_of
from lowprec.plan import Precision
from lowprec.search import open_job


def kl_pct(config, file, plan):
    """The label-free gap of a plan on the last eighth of every other batch of the confirm window."""
    job = open_job(config).as_planned(file)
    evaluator = evaluator_of(job.spec, job.adapter)
    window = job.window("confirm")
    with evaluator.using(job.forms):
        sums = [evaluator.sums(window.batch(k).part(3, 4), [plan]) for k in range(0, window.num_batches, 4)]
    total = sums[0]
    for more in sums[1:]:
        total = total + more
    return total.metrics(0, confidence=0.95).kl_pct


@pytest.mark.parametrize("table", ["c2", "c4"])
def test_the_one_coarse_table_is_what_to_change(uniform, table):
    config, file, path = uniform(Precision.FP16, **{table: Precision.INT2})
    report = debug_plan(config, path)
    unit, change = f"table:{table}", report.change
    assert [suspect.unit for suspect in report.suspects] == [unit] and change.unit == unit
    assert next(u.share for u in report.units if u.unit == unit) > 0.98
    to = Precision(change.to)
    assert to in (Precision.INT4, Precision.INT8, Precision.FP16)
    # Logits of a batch and of its part may differ in their last bits.
    assert change.kl_before_pct == pytest.approx(kl_pct(config, file, file.plan), rel=1e-6)
    assert change.kl_after_pct == pytest.approx(kl_pct(config, file, file.plan.replace({unit: to})), rel=1e-9)
    least = kl_pct(config, file, file.plan.replace({unit: Precision.FP32}))
    kept = (change.kl_before_pct - change.kl_after_pct) / (change.kl_before_pct - least)
    assert change.kept == pytest.approx(kept, rel=1e-6) and 0.9 <= change.kept <= 1.01
    num_rows, dim = open_job(config).adapter.shapes[unit]
    assert change.bytes_added == num_rows * (ops.row_bytes(dim, to) - ops.row_bytes(dim, Precision.INT2)) > 0
    assert change.num_examples == report.num_traced == 384


def test_the_cheapest_change_that_does_enough_is_taken(uniform, changed_checkpoint):
    """Each row has one value so large that four bits do not hold the others."""

    def change(weights):
        weights["tables.c4.weight"][:, 0] = 8

    config, file, path = uniform(Precision.FP32, changed_checkpoint(change), c4=Precision.INT2)
    found = debug_plan(config, path).change
    order = (Precision.INT4, Precision.INT8, Precision.FP16)
    before = kl_pct(config, file, file.plan)
    kept = [1 - kl_pct(config, file, file.plan.replace({"table:c4": at})) / before for at in order]
    assert 0.5 < kept[0] < 0.9 < kept[1], "int4 does much, and not enough"
    assert (found.unit, found.to) == ("table:c4", "int8") and found.kept == pytest.approx(kept[1], rel=1e-6)


def test_a_reference_has_no_suspects_and_nothing_to_change(uniform):
    config, _, path = uniform(Precision.FP32)
    report = debug_plan(config, path)
    assert report.suspects == () and report.change is None and report.is_as_planned
    assert report.metrics.kl_pct == report.metrics.gap_pct == 0
    assert all(unit.share == 0 and unit.accumulated.sqnr_db == math.inf for unit in report.units)


def test_what_differs_is_put_back_as_planned(served):
    config, file, folder = served(layers=None)
    faults.swapped_scales(folder, "table:c3", np.random.default_rng(0))
    report = debug_plan(config, folder)
    change = report.change
    assert (change.unit, change.to, change.bytes_added) == ("table:c3", "as planned", 0)
    assert change.kl_after_pct == pytest.approx(kl_pct(config, file, file.plan), rel=1e-9)
    assert change.kl_before_pct > 2 * change.kl_after_pct and change.kept == 1


def test_a_layer_that_differs_is_put_back_as_planned(served):
    config, file, folder = served()
    faults.dead_channel(folder, "layer:top.2", 0)
    change = debug_plan(config, folder).change
    assert (change.unit, change.to, change.bytes_added) == ("layer:top.2", "as planned", 0)
    # One scale for the inputs of a batch, in top.0: the part is a batch here and there.
    assert change.kl_after_pct == pytest.approx(kl_pct(config, file, file.plan), rel=1e-9)


def test_of_several_suspects_the_one_whose_error_matters_most_is_changed(planned):
    config, file, path = planned(layers={"layer:top.2": LOW_LAYERS["layer:top.2"]})
    report = debug_plan(config, path)
    assert report.suspects[0].unit == "layer:top.2"
    fp32 = {name: file.plan.replace({name: Precision.FP32}) for name in ("layer:top.2", "table:c4")}
    after = {name: kl_pct(config, file, plan) for name, plan in fp32.items()}
    assert report.change.unit == min(after, key=after.get)


def test_nothing_is_proposed_that_leaves_logits_without_a_value(uniform, changed_checkpoint, often):
    """Two tables are broken, in every example that one of them answers: no single change heals it."""
    rows = {table: often(table) for table in ("c0", "c1")}

    def change(weights):
        for table in rows:
            weights[f"tables.{table}.weight"][:, 0] = 1e8

    config, _, path = uniform(Precision.FP16, changed_checkpoint(change))
    report = debug_plan(config, path)
    assert {suspect.unit for suspect in report.suspects[:2]} == {"table:c0", "table:c1"}
    assert all(unit.is_broken for unit in report.units if unit.unit in ("table:c0", "table:c1"))
    assert report.change is None
