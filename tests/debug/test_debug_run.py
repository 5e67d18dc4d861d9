"""What is said of each unit, against the same worked out by hand, and that nothing in the model changes."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from plans import LOW_LAYERS
from torch.nn.functional import embedding_bag, linear

import lowprec
from lowprec import ops
from lowprec.core.errors import ModelError, TrafficError
from lowprec.core.progress import Silent
from lowprec.debug import debug_plan
from lowprec.debug.debug_run import debug_implementation, sample_of
from lowprec.debug.implementations import open_implementation
from lowprec.debug.sums import MAX_ROWS
from lowprec.evaluation.workers.worker import evaluator_of
from lowprec.gate.verify import verify_plan
from lowprec.models.adapter import inputs_of
from lowprec.ops.linear import low_linear
from lowprec.plan import Precision
from lowprec.plan.layer_form import LayerForm
from lowprec.search import open_job

ORDER = [
    "layer:bottom.0",
    "layer:bottom.2",
    *(f"table:c{k}" for k in range(6)),
    "layer:top.0",
    "layer:top.2",
]
# More rows than a batch's sums are of.
LARGE_BATCHES = "traffic.batch_size=1500"
# Both sides are sums of fp32 numbers; 1e-3 dB is a part in four thousand of the error.
DECIBELS = 2e-3


def decibels(y, x):
    y, e = y.double(), x.double() - y.double()
    return 10 * math.log10(float(y.square().sum() / e.square().sum()))


def by_name(report):
    return {unit.unit: unit for unit in report.units}


def sampled(job, positions):
    return [job.window("confirm").batch(k) for k in positions]


def layer_calls(model, paths, batch):
    """What each layer is given and returns, as hooks see it."""
    seen = {}

    def keep(path):
        def hook(_, args, output):
            seen[path] = args[0].clone(), output.clone()

        return hook

    hooks = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    inputs = inputs_of(batch)
    with torch.inference_mode():
        logits = model(inputs.dense, dict(inputs.sparse))
    for hook in hooks:
        hook.remove()
    return seen, logits


PATHS = [unit.removeprefix("layer:") for unit in ORDER if unit.startswith("layer:")]


def test_units_come_in_the_order_of_the_model_with_what_the_plan_says(planned):
    config, file, path = planned()
    report = debug_plan(config, path)
    job = open_job(config)
    assert [unit.unit for unit in report.units] == ORDER != [unit.name for unit in job.units]
    for name, unit in by_name(report).items():
        assert unit.precision == file.plan[name] and unit.size_bytes == job.space.size_of(name, file.plan[name])
        assert unit.form == (str(file.layer_forms[name]) if name in file.layer_forms else None)
    assert sum(unit.size_bytes for unit in report.units) == file.size_bytes
    assert report.is_as_planned and not report.notes and not any(unit.is_broken for unit in report.units)
    assert report.checkpoint_sha256 == job.checkpoint_sha256 and report.num_traced == 3 * 512 // 4
    assert report.num_compared == 6000  # batches of 512


def test_the_first_rows_of_large_batches_are_compared_and_it_is_said(planned):
    config, _, path = planned("traffic.batch_size=2048", layers=None)
    report = debug_plan(config, path)
    assert report.num_compared == report.to_dict()["num_compared"] == 3 * 512


def test_fp32_units_are_exact_and_nothing_is_before_the_first_ones(planned):
    config, file, path = planned()
    for name, unit in by_name(debug_plan(config, path)).items():
        if file.plan[name] is Precision.FP32:
            assert unit.alone.sqnr_db == math.inf and unit.share == 0 and unit.worst == ()
        else:
            assert 0 < unit.alone.sqnr_db < 90
        # Tables are asked for the same whatever the units before them do.
        before = ("layer:bottom.2", "layer:top.0", "layer:top.2")
        assert (unit.accumulated.sqnr_db == unit.alone.sqnr_db) is (name not in before)


def test_fp32_layers_carry_the_error_of_what_is_before_them(planned):
    config, _, path = planned(layers=None)
    units = by_name(debug_plan(config, path))
    assert set(units) == set(ORDER)
    for name in ("layer:top.0", "layer:top.2"):
        assert units[name].alone.sqnr_db == math.inf and units[name].accumulated.sqnr_db < 30
    assert units["layer:bottom.2"].accumulated.sqnr_db == math.inf


@pytest.mark.parametrize("is_served", [False, True])
def test_tables_alone_are_what_their_dequantized_rows_pool_to(planned, served, is_served):
    config, file, path = (served if is_served else planned)(LARGE_BATCHES)
    report = debug_plan(config, path, num_examples=3000)
    job = open_job(config)
    weights = job.adapter.weights
    for name, unit in by_name(report).items():
        if not name.startswith("table:"):
            continue
        rows, at = weights[name].numpy(), file.plan[name]
        restored = ops.dequantize(ops.quantize(rows, at, row_range=file.row_range(name)), at, rows.shape[1])
        exact, found = [], []
        for batch in sampled(job, [0, 2]):  # of four
            bags = batch.sparse[name.removeprefix("table:")]
            for table, pooled in ((rows, exact), (restored, found)):
                ids, ends = torch.from_numpy(bags.values), torch.from_numpy(bags.offsets)
                pooled.append(
                    embedding_bag(ids, torch.from_numpy(table), ends, mode="sum", include_last_offset=True)[:MAX_ROWS]
                )
        y, x = torch.cat(exact), torch.cat(found)
        assert unit.alone.num_summed == len(y) == 2 * MAX_ROWS and unit.alone.num_rows == 3000
        if at is Precision.FP32:
            assert torch.equal(y, x) and unit.alone.sqnr_db == math.inf
            continue
        assert unit.alone.sqnr_db == pytest.approx(decibels(y, x), abs=DECIBELS), name
        e = (x - y).double()
        assert unit.alone.to_dict()["max_error"] == pytest.approx(float(e.abs().max()), rel=1e-3, abs=1e-6)
        assert unit.alone.to_dict()["mean_error"] == pytest.approx(float(e.abs().mean()), rel=1e-3)
        assert unit.alone.to_dict()["bias"] == pytest.approx(float(e.mean()), rel=1e-2, abs=1e-6)


def test_layers_alone_are_given_what_the_fp32_model_gives_them(planned):
    config, file, path = planned(LARGE_BATCHES)
    units = by_name(debug_plan(config, path, num_examples=3000))
    job = open_job(config)
    model = job.adapter.model
    calls = [layer_calls(model, PATHS, batch)[0] for batch in sampled(job, [0, 2])]
    for name in PATHS:
        module, unit = model.get_submodule(name), f"layer:{name}"
        low = low_linear(module.weight, module.bias, file.plan[unit], file.layer_forms.get(unit))
        y = torch.cat([of[name][1][:MAX_ROWS] for of in calls])
        # One scale for the inputs of a batch: the whole batch is its company.
        x = torch.cat([low(of[name][0])[:MAX_ROWS] for of in calls])
        assert units[unit].alone.sqnr_db == pytest.approx(decibels(y, x), abs=DECIBELS), name
        channels = [decibels(y[:, c], x[:, c]) for c in range(y.shape[1])]
        np.testing.assert_allclose(units[unit].alone.sqnr_db_by_channel, channels, atol=5 * DECIBELS)


def test_the_first_layers_are_what_plain_arithmetic_makes_of_them(planned):
    config, _, path = planned()
    units = by_name(debug_plan(config, path))
    job = open_job(config)
    first, second = (job.adapter.model.get_submodule(name) for name in ("bottom.0", "bottom.2"))
    alone, accumulated = [], []
    for batch in sampled(job, range(job.window("confirm").num_batches)):
        calls, _ = layer_calls(job.adapter.model, PATHS, batch)
        x, y = calls["bottom.0"]
        low = linear(x.bfloat16(), first.weight.bfloat16(), first.bias.bfloat16()).float()
        alone.append((y, low))
        found = linear(low.relu(), second.weight.half().float(), second.bias)
        accumulated.append((calls["bottom.2"][1], found))
    for name, pairs in (("layer:bottom.0", alone), ("layer:bottom.2", accumulated)):
        y, x = (torch.cat(of) for of in zip(*pairs, strict=True))
        assert units[name].accumulated.sqnr_db == pytest.approx(decibels(y, x), abs=DECIBELS)


@pytest.mark.parametrize("is_served", [False, True])
def test_accumulated_errors_are_those_of_the_module_that_serves(served, tmp_path, is_served):
    config, _, folder = served(LARGE_BATCHES)
    units = by_name(debug_plan(config, folder if is_served else tmp_path / "plan.json", num_examples=3000))
    job, module = open_job(config), lowprec.load(folder)
    batches = sampled(job, [0, 2])
    exact = [layer_calls(job.adapter.model, PATHS, batch)[0] for batch in batches]
    found = [layer_calls(module, PATHS, batch)[0] for batch in batches]
    for name in PATHS:
        y, x = (torch.cat([of[name][1][:MAX_ROWS] for of in calls]) for calls in (exact, found))
        assert units[f"layer:{name}"].accumulated.sqnr_db == pytest.approx(decibels(y, x), abs=DECIBELS), name


def test_accumulated_at_the_last_layer_is_what_the_evaluation_finds_of_the_logits(planned):
    config, file, path = planned()
    unit = debug_plan(config, path).units[-1]
    job = open_job(config).as_planned(file)
    evaluator = evaluator_of(job.spec, job.adapter)
    window = job.window("confirm")
    with evaluator.using(job.forms):
        found = [evaluator.logits(window.batch(k), [file.plan]) for k in range(window.num_batches)]
    y, x = (torch.from_numpy(np.concatenate(v)) for v in zip(*((f.reference, f.plans[0]) for f in found), strict=True))
    assert unit.accumulated.num_rows == len(y) == 6000
    assert unit.accumulated.sqnr_db == pytest.approx(decibels(y, x), abs=DECIBELS)
    assert unit.accumulated.to_dict()["max_error"] == pytest.approx(float((y - x).abs().max()), rel=1e-5)


@pytest.mark.parametrize("layers", [None, "fitted"])
def test_gaps_are_those_that_verify_finds_on_the_same_window(planned, layers):
    config, _, path = planned(**({} if layers else {"layers": None}))
    report, verified = debug_plan(config, path), verify_plan(config, path)
    for name in ("gap_pct", "kl_pct", "ne_ref", "ne_plan", "auc_plan", "num_examples"):
        assert getattr(report.metrics, name) == pytest.approx(getattr(verified.metrics, name), rel=1e-9), name
    assert report.window == verified.window


def test_a_sample_is_of_batches_at_equal_distances(planned):
    config, file, path = planned("traffic.batch_size=500", layers=None)
    report = debug_plan(config, path, num_examples=1900)
    job = open_job(config).as_planned(file)
    evaluator = evaluator_of(job.spec, job.adapter)
    sums = [evaluator.sums(batch, [file.plan]) for batch in sampled(job, [0, 3, 6, 9])]  # of twelve
    metrics = (sums[0] + sums[1] + sums[2] + sums[3]).metrics(0, confidence=0.95)
    assert report.metrics.num_examples == 2000
    assert report.metrics.kl_pct == pytest.approx(metrics.kl_pct, rel=1e-9)
    other = debug_plan(config, path, num_examples=1900, window="search")
    assert other.window != report.window and other.metrics.kl_pct != report.metrics.kl_pct


# One example at a time: with one scale for the inputs of a batch, a part of it is no batch.
BY_ROW = {
    "layer:bottom.2": (Precision.BF16, None),
    "layer:top.0": (Precision.INT8_STATIC, LayerForm(input_bits=7, input_scale=0.2, input_zero_point=64)),
    "layer:top.2": (Precision.FP16, None),
}


@pytest.mark.parametrize("layers", [None, BY_ROW])
def test_shares_are_to_first_order_and_add_up(planned, layers):
    """Of an eighth of every other batch: s is what a unit does to a logit, S what all do; h s S / 2 adds up to KL."""
    config, file, path = planned(layers=layers)
    report = debug_plan(config, path)
    assert sum(unit.share for unit in report.units) == pytest.approx(1)
    job = open_job(config).as_planned(file)
    evaluator = evaluator_of(job.spec, job.adapter)
    names = [unit.unit for unit in report.units]
    low = [name for name in names if name in file.plan]
    rows = [names.index(name) for name in low]
    second, first, squares = (np.zeros(len(names)) for _ in range(3))
    entropy = loss = 0.0
    with evaluator.using(job.forms):
        for batch in sampled(job, range(0, job.window("confirm").num_batches, 4)):
            part = batch.part(3, 4)
            traced = evaluator.traced(part, file.plan, low)
            changes = np.zeros((len(names), part.num_rows))
            changes[rows] = traced.changes
            z, y = traced.reference.astype(float), part.labels.astype(float)
            p = 1 / (1 + np.exp(-z))
            second += (p * (1 - p) * changes * changes.sum(axis=0) / 2).sum(axis=1)
            first += ((p - y) * changes).sum(axis=1)
            squares += np.square((p - y) * changes).sum(axis=1)
            entropy -= (p * np.log(p) + (1 - p) * np.log(1 - p)).sum()
            loss -= (y * np.log(p) + (1 - y) * np.log(1 - p)).sum()
    close = {"rel": 1e-3, "abs": 1e-6}
    assert [unit.share for unit in report.units] == pytest.approx(list(second / second.sum()), **close)
    assert [unit.kl_pct for unit in report.units] == pytest.approx(list(100 * second / entropy), **close)
    assert [unit.first_pct for unit in report.units] == pytest.approx(list(100 * first / loss), **close)
    assert [unit.first_error_pct for unit in report.units] == pytest.approx(list(100 * squares**0.5 / loss), **close)


def test_inputs_beyond_their_codes_are_the_reason_of_the_error_that_they_make(planned):
    """The last layer's codes end at 2.48, and some of its inputs beyond."""
    config, file, path = planned(layers=LOW_LAYERS)
    (unit,) = [u for u in debug_plan(config, path).units if u.unit == "layer:top.2"]
    form, job = file.layer_forms["layer:top.2"], open_job(config)
    low = job.adapter.layers.low("layer:top.2", 0, Precision.INT8_STATIC, form)
    whole = beyond = 0.0
    for batch in sampled(job, range(0, job.window("confirm").num_batches, 4)):
        x, y = layer_calls(job.adapter.model, PATHS, batch.part(3, 4))[0]["top.2"]
        error2 = (low(x) - y).square().sum(dim=1)
        whole += float(error2.sum())
        beyond += float(error2[(x > (127.5 - 3) * form.input_scale).any(dim=1)].sum())
    assert beyond / whole > 0.3
    expected = f"inputs beyond their codes: rows with one have {beyond / whole:.0%} of the layer's squared error"
    assert unit.worst[0].why == expected
    fitting = replace(form, input_scale=0.05)
    config, _, path = planned(layers={"layer:top.2": (Precision.INT8_STATIC, fitting)})
    (unit,) = [u for u in debug_plan(config, path).units if u.unit == "layer:top.2"]
    assert "beyond" not in unit.worst[0].why


