"""A model of a user's own, plain or of TorchRec: train, search, debug, export, load, watch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

TWO_TOWERS = '''
"""Two towers over shared tables, one mean-pooled, and a cross layer between them."""

import torch
from torch import nn


class Cross(nn.Module):
    """x0 * (W x + b) + x."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x0, x):
        return x0 * self.linear(x) + x


class TwoTowers(nn.Module):
    def __init__(self, rows, dim):
        super().__init__()
        self.items = nn.EmbeddingBag(rows, dim, mode="mean", include_last_offset=True)
        self.users = nn.EmbeddingBag(rows, dim, mode="sum")
        self.history = nn.EmbeddingBag(rows, dim, mode="sum", include_last_offset=True)
        self.history.weight = self.items.weight  # what a user saw is items, too
        self.user_tower = nn.Sequential(nn.Linear(2 * dim + 2, 16), nn.ReLU(inplace=True), nn.Linear(16, 8))
        self.item_tower = nn.Sequential(nn.Linear(dim, 16), nn.ReLU(), nn.Linear(16, 8))
        self.cross = Cross(16)
        self.norm = nn.LayerNorm(16)
        self.over = nn.Linear(16, 1)

    def forward(self, dense, sparse):
        ids, ends = sparse["c1"]
        user = self.user_tower(torch.cat([dense, self.users(ids, ends[:-1]), self.history(*sparse["c2"])], dim=1))
        item = self.item_tower(self.items(*sparse["c0"]))
        both = torch.cat([user, item], dim=1)
        return self.over(self.norm(self.cross(both, both))).squeeze(1)


def build(schema, dim):
    rows = max(feature.num_embeddings for feature in schema.sparse)
    return TwoTowers(rows, dim)
'''

TORCHREC = '''
"""TorchRec's DLRM; two features share a table."""

from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType
from torchrec.models.dlrm import DLRM


def build(dim):
    tables = [
        EmbeddingBagConfig(name="t_items", embedding_dim=dim, num_embeddings=800, feature_names=["c0", "c2"]),
        EmbeddingBagConfig(
            name="t_users", embedding_dim=dim, num_embeddings=800, feature_names=["c1"], pooling=PoolingType.MEAN
        ),
    ]
    return DLRM(
        EmbeddingBagCollection(tables=tables),
        dense_in_features=2,
        dense_arch_layer_sizes=[16, dim],
        over_arch_layer_sizes=[16, 1],
    )
