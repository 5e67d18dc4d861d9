"""Settings and fixtures that every folder of tests shares."""

import os
from collections.abc import Callable
from pathlib import Path

# One thread a process: the tests run in parallel, and PyTorch reads this when it is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import yaml
from hypothesis import settings

from lowprec.config import Config, load_config

# Examples are the same in every run, so that a failure in one place can be had in another; no deadline, because the
# time of an example says nothing on a machine that runs other tests beside it.
settings.register_profile("lowprec", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("lowprec")

SMALL_TABLES = (40, 80, 160, 320, 640, 1000)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic traffic with six tables and an untrained DLRM whose tables are rough enough to suffer from int2."""
    import torch

    from lowprec.models.checkpoint import save_checkpoint
    from lowprec.models.factory import build_model
    from lowprec.traffic import SyntheticSpec, generate

    folder = tmp_path_factory.mktemp("small")
    spec = SyntheticSpec(
        num_rows=20_000,
        num_sparse=len(SMALL_TABLES),
        table_sizes=SMALL_TABLES,
        num_multi_hot=2,
        num_dense=3,
        num_interactions=3,
        num_users=300,
    )
    generate(spec, folder / "traffic")
    config = _config(folder, folder / "runs")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(config.model.factory, config.model.args, config.traffic.schema_of_columns())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith("tables."):
                    parameter.normal_(0, 0.3)
    save_checkpoint(model, folder / "model.safetensors", {})
    return folder


@pytest.fixture
def small_config(small_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    """A config on the small traffic and model, with results in a folder of the test's own."""

    def make(*overrides: str) -> Config:
        return _config(small_folder, tmp_path / "runs", *overrides)

    return make


def _config(folder: Path, root: Path, *overrides: str) -> Config:
    document = {
        "name": "small",
        "traffic": {
            "path": str(folder / "traffic"),
            "time": "ts",
            "dense": ["d0", "d1", "d2"],
            "sparse": [{"name": f"c{i}", "num_embeddings": n} for i, n in enumerate(SMALL_TABLES)],
            "batch_size": 1024,
        },
        "windows": {
            "train": {"end": "2026-01-05"},
            "search": {"start": "2026-01-05", "end": "2026-01-08"},
            "confirm": {"start": "2026-01-08"},
        },
        "model": {
            "args": {"embedding_dim": 8, "bottom": [8], "top": [16]},
            "checkpoint": str(folder / "model.safetensors"),
        },
        "search": {"budget": 0.5, "max_trials": 24, "wave_size": 6, "sensitivity_examples": 1024},
        "evaluation": {"num_workers": 0, "batches_per_task": 2},
        "results": {"root": str(root)},
    }
    root.mkdir(parents=True, exist_ok=True)
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return load_config(path, overrides)
