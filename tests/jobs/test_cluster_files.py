"""The files for clusters: Ray's launcher and KubeRay take them, and what they run and configure is lowprec as it is."""

import os
import re
import shlex
import subprocess
import time
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import lowprec
from lowprec.cli.main import cli
from lowprec.config import EvaluationConfig, load_config
from lowprec.core.exit_codes import STATES
from lowprec.core.sizes import parse_bytes

ROOT = Path(__file__).parents[2]
LAUNCHER = (ROOT / "cluster.yaml").read_text()
KUBERNETES = ROOT / "configs" / "kubernetes"
DOCKERFILE = (KUBERNETES / "Dockerfile").read_text()
FILES = ("rayjob-search.yaml", "cronjob-monitor.yaml")
PINNED_RAY = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]


def documents(name: str) -> dict[str, dict[str, Any]]:
    """What a file for Kubernetes holds, by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all((KUBERNETES / name).read_text())}


RAYJOB = documents("rayjob-search.yaml")
CRONJOB = documents("cronjob-monitor.yaml")
CLUSTER = RAYJOB["RayJob"]["spec"]["rayClusterSpec"]
WORKERS = CLUSTER["workerGroupSpecs"][0]
HEAD_POD, WORKER_POD = CLUSTER["headGroupSpec"]["template"]["spec"], WORKERS["template"]["spec"]
MONITOR = CRONJOB["CronJob"]["spec"]["jobTemplate"]["spec"]
MONITOR_POD = MONITOR["template"]["spec"]


def elsewhere() -> dict[str, dict[str, Any]]:
    """The providers that cluster.yaml has in its last comment: the keys to put in place of others."""
    blocks = re.split(r"^# (\w[^\n]*):\n", LAUNCHER.partition("# Elsewhere")[2], flags=re.MULTILINE)[1:]
    return {
        name: yaml.safe_load("\n".join(line.removeprefix("#") for line in text.splitlines()))
        for name, text in zip(blocks[::2], blocks[1::2], strict=True)
    }


def test_the_launcher_takes_cluster_yaml_here_and_elsewhere() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(LAUNCHER)
    variants = {"as it is": config}
    for name, keys in elsewhere().items():
        changed = {**deepcopy(config), **keys}
        if "available_node_types" in keys:
            types = deepcopy(config["available_node_types"])
            changed["available_node_types"] = {k: {**types[k], **v} for k, v in keys["available_node_types"].items()}
        else:
            del changed["available_node_types"], changed["head_node_type"]
        variants[name] = changed
    assert [v["provider"]["type"] for v in variants.values()] == ["aws", "gcp", "azure", "local"]
    for variant in variants.values():
        validate_config(prepare_config(deepcopy(variant)))
    config["available_node_types"]["worker"]["min_worker"] = 1
    with pytest.raises(Exception, match="min_worker"):
        validate_config(prepare_config(config))


def test_the_launcher_sends_a_tree_that_builds_and_hides_nothing() -> None:
    config = yaml.safe_load(LAUNCHER)
    ((target, source),) = config["file_mounts"].items()
    assert source == "." and Path(target).name != "lowprec"
    assert {".venv", "runs", "**/*.so"} <= set(config["rsync_exclude"])
    assert any(command.startswith(f"cd {target} &&") for command in config["setup_commands"])
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


def test_the_workers_that_cluster_yaml_speaks_of_fit_its_machines() -> None:
    config = yaml.safe_load(LAUNCHER)
    worker = config["available_node_types"]["worker"]
    advised = yaml.safe_load(re.findall(r"^ +# evaluation: (\{.*\})\.$", LAUNCHER, re.MULTILINE)[0])
    evaluation = EvaluationConfig(**advised)
    assert evaluation.worker_memory
    on_each = worker["resources"]["CPU"] // evaluation.threads_per_worker
    assert evaluation.num_workers == worker["min_workers"] * on_each
    memory = parse_bytes(re.findall(r"InstanceType: r7i.4xlarge # (.*)$", LAUNCHER, re.MULTILINE)[0])
    for node in ("head", "worker"):
        (shared,) = re.findall(r"--object-store-memory=(\d+)", config[f"{node}_start_ray_commands"][-1])
        # What the machine itself takes is not known; a fourteenth of its memory is plenty.
        assert on_each * evaluation.worker_memory + int(shared) < 0.93 * memory


def test_images_have_the_ray_and_the_python_that_lowprec_is_tested_with() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needs,) = (Requirement(r) for r in project["dependencies"] if r.startswith("ray["))
    for image in (
        yaml.safe_load(LAUNCHER)["docker"]["image"],
        re.findall(r"^ARG RAY_IMAGE=(.*)$", DOCKERFILE, re.M)[0],
    ):
        tag = re.fullmatch(r"rayproject/ray:([\d.]+)-py(\d)(\d+)-cpu", image)
        assert tag and tag[1] == PINNED_RAY and needs.specifier.contains(tag[1])
        assert SpecifierSet(project["requires-python"]).contains(f"{tag[2]}.{tag[3]}")
    assert CLUSTER["rayVersion"] == PINNED_RAY
    for pod in (HEAD_POD, WORKER_POD, MONITOR_POD):
        assert pod["containers"][0]["image"] == f"my-registry/lowprec:{lowprec.__version__}"
    assert f"-t my-registry/lowprec:{lowprec.__version__}" in DOCKERFILE


def test_the_image_is_built_from_files_that_are_there() -> None:
    copied = re.findall(r"^COPY (?!--from)(\S+) ", DOCKERFILE, re.MULTILINE)
    assert copied and all((ROOT / path).exists() for path in copied)
    stages = re.findall(r"^FROM \S+(?: AS (\w+))?$", DOCKERFILE, re.MULTILINE)
    assert set(re.findall(r"--from=(\w+)", DOCKERFILE)) <= set(stages)
    ignored = (KUBERNETES / "Dockerfile.dockerignore").read_text().split()
    assert {".venv", "**/*.so"} <= set(ignored)


def command_lines() -> list[list[str]]:
    """Every command of lowprec's that the files run, or tell people to run."""
    found = [RAYJOB["RayJob"]["spec"]["entrypoint"], shlex.join(MONITOR_POD["containers"][0]["command"])]
    for text in (LAUNCHER, DOCKERFILE, (ROOT / "README.md").read_text()):
        found += re.findall(r"(?:^#? +|&& |`)(lowprec submit [^`\n]*|lowprec doctor\b)", text, re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in found]


