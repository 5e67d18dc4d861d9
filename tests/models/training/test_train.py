"""Training on tiny traffic with a known truth: it learns, stops, repeats itself, and says what is wrong."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from lowprec.config import Config
from lowprec.core.errors import ConfigError, ModelError, TrafficError
from lowprec.models.checkpoints.checkpoint import checkpoint_sha256, load_checkpoint
from lowprec.models.factory import build_model
from lowprec.models.training import fit
from lowprec.models.training.train import train
from lowprec.storage import Location

NUM_ROWS = 6000


def write_traffic(path, **changes):
    """The label depends on two ids and a dense value; row i has time i."""
    rng = np.random.default_rng(7)
    a, b = rng.integers(0, 20, NUM_ROWS), rng.integers(0, 50, NUM_ROWS)
    dense = rng.normal(1000.0, 5.0, NUM_ROWS)
    logit = rng.normal(0, 1.5, 20)[a] + rng.normal(0, 1.5, 50)[b] + (dense - 1000) / 5
    columns = {
        "label": (rng.random(NUM_ROWS) < 1 / (1 + np.exp(-logit))).astype(np.int8),
        "ts": np.arange(NUM_ROWS),
        "d": dense.astype(np.float32),
        "a": a,
        "b": [[int(i)] for i in b],
        "true_logit": logit,
    }
    pq.write_table(pa.table({**columns, **changes}), path)


@pytest.fixture
def make_config(tmp_path):
    def make(*, traffic=(), windows=(), train=(), model=(), **columns):
        write_traffic(tmp_path / "traffic.parquet", **columns)
        document = {
            "name": "tiny",
            "traffic": {
                "path": str(tmp_path / "traffic.parquet"),
                "time": "ts",
                "dense": ["d"],
                "sparse": [{"name": "a", "num_embeddings": 20}, {"name": "b", "num_embeddings": 50}],
                "batch_size": 500,
                **dict(traffic),
            },
            "windows": {
                "train": {"end": 4000},
                "validation": {"start": 4000, "end": 5000},
                "search": {"start": 5000, "end": 5500},
                "confirm": {"start": 5500},
                **dict(windows),
            },
            "model": {
                "args": {"embedding_dim": 4, "bottom": [8], "top": [16]},
                "checkpoint": str(tmp_path / "model.safetensors"),
                **dict(model),
            },
            "train": {"batch_size": 128, "learning_rate": 0.01, "embedding_learning_rate": 0.1, **dict(train)},
        }
        return Config.model_validate_json(json.dumps(document))

    return make


class Told:
    def stage(self, name, total):
        self.total, self.done = total, 0

    def advance(self, steps=1):
        self.done += steps

    def note(self, text):
        pass


def test_it_learns_and_saves_what_it_reports(make_config):
    config = make_config()
    told = Told()
    report = train(config, progress=told)
    data = pq.read_table(config.traffic.path).slice(4000, 1000)
    labels = data["label"].to_numpy().astype(np.float32)
    truth = fit.quality(data["true_logit"].to_numpy(), labels)
    # Nothing beats the truth but by luck on 1000 rows; most of what it knows must be learnt.
    assert truth.ne - 0.02 < report.validation.ne < truth.ne + 0.25 * (1 - truth.ne)
    assert report.validation.auc < truth.auc + 0.02
    assert report.validation.calibration == pytest.approx(1.0, abs=0.15)
    assert report.train.num_examples == report.num_rows == 4000
    assert report.validation.num_examples == 1000
    assert report.checkpoint_sha256 == checkpoint_sha256(report.checkpoint)

    model = build_model(config.model.factory, config.model.args, config.traffic.schema_of_columns())
    load_checkpoint(model, report.checkpoint)
    one_each = torch.arange(1001)
    sparse = {
        "a": (torch.from_numpy(data["a"].to_numpy().copy()), one_each),
        "b": (torch.tensor([ids[0] for ids in data["b"].to_pylist()]), one_each),
    }
    dense = torch.from_numpy(data["d"].to_numpy().copy())[:, None]
    logits = model(dense, sparse).numpy()
    again = fit.quality(logits, labels)
    assert again.ne == pytest.approx(report.validation.ne, rel=1e-5)
    # The standardisation is part of the checkpoint.
    assert model.dense_mean.item() == pytest.approx(1000.0, abs=0.5)
    assert model.dense_std.item() == pytest.approx(5.0, abs=0.5)

    assert told.total == 16_000
    assert told.done == round(report.epochs * 4000) <= told.total


def test_same_config_same_bytes_and_the_machine_keeps_its_settings(make_config, tmp_path):
    threads = torch.get_num_threads()
    torch.manual_seed(123)
    expected = torch.rand(1)
    digests = []
    for name, seed, noise in (("one", 3, 1), ("two", 3, 2), ("other", 4, 1)):
        torch.manual_seed(123)
        torch.rand(noise)
        checkpoint = str(tmp_path / f"{name}.safetensors")
        report = train(make_config(train={"seed": seed, "epochs": 1}.items(), model={"checkpoint": checkpoint}.items()))
        digests.append(report.checkpoint_sha256)
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]
    assert torch.get_num_threads() == threads
    torch.manual_seed(123)
    train(make_config(train={"epochs": 1}.items()))
    assert torch.equal(torch.rand(1), expected)


def test_early_stopping_keeps_the_best_weights(make_config, monkeypatch):
    """A learning rate that overfits at once: evaluations get worse, training stops, the best weights are saved."""
    config = make_config(train={"learning_rate": 0.05, "embedding_learning_rate": 1.0, "epochs": 50}.items())
    evaluations = []
    measured = fit.quality_on

    def watch(model, batches):
        evaluations.append(measured(model, batches))
        return evaluations[-1]

    monkeypatch.setattr(fit, "quality_on", watch)
    report = train(config)
    scores = [found.ne for found in evaluations]
    best = scores.index(min(scores))
    assert len(scores) == best + 1 + config.train.patience
    assert report.validation.ne == scores[best]
    batch = config.train.batch_size / report.num_rows  # evaluations wait for the end of a mini-batch
    assert report.best_epoch == pytest.approx((best + 1) / 2, abs=batch)
    assert report.epochs == pytest.approx(len(scores) / 2, abs=batch)


def test_without_a_validation_window_the_last_tenth_is_held_out(make_config):
    report = train(make_config(windows={"validation": None, "train": {"end": 5000}}.items()))
    assert (report.num_rows, report.validation.num_examples) == (4500, 500)
    assert report.validation.ne < 0.9


def test_rows_without_a_label_are_skipped_and_counted(make_config):
    labels = pa.array([None if i % 4 == 0 else i % 3 == 0 for i in range(NUM_ROWS)], pa.bool_()).cast(pa.int8())
    report = train(make_config(label=labels, train={"epochs": 1}.items()))
    assert (report.num_rows, report.num_unlabelled, report.num_bad) == (3000, 1250, 0)
    assert report.validation.num_examples == 750


def test_weights_count(make_config):
    """With all weight on every second row, the other rows' labels do not matter to the report."""
    even = np.arange(NUM_ROWS) % 2 == 0
    report = train(
        make_config(traffic={"weight": "w"}.items(), w=np.where(even, 1.0, 0.0), train={"epochs": 2}.items())
    )
    label = pq.read_table(make_config().traffic.path)["label"].to_numpy()
    halves = train(
        make_config(
            label=np.where(even, label, 1 - label),
            w=np.where(even, 1.0, 0.0),
            traffic={"weight": "w"}.items(),
            train={"epochs": 2}.items(),
        )
    )
    assert halves.validation.ne == pytest.approx(report.validation.ne, rel=1e-3)
    assert report.validation.ne < 0.95


