"""What is sent with a job: the resolved config, a plan, the code of the model, and nothing else."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lowprec.config import load_config
from lowprec.core.errors import ConfigError, PlanError
from lowprec.jobs.code import model_code
from lowprec.jobs.staging import CONFIG_NAME, START_NAME, stage_job
from lowprec.storage import Location


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder: a model beside lowprec's own sources, data, and other projects."""
    files = {
        "my_model.py": "import layers, torch\nfrom my_features.ids import fold\nimport lowprec.models\n",
        "layers.py": "import my_model\nimport numpy\n",
        "my_features/__init__.py": "",
        "my_features/ids.py": "from . import words\nimport unreadable\n",
        "my_features/words.py": "",
        "my_features/words.json": "{}",
        "my_features/__pycache__/words.cpython-311.pyc": "x",
        "my_features/.cache": "x",
        "my_features/checkpoints/model.safetensors": "x" * 1000,
        "unreadable.py": "def (\n",
        "numpy/__init__.py": "",  # installed elsewhere, and taken from there
        "lowprec/__init__.py": "",
        "other.py": "",
        "traffic/part.parquet": "x",
        "model.safetensors": "x",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(folder, **changes):
    document = {
        "name": "mine",
        "traffic": {"path": "traffic", "sparse": ["c0"]},
        "windows": {"search": {"start": "2026-01-06", "end": "2026-01-08"}, "confirm": {"start": "2026-01-08"}},
        "model": {"factory": "my_model:build", "checkpoint": "model.safetensors", "args": {"epsilon": 0.00001}},
        "evaluation": {"address": "10.0.0.1:6379", "worker_memory": "8GB"},
        **changes,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(document))
    return load_config(folder / "job.yaml", ("search.budget=0.125",))


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_code_of_the_model_goes_along_and_nothing_else(folder):
    config = config_of(
        folder, model={"factory": "my_model:build", "checkpoint": "my_features/checkpoints/model.safetensors"}
    )
    with stage_job(config, "search") as staged:
        code = {"my_model.py", "layers.py", "unreadable.py"}
        code |= {"my_features/__init__.py", "my_features/ids.py", "my_features/words.py", "my_features/words.json"}
        assert names(staged.folder) == {CONFIG_NAME, START_NAME} | code
        assert staged.code == ("layers.py", "my_features", "my_model.py", "unreadable.py")
    assert not staged.folder.exists()


def test_lowprecs_own_sources_are_never_sent(folder):
    (folder / "lowprec" / "models.py").write_text("")
    with stage_job(config_of(folder, model={"factory": "lowprec.models:build", "checkpoint": "m"}), "search") as staged:
        assert names(staged.folder) == {CONFIG_NAME, START_NAME} and not staged.notes(is_here=True)


def test_the_config_is_resolved_and_its_paths_hold_everywhere(folder, tmp_path_factory, monkeypatch):
    config = config_of(
        folder,
        cost={"minimize": "latency", "calibration": "s3://bucket/calibration.json"},
        results={"root": "~/runs"},
    )
    with stage_job(config, "search") as staged:
        monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
        sent = load_config(staged.folder / CONFIG_NAME)
    assert sent.traffic.path == str(folder / "traffic") and sent.model.checkpoint == str(folder / "model.safetensors")
    assert sent.cost.calibration == "s3://bucket/calibration.json"
    assert sent.results.root == os.path.expanduser("~/runs")
    assert sent.evaluation.address == "auto" and sent.search.budget == 0.125
    # All else is as it was, to the type: 1e-05 in JSON would come back as text.
    same = {"path", "checkpoint", "calibration", "root", "address"}
    before, after = ({k: _without(v, same) for k, v in c.model_dump().items()} for c in (config, sent))
    assert before == after and isinstance(after["model"]["args"]["epsilon"], float)


def _without(section, keys):
    return {k: v for k, v in section.items() if k not in keys} if isinstance(section, dict) else section


def test_notes_say_what_the_cluster_has_to_have(folder):
    with stage_job(
        config_of(folder, model={"factory": "installed_there.models:build", "checkpoint": "m"}), "search"
    ) as s:
        assert s.notes(is_here=True) == [
            "model.factory: installed_there is not in this folder, so it has to be installed on the cluster"
        ]
        (_, seen) = s.notes(is_here=False)
        assert f"traffic.path {folder}/traffic, model.checkpoint {folder}/m, results.root {folder}/runs" in seen
    with stage_job(config_of(folder), "search") as staged:
        assert staged.notes(is_here=True) == ["sent with the job: layers.py, my_features, my_model.py, unreadable.py"]


def test_data_in_the_package_is_refused_by_name(folder, monkeypatch):
    monkeypatch.setattr("lowprec.jobs.staging.MAX_CODE_BYTES", 900)
    named = r"my_features/checkpoints/model.safetensors alone 1,000; at most 900"
    with pytest.raises(ConfigError, match=named), stage_job(config_of(folder), "search"):
        pass


def test_a_link_to_a_folder_above_is_not_followed_and_others_are(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "shared.py").write_text("")
    package = folder / "my_features"
    (package / "itself").symlink_to(package)
    (package / "inner").mkdir()
    (package / "inner" / "up").symlink_to("..")
    for name in ("shared", "again"):
        (package / name).symlink_to(elsewhere)
    sent = {path.as_posix() for path in model_code("my_features", folder) if path.suffix == ".py"}
    inside = {f"my_features/{name}.py" for name in ("__init__", "ids", "words", "shared/shared", "again/shared")}
    assert sent == inside | {"unreadable.py"}


@pytest.mark.parametrize("name", ["weights.bin", "late.py"])
def test_a_link_to_nowhere_is_refused_by_name(folder, name):
    (folder / "my_features" / name).symlink_to("/no/such/file")
    named = rf"model.factory: {folder}/my_features/{name}, .* cannot be read: No such file"
    with pytest.raises(ConfigError, match=named), stage_job(config_of(folder), "search"):
        pass


def test_a_pipe_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "my_features" / "pipe.py")
    with pytest.raises(ConfigError, match=r"pipe.py, .* neither a file nor a folder"):
        model_code("my_features", folder)
    assert model_code("my_features", folder, data=[str(folder / "my_features" / "pipe.py")])


