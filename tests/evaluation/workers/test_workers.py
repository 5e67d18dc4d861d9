"""What `Workers` promises, of every implementation: in this process, and as Ray actors."""

import pytest
import ray

from lowprec.config import load_config
from lowprec.core.errors import TrafficError, WorkerError
from lowprec.evaluation.workers.ray import RayWorkers
from lowprec.evaluation.workers.worker import ExactTask, LocalWorkers, RowCheck, evaluator_of
from lowprec.ops.linear import safe_input_bits
from lowprec.plan import Plan, Precision
from lowprec.plan.layer_form import LayerForm
from lowprec.search import open_job

LAYERS = "space.layers=[fp32, int8_dynamic]"


@pytest.fixture(scope="module")
def job(small_folder):
    return open_job(load_config(small_folder / "runs" / "config.yaml", (LAYERS, "traffic.batch_size=4096")))


@pytest.fixture(scope="module", params=["this process", "Ray"])
def workers(request, job):
    """To start them on Ray takes longer than all that is asked of them."""
    if request.param == "this process":
        made = LocalWorkers(job.spec, job.adapter)
        yield made
        made.close()
        return
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    made = RayWorkers(job.spec, num_workers=2, address=None)
    yield made
    made.close()
    ray.shutdown()


def int4_but(job, **changes):
    """All tables int4, all layers fp32, but for some units."""
    plan = {u.name: Precision.FP32 if u.is_layer else Precision.INT4 for u in job.units}
    return Plan({**plan, **{name.replace("__", ":").replace("_dot_", "."): p for name, p in changes.items()}})


def test_chunks_come_in_the_order_of_tasks_with_the_bits_of_one_evaluator(workers, job):
    window, plan = job.window("search"), int4_but(job)
    tasks = [ExactTask((plan,), (k,)) for k in reversed(range(window.num_batches))]
    evaluator = evaluator_of(job.spec, job.adapter)
    expected = [evaluator.sums(window.batch(task.batches[0]), [plan]) for task in tasks]
    found = list(workers.run(window, tasks))
    assert [chunk.sums.moments.tobytes() for chunk in found] == [sums.moments.tobytes() for sums in expected]
    assert [chunk.num_rows_read for chunk in found] == [window.batch(task.batches[0]).num_rows for task in tasks]


def test_batches_of_a_task_are_added_in_its_order(workers, job):
    window, plan = job.window("search"), int4_but(job)
    (chunk,) = workers.run(window, [ExactTask((plan,), (0, 1))])
    evaluator = evaluator_of(job.spec, job.adapter)
    first, second = (evaluator.sums(window.batch(k), [plan]) for k in (0, 1))
    assert chunk.sums.moments.tobytes() == (first + second).moments.tobytes()
    assert chunk.lookups == dict(evaluator.lookups) and chunk.bags == dict(evaluator.bags)


def test_without_tasks_there_are_no_chunks(workers, job):
    assert list(workers.run(job.window("search"), [])) == []


def test_layers_have_the_forms_of_their_task(workers, job):
    window = job.window("search")
    plan = int4_but(job, layer__top_dot_0=Precision.INT8_DYNAMIC)
    forms = [
        {("layer:top.0", Precision.INT8_DYNAMIC): LayerForm(outliers=share, input_bits=safe_input_bits())}
        for share in (0.0, 0.1)
    ]
    tasks = [ExactTask((plan,), (0,), forms=forms[k]) for k in (0, 1, 0)]
    first, other, again = (chunk.sums.moments.tobytes() for chunk in workers.run(window, tasks))
    assert first == again != other


def test_an_error_of_ours_arrives_as_it_is(workers, small_config):
    sizes = ", ".join(f"{{name: c{k}, num_embeddings: {n}}}" for k, n in enumerate((10, 80, 160, 320, 640, 1000)))
    short = open_job(
        small_config(f"traffic.sparse=[{sizes}]", "model.args.tables={c0: {features: [c0], num_embeddings: 40}}")
    )
    window = short.window("search")
    with pytest.raises((TrafficError, WorkerError), match=r"row \d+.*c0"):
        list(workers.run(window, [ExactTask((int4_but(short),), (0,))]))


def test_rows_without_a_form_are_named_in_the_order_of_checks(workers, job):
    checks = [RowCheck(u.name, 0, u.num_rows, Precision.INT4) for u in job.units if not u.is_layer]
    assert list(workers.check_rows(checks)) == [None] * len(checks)