def test_no_dense_columns(make_config):
    report = train(make_config(traffic={"dense": []}.items()))
    assert report.validation.ne < 0.95


def test_the_checkpoint_says_where_it_comes_from(make_config):
    config = make_config(train={"epochs": 1}.items())
    report = train(config)
    with safe_open(report.checkpoint, "pt") as file:
        metadata = json.loads(file.metadata()["lowprec"])
    assert float(metadata["validation_ne"]) == report.validation.ne
    saved = json.loads(metadata["config"])
    assert saved["windows"].keys() == {"train", "validation"}
    assert "checkpoint" not in saved["model"]


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        ({"windows": {"train": None}}, ConfigError, "windows.train: is required"),
        ({"windows": {"train": {"end": "yesterday"}}}, ConfigError, "windows.train.end"),
        ({"windows": {"train": {"end": 400}, "validation": None}}, TrafficError, "leaves none to validate on"),
        ({"windows": {"train": {"start": 10**6}}}, TrafficError, "no row lies in window"),
        (
            {"label": np.zeros(NUM_ROWS, np.int8)},
            TrafficError,
            "its 4000 labelled rows have one",
        ),
        (
            {"label": np.where(np.arange(NUM_ROWS) < 4000, np.arange(NUM_ROWS) % 2, 1)},
            TrafficError,
            "the 1000 validation rows have one label only",
        ),
        ({"train": {"learning_rate": 1e30}}, ModelError, "lower train.learning_rate"),
    ],
)
def test_what_cannot_be_trained_is_explained(make_config, changes, kind, sentence):
    config = make_config(**{k: v.items() if isinstance(v, dict) else v for k, v in changes.items()})
    with pytest.raises(kind) as raised:
        train(config)
    assert sentence in str(raised.value)


def test_bad_rows_beyond_the_allowed_share_stop_training(make_config):
    dense = np.where(np.arange(NUM_ROWS) % 100 == 0, np.nan, 1000.0).astype(np.float32)
    with pytest.raises(TrafficError, match="50 of 5000 rows are bad .1.000%, at most 0.000%"):
        train(make_config(d=dense))
    report = train(make_config(d=dense, traffic={"max_bad_fraction": 0.02}.items(), train={"epochs": 1}.items()))
    assert (report.num_bad, report.num_rows) == (50, 3960)


def test_an_object_store_gives_traffic_and_takes_the_model(make_config, bucket, tmp_path):
    here = make_config(train={"epochs": 1})
    with Location.of(f"{bucket}/logs/traffic.parquet").whole_file() as partial:
        partial.write_bytes((tmp_path / "traffic.parquet").read_bytes())
    places = {"traffic": {"path": f"{bucket}/logs"}, "model": {"checkpoint": f"{bucket}/models/tiny.safetensors"}}
    there = make_config(train={"epochs": 1}, **places)
    report = train(there)
    assert report.checkpoint == f"{bucket}/models/tiny.safetensors" and report.num_rows == train(here).num_rows
    # The header says where the traffic was; the weights are the same.
    models = [build_model(c.model.factory, c.model.args, c.traffic.schema_of_columns()) for c in (here, there)]
    for model, config in zip(models, (here, there), strict=True):
        load_checkpoint(model, config.model.checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))
