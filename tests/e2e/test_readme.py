"""The model and the config of the README work as they are printed there."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lowprec.cli.main import cli

README = (Path(__file__).parents[2] / "README.md").read_text()


def block(language, containing):
    (found,) = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in b]
    return found


@pytest.fixture
def folder(tmp_path):
    """A package with the README's model, random weights for it, and a log as its config describes it."""
    import torch
    from safetensors.torch import save_file

    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "models.py").write_text("import torch\n\n\n" + block("python", "class Model"))
    (tmp_path / "config.yaml").write_text(block("yaml", "my_package.models:build"))
    torch.manual_seed(0)
    state = {
        "item.weight": torch.randn(1_000_000, 8) * 0.1,
        "words.weight": torch.randn(100_000, 8) * 0.1,
        "top.weight": torch.randn(1, 26) * 0.1,
        "top.bias": torch.tensor([-1.0]),
    }
    save_file(state, tmp_path / "model.safetensors")
    rng, n = np.random.default_rng(0), 6000
    history = [rng.integers(0, 1000, k).tolist() for k in rng.integers(0, 4, n)]
    table = pa.table(
        {
            "clicked": pa.array(rng.random(n) < 0.3).cast(pa.int8()),
            "ts": pa.array(np.sort(rng.integers(1_767_657_600, 1_768_089_600, n)), pa.int64()).cast(pa.timestamp("s")),
            "user_id": rng.integers(0, 900, n),
            "age": pa.array([None if k % 50 == 0 else float(k % 70) for k in range(n)]),
            "price": rng.exponential(20, n),
            "item_id": rng.integers(0, 1000, n),
            "history": history,
            "history_weight": [rng.random(len(h)).tolist() for h in history],
            "words": [rng.integers(0, 2**60, k).tolist() for k in rng.integers(0, 5, n)],
        }
    )
    pq.write_to_dataset(table, tmp_path / "clicks")
    return tmp_path


def test_the_readmes_model_and_config(lowprec, folder):
    settings = ("--set", "traffic.path=clicks", "--set", "model.args.dim=8", "--max-trials", 6)
    dry = lowprec("search", "config.yaml", *settings, "--dry-run", "--json", cwd=folder)
    assert dry.code == 0, dry.err
    units = {u["name"]: u for u in dry.document["units"]}
    assert sorted(units["table:item"]["features"]) == ["history", "item_id"]
    assert units["table:words"]["precisions"] == ["fp16"]  # fixed
    done = lowprec("search", "config.yaml", *settings, "--json", cwd=folder)
    assert done.code in (0, 2, 4), done.err
    confirm = done.document["confirm"]
    assert confirm["num_units"] < confirm["num_examples"]  # users, not rows


def test_every_command_is_in_the_readme_and_exists(lowprec):
    names = set(re.findall(r"^\| `lowprec ([\w-]+)", README, re.MULTILINE))
    assert names == set(cli.commands)
    for name in names:
        assert lowprec(name, "--help").code == 0


def test_the_readmes_rows_for_serving(folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(block("python", "write_table"), {})
    assert (folder / "item.rows").stat().st_size == 1_000_000 * (4 + 8 // 2)
