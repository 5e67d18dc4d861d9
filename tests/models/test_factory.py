"""Building models by name, and building them without committing memory."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from lowprec.core.errors import ConfigError, ModelError
from lowprec.models.dlrm import DLRM
from lowprec.models.factory import build_model, load_factory, without_table_init
from lowprec.traffic.schema import Schema, SparseFeature

SCHEMA = Schema(label="y", dense=("d",), sparse=(SparseFeature("a", "a", num_embeddings=5),))


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    source = """
        import torch
        from torch import nn
        def plain(size): return nn.Linear(size, 1)
        def with_schema(schema, size=2): return nn.Linear(len(schema.dense) + size, 1)
        def text(): return "a model"
        def broken(): return {}["weights"]
        not_callable = 3
    """
    (tmp_path / "shop_models.py").write_text(textwrap.dedent(source))
    (tmp_path / "shop_broken.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    # The current folder must be found without help.
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield
    sys.modules.pop("shop_models", None)


def test_the_built_in_model_by_its_default_name():
    model = build_model("lowprec.models.dlrm:build", {"embedding_dim": 8}, SCHEMA)
    assert isinstance(model, DLRM)
    assert model.tables["a"].embedding_dim == 8


def test_a_module_in_the_current_folder(user_module):
    assert build_model("shop_models:plain", {"size": 3}, SCHEMA).in_features == 3
    assert build_model("shop_models:with_schema", {}, SCHEMA).in_features == 3


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "sentence"),
    [
        ("shop_models", {}, ConfigError, "expected package.module:function"),
        ("shop_models:", {}, ConfigError, "expected package.module:function"),
        ("shop_nowhere:build", {}, ModelError, "cannot import shop_nowhere"),
        ("shop_broken:build", {}, ModelError, "No module named 'a_library_that_is_not_there'"),
        ("shop_models:build", {}, ModelError, "has no function build"),
        ("shop_models:not_callable", {}, ModelError, "has no function not_callable"),
        ("shop_models:plain", {}, ConfigError, "missing a required argument: 'size'"),
        ("shop_models:plain", {"size": 1, "colour": 2}, ConfigError, "unexpected keyword argument 'colour'"),
        ("shop_models:text", {}, ModelError, "must return a torch.nn.Module; got str"),
        ("shop_models:broken", {}, ModelError, "failed with KeyError: 'weights'"),
    ],
)
def test_factories_that_cannot_be_used_are_explained(user_module, name, arguments, kind, sentence):
    with pytest.raises(kind) as raised:
        build_model(name, arguments, SCHEMA)
    assert name in str(raised.value) or "model.args" in str(raised.value)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_load_factory_returns_the_function():
    assert load_factory("lowprec.models.dlrm:build").__name__ == "build"


class _OwnInit(nn.EmbeddingBag):
    def reset_parameters(self):
        raise AssertionError("must not run")


def test_without_table_init_covers_subclasses_and_ends():
    with without_table_init():
        bag = _OwnInit(4, 2)
    assert bag.weight.shape == (4, 2)
    with pytest.raises(AssertionError, match="must not run"):
        _OwnInit(4, 2)
    torch.manual_seed(0)
    assert nn.EmbeddingBag(100, 2).weight.std() > 0.5


MEASURE = """
import sys, torch
from contextlib import nullcontext
from lowprec.models.factory import build_model, without_table_init
from lowprec.traffic.schema import Schema, SparseFeature

def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

rows, with_init = int(sys.argv[1]), sys.argv[2] == "init"
schema = Schema(label="y", dense=("d",), sparse=(SparseFeature("a", "a", num_embeddings=rows),))
small = Schema(label="y", dense=("d",), sparse=(SparseFeature("a", "a", num_embeddings=10),))
build_model("lowprec.models.dlrm:build", {}, small)
before = resident()
with nullcontext() if with_init else without_table_init():
    model = build_model("lowprec.models.dlrm:build", {"embedding_dim": 16}, schema)
print(resident() - before, model.tables["a"].weight.nbytes)
"""


def grown(rows, mode):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(rows), mode], capture_output=True, text=True, check=True, timeout=120
    )
    return tuple(map(int, done.stdout.split()))


def test_building_without_table_init_commits_no_memory():
    growth, table_bytes = grown(1 << 24, "no-init")
    assert table_bytes == 1 << 30
    assert growth < 32 << 20
    # The measurement itself: with initialisation the memory is there.
    growth, table_bytes = grown(1 << 21, "init")
    assert growth >= table_bytes


FILLED = """
import torch
from torch import nn
from lowprec.models.factory import without_table_init

def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

before = resident()
with without_table_init():
    bag, dense = nn.EmbeddingBag(1 << 22, 16), nn.Linear(4, 4)
    nn.init.normal_(bag.weight)
    nn.init.xavier_uniform_(tensor=bag.weight)
    bag.weight.data.uniform_(-1, 1)
    with torch.no_grad():
        bag.weight.copy_(torch.ones(16)).mul_(2)
    nn.init.constant_(dense.weight, 3.0)
assert (dense.weight == 3).all()
print(resident() - before, bag.weight.nbytes)
nn.init.ones_(bag.weight)
assert bag.weight[-1].sum() == 16
"""


def test_tables_that_a_factory_fills_commit_no_memory_either():
    done = subprocess.run([sys.executable, "-c", FILLED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    growth, table_bytes = map(int, done.stdout.split())
    assert growth < table_bytes / 8
