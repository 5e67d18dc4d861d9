"""Commands on files in folders with unusual names, and on libraries that panic."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from lowprec.cli import console
from lowprec.cli import main as cli
from lowprec.core import exit_codes

NAMES = ["R&D données (v2) #1", "50%25 [bold]off[/x]", "a?b*c 'd' \"e\" {f}", "s3:bucket"]


@pytest.fixture(autouse=True)
def own_console(monkeypatch):
    """A command leaves the console with the stdout that it had, which here is gone afterwards."""
    monkeypatch.setattr(console.stdout, "_file", None)
    monkeypatch.setattr(console, "_document_stream", [sys.stdout])


def run(*args):
    """A command in this process."""
    return CliRunner().invoke(cli.cli, [str(arg) for arg in args], standalone_mode=False)


@pytest.mark.parametrize("name", NAMES)
def test_traffic_checkpoint_and_exports_may_be_anywhere(name, small_config, tmp_path, monkeypatch):
    config = small_config("search.max_trials=2", "evaluation.num_workers=0", f"name={json.dumps('t ' + name)}")
    odd = tmp_path / name
    shutil.copytree(config.traffic.path, odd / "clicks")
    shutil.copyfile(config.model.checkpoint, odd / "m o.safetensors")
    monkeypatch.chdir(tmp_path)
    document = json.loads(config.to_json())
    document["traffic"]["path"], document["model"]["checkpoint"] = f"{name}/clicks", f"{name}/m o.safetensors"
    (odd / "job.yaml").write_text(yaml.safe_dump(document))
    assert run("search", odd / "job.yaml", "--dry-run").return_value == 0
    assert run("search", odd / "job.yaml").return_value in (0, 2, 4)
    (plan,) = (tmp_path / "runs" / "artifacts").glob("*/plan.json")
    shutil.copyfile(plan, odd / "plan [1].json")
    plan = odd / "plan [1].json"
    assert run("verify", odd / "job.yaml", "--plan", plan).return_value in (0, 2, 4)
    assert run("export", odd / "job.yaml", "--plan", plan, "--out", odd / "ser ved").return_value == 0
    assert (odd / "ser ved" / "manifest.json").is_file()


def test_a_root_that_cannot_be_used_costs_nothing(small_config, tmp_path):
    config = small_config("evaluation.num_workers=0")
    document = json.loads(config.to_json())
    document["results"]["root"] = str(tmp_path / "a[1]" / "runs")
    document["traffic"]["path"] = str(tmp_path / "not-opened")
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(document))
    for command in (
        ("search", job),
        ("search", job, "--dry-run"),
        ("verify", job, "--uniform", "int4"),
        ("results", "--root", document["results"]["root"]),
    ):
        done = run(*command)
        assert done.return_value == exit_codes.ERROR
        said = done.stderr
        assert said.count("error: ") == 1 and "panicked" not in said
        assert "cannot use a path with '[' and ']' in it" in said
    assert not Path(document["results"]["root"]).exists()


class PanicException(BaseException):
    """As pyo3 raises it: not an `Exception`."""


def test_a_panic_of_a_library_is_an_error(small_config, tmp_path, monkeypatch, capfd):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(json.loads(small_config().to_json())))

    def panic(*_, **__):
        raise PanicException("index out of bounds")

    monkeypatch.setattr("lowprec.session.session.checkpoint_sha256", panic)
    done = run("search", tmp_path / "job.yaml", "--json")
    assert done.return_value == exit_codes.ERROR
    assert "error: a library panicked: index out of bounds" in done.stderr and "Traceback" not in done.stderr
    assert json.loads(capfd.readouterr().out)["error"]["exit_code"] == exit_codes.ERROR