'''

JOB = """
name: mine
traffic:
  path: traffic
  time: ts
  dense: [d0, d1]
  sparse:
    - {name: c0, num_embeddings: 800}
    - {name: c1, num_embeddings: 800}
    - {name: c2, num_embeddings: 800}
  batch_size: 1024
  synthetic:
    {num_rows: 30000, num_sparse: 3, table_sizes: [800, 800, 800], num_dense: 2, num_multi_hot: 1, num_interactions: 2}
windows:
  train: {end: 2026-01-05}
  search: {start: 2026-01-05, end: 2026-01-08}
  confirm: {start: 2026-01-08, end: 2026-01-10}
model:
  factory: mymodel:build
  args: {dim: 8}
  checkpoint: model.safetensors
train: {epochs: 3, batch_size: 128, learning_rate: 0.01}
space:
  row_range: ROW_RANGE
  layers: [fp32, bf16, int8_dynamic, int8_static]
search: {budget: 3.0, max_trials: 16, wave_size: 8}
evaluation: {num_workers: 0}
"""


@pytest.fixture(
    scope="module", params=[("towers", TWO_TOWERS, "mse"), ("torchrec", TORCHREC, "minmax")], ids=lambda p: p[0]
)
def served(lowprec, tmp_path_factory, request):
    """The commands, one after the other, in a user's folder."""
    kind, code, row_range = request.param
    if kind == "torchrec" and "CI" not in os.environ:
        pytest.importorskip("torchrec", reason="TorchRec is optional: make setup installs it")
    folder = tmp_path_factory.mktemp(kind)
    (folder / "mymodel.py").write_text(code)
    (folder / "job.yaml").write_text(JOB.replace("ROW_RANGE", row_range))
    done = {}
    for command in (
        ("generate", "job.yaml", "--json"),
        ("train", "job.yaml", "--json"),
        ("search", "job.yaml", "--json"),
    ):
        done[command[0]] = lowprec(*command, cwd=folder)
        assert done[command[0]].code == 0, done[command[0]].err
    plan = done["search"].document["plan_path"]
    for command in (("debug",), ("export", "--out", "served")):
        done[command[0]] = lowprec(command[0], "job.yaml", "--plan", plan, *command[1:], "--json", cwd=folder)
        assert done[command[0]].code == 0, done[command[0]].err
    return SimpleNamespace(kind=kind, folder=folder, plan=plan, done=done)


def test_the_plan_is_certified_and_smaller(served):
    document = served.done["search"].document
    assert document["verdict"] == "certified" and document["bytes"] < 0.6 * document["fp32_bytes"]
    units = set(document["recommendations"][0]["plan"])
    if served.kind == "towers":
        assert units == {"table:items", "table:users"} | {
            f"layer:{name}"
            for name in ("user_tower.0", "user_tower.2", "item_tower.0", "item_tower.2", "linear", "over")
        }
    else:
        assert {"table:t_items", "table:t_users"} < units and len(units) == 6


def test_the_debugger_sees_units_in_the_order_of_the_model(served):
    document = served.done["debug"].document
    assert document["is_as_planned"] and document["num_examples"] > 1000
    order = [unit["unit"] for unit in document["units"]]
    if served.kind == "towers":
        assert order[:3] == ["table:users", "table:items", "layer:user_tower.0"] and order[-1] == "layer:over"
    for unit in document["units"]:
        assert (unit["alone"]["sqnr_db"] is None) == (unit["precision"] == "fp32")
    assert sum(unit["share"] for unit in document["units"]) == pytest.approx(1, abs=1e-3)


LOADED = """
import json, sys
import numpy as np, torch
import lowprec
from lowprec.config import load_config
from lowprec.models.inputs import arguments_of, inputs_of
from lowprec.evaluation.workers.worker import evaluator_of
from lowprec.plan import read_plan
from lowprec.search import open_job

config = load_config("job.yaml")
job = open_job(config)
file = read_plan(sys.argv[1], units=job.units, checkpoint_sha256=job.checkpoint_sha256)
job = job.as_planned(file)
module = lowprec.load("served")
evaluator = evaluator_of(job.spec, job.adapter)
batch = job.window("confirm").batch(0)
with evaluator.using(job.forms):
    expected = evaluator.logits(batch, [file.plan])
with torch.inference_mode():
    found = module(*arguments_of(module, inputs_of(batch))).reshape(-1).numpy()
print(json.dumps({"equal": bool(np.array_equal(found, expected.plans[0])),
                  "differs": bool((found != expected.reference).any()),
                  "modules": sorted({type(m).__name__ for m in module.modules()})}))
"""


def python(served, code, *arguments):
    """What a program prints as JSON, in the user's folder."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=served.folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_loaded_is_what_was_certified(served):
    found = python(served, LOADED, served.plan)
    assert found["equal"] and found["differs"]
    assert "IntNBitTableBatchedEmbeddingBagsCodegen" in found["modules"]
    assert served.done["export"].document["parity"]["num_examples"] > 1000


def test_the_monitor_watches_it(lowprec, served):
    done = lowprec("monitor", "job.yaml", "--plan", served.plan, "--json", "--until", "2026-01-11", cwd=served.folder)
    assert done.code in (0, 4), done.err
    assert [w["num_rows"] > 500 for w in done.document["windows"]] == [True]


def test_a_program_of_it_is_written_or_it_is_said_why_not(lowprec, served):
    arguments = ("--plan", served.plan, "--out", "traced", "--torchscript", "--json")
    done = lowprec("export", "job.yaml", *arguments, cwd=served.folder)
    if served.kind == "towers":
        assert done.code == 0 and Path(served.folder, "traced", "module.ts").exists(), done.err
    else:
        assert done.code == 3 and "takes a KeyedJaggedTensor" in done.document["error"]["message"]
        assert not Path(served.folder, "traced").exists()


QUANTIZED = """
import json, sys
import torch
import torchrec
from torchrec.inference.modules import quantize_embeddings
from lowprec import export
from lowprec.config import load_config
from lowprec.export.parity import certified_outputs
from lowprec.models.checkpoints.checkpoint import load_checkpoint
from lowprec.models.factory import build_model
from lowprec.models.inputs import arguments_of
from lowprec.plan import Precision, read_plan
from lowprec.search import open_job

config = load_config("job.yaml")
job = open_job(config)
file = read_plan(sys.argv[1], units=job.units, checkpoint_sha256=job.checkpoint_sha256)
# TorchRec quantizes tables: layers stay fp32 here.
plan = file.plan.replace({unit: Precision.FP32 for unit in file.plan if unit.startswith("layer:")})
certified = certified_outputs(job.as_planned(file), plan, "confirm", 2)
model = build_model(config.model.factory, config.model.args, config.traffic.schema_of_columns())
load_checkpoint(model, config.model.checkpoint)
model.eval()
quantized = quantize_embeddings(
    model, dtype=torch.qint8, inplace=False, per_table_weight_dtype=export.per_table_weight_dtype("served")
)
state = export.quantized_state_dict("served")
before = {name: tensor.clone() for name, tensor in quantized.state_dict().items() if name in state}

def largest():
    with torch.inference_mode():
        return max(
            float((quantized(*arguments_of(model, b.inputs)).reshape(-1) - b.logits).abs().max()) for b in certified
        )

by_mapping = largest()
missing, unexpected = quantized.load_state_dict(state, strict=False)
same = all(torch.equal(before[n].view(torch.uint8), state[n].view(torch.uint8)) for n in before)
print(json.dumps({"by_mapping": by_mapping, "by_state": largest(), "unexpected": unexpected, "tables": len(before),
                  "rows_equal": same, "dtypes": {k: str(v) for k, v in export.per_table_weight_dtype("served").items()},
                  "types": [type(m).__module__ for m in quantized.modules() if "BagCollection" in type(m).__name__]}))
"""


def test_torchrec_quantizes_by_the_exported_mapping(served):
    if served.kind == "towers":  # for whoever rebuilds it with TorchRec
        mapping = json.loads((served.folder / "served" / "torchrec.json").read_text())["per_table_weight_dtype"]
        assert mapping.keys() == {"items", "users"}
        return
    found = python(served, QUANTIZED, served.plan)
    assert found["types"] == ["torchrec.quant.embedding_modules"] and set(found["dtypes"]) == {"t_items", "t_users"}
    assert found["tables"] == 2 and found["unexpected"] == [] and found["rows_equal"]
    # Two tables, one pooling each: they stay where they are.
    assert not any("puts tables of one pooling together" in w for w in served.done["export"].document["warnings"])
    # Its tables are looked up together and its outputs put in another order of tables: the sums are the same.
    assert found["by_mapping"] < 1e-5 and found["by_state"] < 1e-5