def test_codes_that_end_too_early_and_values_that_are_lost_are_counted(planned):
    config, file, path = planned(layers=LOW_LAYERS)
    units = by_name(debug_plan(config, path))
    form = file.layer_forms["layer:top.2"]
    job = open_job(config)
    values = saturated = lost = 0
    for batch in sampled(job, range(0, job.window("confirm").num_batches, 4)):
        x = layer_calls(job.adapter.model, PATHS, batch)[0]["top.2"][0]
        x = x[len(x) - len(x) // 4 :].numpy().astype(np.float32)
        codes = np.rint(x / np.float32(form.input_scale)) + form.input_zero_point
        values += x.size
        saturated += int(((codes < 0) | (codes > 127)).sum())
        lost += int(((codes == form.input_zero_point) & (x != 0)).sum())
    found = units["layer:top.2"].counts["inputs"]
    assert found == {"values": values, "saturated": saturated, "underflowed": lost} and saturated and lost
    (said,) = units["layer:top.2"].misfits
    assert said.startswith("its input codes reach from -0.06 to 2.48 and its inputs from 0 to ")
    # c1 is fp16: what is neither of the two is rounded.
    assert units["table:c1"].counts["values"] | {"values": 0} == dict.fromkeys(
        ("values", "saturated", "underflowed", "overflowed"), 0
    )


class Failing(Silent):
    """Gives up in the middle."""

    def advance(self, steps=1):
        raise RuntimeError("enough")


def seen_of(model):
    """All that may be changed in a model."""
    modules = [
        (path, "forward" in m.__dict__, len(m._forward_hooks), len(m._forward_pre_hooks), m.training)
        for path, m in model.named_modules()
    ]
    return modules, {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", ["plan", "folder", "stops", "fails on a part", "fails alone", "fails together"])
def test_nothing_in_the_model_changes(planned, served, how):
    config, _, where = (served if how == "folder" else planned)()
    job, implementation = open_implementation(open_job(config), where)
    model = job.adapter.model
    batches = sample_of(job, "confirm", 3000)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, seen = layer_calls(model, PATHS, batches[0]()), seen_of(model)
    assert not any(replaced or hooks or pre for _, replaced, hooks, pre, _ in seen[0])
    if how.startswith("fails"):
        calls, layers = [], dict(implementation.layers())
        last = model.get_submodule("top.2")

        def failing(x, low=layers[last]):
            calls.append(x)
            # On a part of the batch: by itself, then all units at once; on all of it: beside the reference, then again.
            if len(calls) == {"fails on a part": 2, "fails alone": 3, "fails together": 4}[how]:
                raise ValueError("no way")
            return low(x)

        implementation.layers = lambda: layers | {last: failing}
    threads = torch.get_num_threads()
    torch.set_num_threads(job.spec.threads + 1)
    try:
        if how == "stops":
            with pytest.raises(RuntimeError, match="enough"):
                debug_implementation(job, implementation, batches, "confirm", progress=Failing())
        elif how.startswith("fails"):
            with pytest.raises(ModelError, match="no way"):
                debug_implementation(job, implementation, batches, "confirm")
        else:
            debug_implementation(job, implementation, batches, "confirm")
        assert torch.get_num_threads() == job.spec.threads + 1
    finally:
        torch.set_num_threads(threads)
    assert seen_of(model) == seen
    after = layer_calls(model, PATHS, batches[0]())
    assert torch.equal(after[1], before[1])
    assert all(torch.equal(after[0][path][1], before[0][path][1]) for path in PATHS)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_same_twice_is_the_same(planned):
    config, _, path = planned()
    first, second = (debug_plan(config, path).to_dict() | {"seconds": 0} for _ in range(2))
    assert first == second


def test_a_window_without_labels_is_refused(planned, small_folder, tmp_path):
    table = ds.dataset(small_folder / "traffic").to_table()
    unlabelled = table.set_column(table.column_names.index("label"), "label", pa.nulls(len(table), pa.float32()))
    (tmp_path / "traffic").mkdir()
    pq.write_table(unlabelled, tmp_path / "traffic" / "part.parquet")
    config, _, path = planned()
    other = config.with_(traffic={"path": str(tmp_path / "traffic")})
    with pytest.raises(TrafficError, match=r"windows\.confirm: the sample has no row with a usable label"):
        debug_plan(other, path)