def test_a_package_is_taken_before_a_module_of_its_name(folder):
    (folder / "my_model").mkdir()
    (folder / "my_model" / "build.py").write_text("")
    assert set(model_code("my_model", folder)) >= {Path("my_model.py")}  # without __init__.py, Python takes the module
    (folder / "my_model" / "__init__.py").write_text("")
    assert set(model_code("my_model", folder)) == {Path("my_model/__init__.py"), Path("my_model/build.py")}
    assert model_code("nothing", folder) == {} == model_code("../other", folder)


def test_urls_are_left_to_the_job(folder):
    options = {"--plan": Location("s3://bucket/plan.json"), "--profile": Location("s3://bucket/p.npz")}
    with stage_job(config_of(folder), "verify", options) as staged:
        assert staged.entrypoint.endswith("--plan s3://bucket/plan.json --profile s3://bucket/p.npz")
        assert not (staged.folder / "lowprec-plan.json").exists()


def test_a_plan_is_sent_and_a_missing_one_is_refused(folder):
    (folder / "plan.json").write_text("{}")
    options = {"--plan": Location("plan.json"), "--window": "search", "--budget": None, "--profile": Location("p.npz")}
    with stage_job(config_of(folder), "verify", {**options, "--json": True, "--quick": False}) as staged:
        assert (staged.folder / "lowprec-plan.json").read_text() == "{}"
        assert staged.entrypoint == (
            "sh lowprec-job.sh verify lowprec-job.yaml --plan lowprec-plan.json --window search "
            f"--profile {folder}/p.npz --json"
        )
    missing = stage_job(config_of(folder), "verify", {"--plan": Location("nowhere.json")})
    with pytest.raises(PlanError, match=r"plan nowhere.json: cannot be read: No such file"), missing:
        pass


def test_an_option_that_is_given_several_times_is_sent_as_often(folder):
    with stage_job(
        config_of(folder), "verify", {"--unit": ("table:*=int8", "table:a=int2"), "--uniform": None}
    ) as staged:
        assert staged.entrypoint.endswith("lowprec-job.yaml --unit 'table:*=int8' --unit table:a=int2")
    with stage_job(config_of(folder), "verify", {"--unit": ()}) as staged:
        assert staged.entrypoint.endswith("lowprec-job.yaml")


def start(staged, **environment):
    """Run the entrypoint as Ray does, with a PATH of our own."""
    command = ["sh", "-c", staged.entrypoint]
    return subprocess.run(command, cwd=staged.folder, capture_output=True, text=True, env=environment)


def fake_python(path, has):
    """A Python that has lowprec and Ray, or not."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {int(not has)}\necho "{path} got $@"; exit 4\n')
    path.chmod(0o755)
    return str(path)


def test_the_python_that_has_lowprec_is_taken(folder, tmp_path, monkeypatch):
    mine = fake_python(tmp_path / "my env" / "python", has=True)
    fake_python(tmp_path / "bin" / "python", has=False)
    monkeypatch.setattr(sys, "executable", mine)
    with stage_job(config_of(folder), "search", {"--resume": "a b"}) as staged:
        path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
        found = start(staged, PATH=path)
        assert (found.returncode, found.stdout) == (4, f"{mine} got -m lowprec search {CONFIG_NAME} --resume a b\n")
        theirs = fake_python(tmp_path / "bin" / "python", has=True)
        assert start(staged, PATH=path).stdout.startswith(f"{theirs} got")
        fake_python(tmp_path / "my env" / "python", has=False)
        fake_python(tmp_path / "bin" / "python", has=False)
        none = start(staged, PATH=path)
    assert (
        none.returncode == 3
        and "lowprec submit ... --python PATH" in none.stderr
        and shlex.quote(mine)[1:-1] in none.stderr
    )


def test_a_python_that_is_named_is_the_only_one(folder, tmp_path):
    fake_python(tmp_path / "bin" / "python", has=True)
    with stage_job(config_of(folder), "search", python="/no/such/python") as staged:
        done = start(staged, PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 3 and "/no/such/python" in done.stderr and not done.stdout