def test_every_command_line_is_one_that_lowprec_takes() -> None:
    lines = command_lines()
    assert {line[0] for line in lines} == {"search", "monitor", "doctor", "submit"}
    for line in lines:
        command: click.Command = cli
        name, rest = "lowprec", line
        while isinstance(command, click.Group) and rest:
            name, *rest = rest
            assert name in command.commands, line
            command = command.commands[name]
        if rest:
            command.make_context(name, list(rest))


@pytest.mark.parametrize("name", FILES)
def test_configs_are_valid_and_mounted_where_the_command_looks(name: str, tmp_path: Path) -> None:
    config = documents(name)["ConfigMap"]
    ((file, text),) = config["data"].items()
    (tmp_path / file).write_text(text)
    loaded = load_config(tmp_path / file)
    assert loaded.name == "production"
    pods = (HEAD_POD, WORKER_POD) if name == FILES[0] else (MONITOR_POD,)
    command = (
        RAYJOB["RayJob"]["spec"]["entrypoint"].split() if name == FILES[0] else pods[0]["containers"][0]["command"]
    )
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert volumes.keys() == mounts.keys()
        assert volumes["config"]["configMap"]["name"] == config["metadata"]["name"]
        assert f"{mounts['config']}/{file}" in command
        assert loaded.model.checkpoint.startswith(mounts["models"])
        assert {source["secretRef"]["name"] for source in pod["containers"][0]["envFrom"]} == secrets(name).keys()
    for path in (loaded.traffic.path, loaded.results.root):
        assert path.startswith("s3://")


def secrets(name: str) -> dict[str, set[str]]:
    """The secrets that a file tells people to create, and the keys in each."""
    text = (KUBERNETES / name).read_text().replace("\\\n#", "")
    found = re.findall(r"^# +kubectl create secret generic (\S+) (.*)$", text, re.MULTILINE)
    return {secret: set(re.findall(r"--from-literal=(\w+)=", keys)) for secret, keys in found}


def test_a_secret_that_both_files_create_is_the_same_and_the_webhook_has_one() -> None:
    search, monitor = (secrets(name) for name in FILES)
    shared = search.keys() & monitor.keys()
    assert shared and all(search[secret] == monitor[secret] for secret in shared)
    (webhook,) = re.findall(r"url_env: (\w+)", CRONJOB["ConfigMap"]["data"]["monitor.yaml"])
    assert any(webhook in keys for keys in monitor.values())


def test_pods_have_what_the_workers_need(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(RAYJOB["ConfigMap"]["data"]["search.yaml"])
    evaluation = load_config(tmp_path / "search.yaml").evaluation
    resources = WORKER_POD["containers"][0]["resources"]
    cpus = int(resources["requests"]["cpu"])
    assert evaluation.address == "auto" and evaluation.worker_memory
    assert evaluation.num_workers * evaluation.threads_per_worker == WORKERS["replicas"] * cpus
    assert WORKERS["minReplicas"] == WORKERS["replicas"]  # a search does not wait long for its workers
    shared = int(WORKERS["rayStartParams"]["object-store-memory"])
    # Ray kills workers from 95 percent of a pod's memory on.
    needed = cpus // evaluation.threads_per_worker * evaluation.worker_memory + shared
    assert needed < 0.95 * parse_bytes(resources["requests"]["memory"])
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (tmp_path / "monitor.yaml").write_text(CRONJOB["ConfigMap"]["data"]["monitor.yaml"])
    monitor = load_config(tmp_path / "monitor.yaml").evaluation
    assert monitor.num_workers == 0
    assert str(monitor.threads_per_worker) == MONITOR_POD["containers"][0]["resources"]["requests"]["cpu"]
    for pod in (HEAD_POD, WORKER_POD, MONITOR_POD):
        found = pod["containers"][0]["resources"]
        assert found["requests"] == found["limits"]


def test_a_verdict_is_not_tried_again_and_nothing_is_left_behind() -> None:
    search = RAYJOB["RayJob"]
    assert (search["apiVersion"], search["spec"]["backoffLimit"]) == ("ray.io/v1", 0)
    assert search["spec"]["shutdownAfterJobFinishes"] and search["spec"]["ttlSecondsAfterFinished"] > 0
    assert yaml.safe_load(search["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    # The fields of ray.io/v1 (as of August 2026) that are of use here: a misspelt one would be dropped.
    assert search["spec"].keys() <= {
        *("entrypoint", "backoffLimit", "activeDeadlineSeconds", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"),
        *("runtimeEnvYAML", "rayClusterSpec", "submissionMode", "submitterPodTemplate", "suspend", "metadata"),
    }
    # The modes that follow the log kill a job whose log stream breaks.
    assert search["spec"]["submissionMode"] == "HTTPMode" and "submitterPodTemplate" not in search["spec"]
    assert CLUSTER.keys() <= {"rayVersion", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling"}
    assert WORKERS.keys() == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    cron = CRONJOB["CronJob"]
    assert (cron["apiVersion"], cron["spec"]["concurrencyPolicy"]) == ("batch/v1", "Forbid")
    assert MONITOR["ttlSecondsAfterFinished"] > 0 and MONITOR_POD["restartPolicy"] == "Never"
    (rule,) = MONITOR["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == MONITOR_POD["containers"][0]["name"]
    assert rule["onExitCodes"]["values"] == [1, 2, 4, 64]


SCHEDULED = ROOT / "configs" / "monitor"


@pytest.mark.parametrize(
    "name, line",
    [
        ("crontab", r"\.venv/bin/lowprec (monitor .*?) > monitor\.json"),
        ("lowprec-monitor.service", r"ExecStart=\S+/lowprec (monitor .*)"),
        ("airflow_dag.py", r'bash_command="\S+/lowprec (monitor .*)"'),
    ],
)
def test_schedulers_run_the_monitor_as_it_is(name: str, line: str) -> None:
    (found,) = re.findall(line, (SCHEDULED / name).read_text())
    command, *rest = shlex.split(found)
    context = cli.commands[command].make_context(command, rest)
    assert str(context.params["plan"]) == "plan.json"


STAND_IN = """#!/bin/sh
echo "$LOWPREC_WEBHOOK"
echo log >&2
touch started
while [ ! -e go_on ]; do sleep 0.02; done
exit $(cat code)
"""


def test_cron_runs_one_monitor_at_a_time_and_mails_what_matters(tmp_path: Path) -> None:
    """The line as it is, but for where it lies, with a stand-in for the command."""
    (line,) = re.findall(r"^15 \* \* \* \* lowprec (.*)$", (SCHEDULED / "crontab").read_text(), re.MULTILINE)
    assert "%" not in line  # a new line, to cron
    line = line.replace("/srv/lowprec", str(tmp_path)).replace("/etc/lowprec/environment", f"{tmp_path}/environment")
    (tmp_path / "environment").write_text("LOWPREC_WEBHOOK='https://hooks/a?b&c'\n")
    command = tmp_path / ".venv" / "bin" / "lowprec"
    command.parent.mkdir(parents=True)
    command.write_text(STAND_IN)
    command.chmod(0o755)

    def start() -> subprocess.Popen[str]:
        environment = {"PATH": os.environ["PATH"]}
        pipe = subprocess.PIPE
        return subprocess.Popen(["sh", "-c", line], stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment)

    for code, mailed in ((STATES["ok"], ""), (STATES["warn"], "https://hooks/a?b&c\nlog\n")):
        (tmp_path / "code").write_text(str(code))
        for name in ("started", "go_on"):
            (tmp_path / name).unlink(missing_ok=True)
        at_work = start()
        deadline = time.monotonic() + 30
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        overlapping = start()
        assert overlapping.communicate(timeout=30) == ("", None) and overlapping.returncode == 0
        (tmp_path / "go_on").touch()
        assert at_work.communicate(timeout=30)[0] == mailed
        assert (tmp_path / "monitor.json").read_text() == "https://hooks/a?b&c\n"
        assert (tmp_path / "monitor.log").read_text() == "log\n"


def test_schedulers_know_the_exit_codes_of_the_monitor() -> None:
    answers = {STATES["warn"], STATES["breach"], STATES["insufficient_data"]}
    service = (SCHEDULED / "lowprec-monitor.service").read_text()
    (codes,) = re.findall(r"^SuccessExitStatus=(.*)$", service, re.MULTILINE)
    assert {int(code) for code in codes.split()} == answers
    dag = (SCHEDULED / "airflow_dag.py").read_text()
    compile(dag, "airflow_dag.py", "exec")
    assert re.findall(r"skip_on_exit_code=\[(.*)\]", dag) == [f"{STATES['warn']}, {STATES['insufficient_data']}"]
    timer = (SCHEDULED / "lowprec-monitor.timer").read_text()
    assert "OnCalendar=" in timer and "Persistent=true" in timer
