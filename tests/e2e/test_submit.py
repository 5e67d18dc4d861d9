"""Searches and verifications as jobs of a cluster that was started a moment ago, as a user does it.

lowprec is installed here as on any cluster, not in place: only so can the sources in a working dir hide it. The cluster
is started from an environment that is not activated, and asks for a token.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import lowprec as package

ROOT = Path(__file__).parents[2]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}

# A model of a user's own, in two files. In a job it takes its time, so that a search can be met while it runs.
MY_MODEL = """
import time
import my_pause
from lowprec.models.dlrm import build as build_dlrm


def build(schema, **args):
    model = build_dlrm(schema, **args)
    model.register_forward_pre_hook(lambda *_: time.sleep(my_pause.SECONDS))
    return model
"""
MY_PAUSE = "import os\nSECONDS = 0.01 if 'RAY_JOB_CONFIG_JSON_ENV_VAR' in os.environ else 0\n"


@dataclass(frozen=True)
class Installation:
    """An environment with lowprec and Ray, and the variables for its commands."""

    bin: Path
    environment: dict[str, str]

    def run(self, *args, cwd=None, **environment):
        command = [self.bin / args[0], *map(str, args[1:])]
        variables = {**self.environment, **environment}
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=variables, timeout=300)

    def start(self, *args, cwd=None):
        command = [self.bin / args[0], *map(str, args[1:])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, text=True, cwd=cwd, env=self.environment, start_new_session=True, **pipes)


@pytest.fixture(scope="module")
def installation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (site / "lowprec").symlink_to(ROOT / "lowprec")
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "others.pth").write_text("".join(f"{path}\n" for path in others))
    for name, module in (("lowprec", "lowprec.cli.main"), ("ray", "ray.scripts.scripts")):
        script = folder / "bin" / name
        script.write_text(f"#!{folder}/bin/python\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
        script.chmod(0o755)
    ours = ("RAY_", "PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"PATH": "/usr/bin:/bin", "RAY_USAGE_STATS_ENABLED": "0", **TOKEN}
    return Installation(folder / "bin", environment)


@pytest.fixture(scope="module")
def cluster(installation):
    """The address of a cluster of one node; other Rays on this machine are none of its business, nor it of theirs."""
    # Ray puts sockets there, whose paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="lowprec-ray-", dir="/tmp"))
    port, dashboard, agent, client = _free_ports(4)
    address = f"http://127.0.0.1:{dashboard}"
    options = (f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}")
    options += (f"--ray-client-server-port={client}", f"--temp-dir={folder}", "--num-cpus=2")
    with (folder / "start.log").open("w") as log:
        command = [installation.bin / "ray", "start", "--head", "--block", *options]
        command += ["--object-store-memory=100000000"]
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env=installation.environment, start_new_session=True
        )

    def refuses():
        return installation.run("lowprec", "submit", "status", "--address", address).returncode

    try:
        deadline = time.monotonic() + 120
        # First by its port: the command takes seconds to begin, and would be asked many times.
        while not _listens(dashboard) or refuses():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "start.log").read_text()
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()  # it then stops all that it has started
        try:
            process.wait(60)
        finally:
            _kill_what_is_left(folder)
            shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count):
    """Ports that nobody has now, outside the range that Ray gives to its workers."""
    servers = []
    while len(servers) < count:
        server = socket.create_server(("127.0.0.1", 0))
        if not 10002 <= server.getsockname()[1] <= 19999:
            servers.append(server)
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def _listens(port):
    """Whether a server is there."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _kill_what_is_left(folder):
    """Processes of the cluster in this folder, and no others."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if f"{folder}/".encode() in command:
            os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture(scope="module")
def user(small_folder, tmp_path_factory):
    """A user's folder: a config with relative paths, a model, data, and lowprec's own sources beside them."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "traffic").symlink_to(small_folder / "traffic")
    (folder / "model.safetensors").symlink_to(small_folder / "model.safetensors")
    (folder / "my_model.py").write_text(MY_MODEL)
    (folder / "my_pause.py").write_text(MY_PAUSE)
    _copy_sources(folder)
    return folder


def _copy_sources(folder):
    """What Ray would send of the source tree: the compiled module is not under version control."""
    shutil.copytree(ROOT / "lowprec", folder / "lowprec", ignore=shutil.ignore_patterns("*.so", "__pycache__"))


@pytest.fixture(scope="module")
def config(user, small_folder):
    """Writes config files of the user's: the small config with relative paths, and changes by dotted key."""

    def write(**changes):
        document = yaml.safe_load((small_folder / "runs" / "config.yaml").read_text())
        document["results"]["root"] = "runs"
        document["traffic"]["path"] = "traffic"
        document["model"] |= {"checkpoint": "model.safetensors", "factory": "my_model:build"}
        document["search"]["max_trials"] = 8
        for key, value in changes.items():
            section, name = key.split("__")
            document[section][name] = value
        path = user / f"{'-'.join(['job', *changes])}.yaml"
        path.write_text(yaml.safe_dump(document))
        return path.name

    return write


@pytest.fixture(scope="module")
def searched(installation, cluster, user, config):
    """A search on workers of the cluster, followed to its end."""
    arguments = ("--address", cluster, "--follow", "--json")
    name = config(evaluation__num_workers=1)
    done = installation.run("lowprec", "submit", "search", name, *arguments, cwd=user)
    assert done.returncode in (0, 2, 4), done.stderr
    return done, json.loads(done.stdout)


def trials(root, run_id):
    frame = package.query(f"SELECT * FROM trials WHERE run_id = '{run_id}' ORDER BY evaluation, number", root=str(root))
    return frame.drop(columns=["run_id", "row_key", "committed_at"]).to_json(orient="records")


def ray_job(installation, cluster, working_dir, *command, cwd):
    """Submit with Ray's own tool; a call waits and gives all that it printed, and the exit code of the job."""
    options = ("--address", cluster, "--working-dir", working_dir)
    submitted = installation.start("ray", "job", "submit", *options, "--", *command, cwd=cwd)

    def wait():
        out, err = submitted.communicate(timeout=300)
        said = re.search(r"failed with exit code (\d+)", out + err)
        assert said or submitted.returncode == 0, out + err
        return out + err, int(said[1]) if said else 0

    return wait


def test_a_search_is_followed_to_its_end_on_the_cluster(searched, installation, cluster, user):
    done, document = searched
    verdict = {0: "certified", 2: "rejected", 4: "inconclusive"}[done.returncode]
    assert (document["command"], document["address"], document["exit_code"]) == (
        "submit search",
        cluster,
        done.returncode,
    )
    assert document["document"]["verdict"] == document["verdict"] == verdict
    assert document["document"]["num_trials"] == 8 and document["document"]["run_id"] == document["run_id"]
    assert "sent with the job: my_model.py, my_pause.py" in done.stderr
    assert f"run {document['run_id']}" in done.stderr and "schema_version" not in done.stderr
    # Another process sees the results, where the user's config said, and the cluster saw the workers.
    found = installation.run("lowprec", "results", "SELECT status, verdict FROM runs", "--format", "json", cwd=user)
    assert json.loads(found.stdout)["rows"] == [{"status": "done", "verdict": verdict}]
    code = (
        "import sys; from ray.job_submission import JobSubmissionClient as C;"
        "print(C(sys.argv[1]).get_job_info(sys.argv[2]).driver_info)"
    )
    driver = installation.run("python", "-c", code, cluster, document["job"], cwd=user.parent)
    assert "pid=" in driver.stdout, driver.stderr


def test_a_job_can_be_looked_at_afterwards(searched, installation, cluster, user):
    _, document = searched
    job, there = document["job"], ("--address", cluster)
    listed = installation.run("lowprec", "submit", "status", "--json", RAY_API_SERVER_ADDRESS=cluster)
    (found,) = [j for j in json.loads(listed.stdout)["jobs"] if j["job"] == job]
    assert (found["job_command"], found["name"], found["verdict"]) == ("search", "small", document["verdict"])
    one = installation.run("lowprec", "submit", "status", job, *there)
    assert f"job {job}: {document['verdict']}" in one.stdout
    assert f"lowprec results --root {user}/runs --run {document['run_id']}" in one.stdout
    log = installation.run("lowprec", "submit", "logs", job, *there).stdout
    assert f"run {document['run_id']}" in log and '"schema_version": 1' in log
    again = installation.run("lowprec", "submit", "logs", job, *there, "--follow", "--json")
    assert again.returncode == document["exit_code"] and json.loads(again.stdout)["document"] == document["document"]
    stopped = installation.run("lowprec", "submit", "stop", job, *there, "--json")
    assert json.loads(stopped.stdout)["state"] == document["state"]
    assert f"job {job} was over already" in stopped.stderr


def test_a_plan_that_is_refused_is_no_success(searched, installation, cluster, user, config):
    _, document = searched
    plan = Path(document["document"]["plan_path"]).relative_to(user)
    options = ("--plan", plan, "--budget", 1e-9, "--window", "confirm", "--address", cluster)
    verified = installation.run("lowprec", "submit", "verify", config(), *options, "--follow", cwd=user)
    assert verified.returncode in (2, 4), verified.stderr
    verdict = {2: "rejected", 4: "inconclusive"}[verified.returncode]
    assert f": {verdict}" in verified.stdout and f"{verdict} against a budget of 1e-09 %" in verified.stderr


def test_a_search_that_is_stopped_goes_on_with_the_trials_of_one_left_alone(
    installation, cluster, user, config, lowprec, tmp_path
):
    name = config(search__max_trials=100_000, results__root="stopped")
    there = ("--address", cluster)
    follower = installation.start("lowprec", "submit", "search", name, *there, "--follow", cwd=user)
    deadline = time.monotonic() + 120
    while not (user / "stopped" / "trials" / "_delta_log").is_dir():
        assert follower.poll() is None and time.monotonic() < deadline, follower.communicate()
        time.sleep(0.1)
    os.killpg(follower.pid, signal.SIGINT)
    _, said = follower.communicate(timeout=60)
    assert follower.returncode == 130 and "Traceback" not in said and "the job goes on" in said
    (job,) = set(re.findall(r"lowprec submit stop (\S+)", said))

    running = json.loads(installation.run("lowprec", "submit", "status", job, *there, "--json").stdout)
    assert running["state"] == "running" and running["exit_code"] is None
    stopped = installation.run("lowprec", "submit", "stop", job, *there)
    assert stopped.returncode == 0 and f"job {job}: stopped" in stopped.stdout
    run = running["run_id"]
    assert f"lowprec submit search CONFIG --resume {run}" in stopped.stdout
    assert list(package.query("SELECT status FROM runs", root=str(user / "stopped")).status) == ["stopped"]

    num_done = len(json.loads(trials(user / "stopped", run)))
    more = ("--resume", run, "--max-trials", num_done + 7)
    resumed = installation.run("lowprec", "submit", "search", name, *there, *more, "--follow", "--json", cwd=user)
    assert json.loads(resumed.stdout)["run_id"] == run, resumed.stderr
    alone = ("--max-trials", num_done + 7, "--set", f"results.root={tmp_path}", "--json")
    undisturbed = lowprec("search", name, *alone, cwd=user)
    assert undisturbed.code == resumed.returncode
    assert trials(user / "stopped", run) == trials(tmp_path, undisturbed.document["run_id"])


def test_what_is_wrong_is_said_before_anything_is_sent(installation, cluster, user, config):
    def listed():
        return json.loads(installation.run("lowprec", "submit", "status", "--address", cluster, "--json").stdout)[
            "jobs"
        ]

    def refused(code, said, *arguments, **environment):
        done = installation.run("lowprec", "submit", *arguments, cwd=user, **environment)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert said in error

    before, there = listed(), ("--address", cluster)
    refused(64, "search.budget", "search", config(), "--set", "search.budget=0", *there)
    refused(64, "plan nowhere.json: cannot be read", "verify", config(), "--plan", "nowhere.json", *there)
    refused(64, "knows no such job", "stop", "nothing", *there)
    refused(3, "asks for a token: set RAY_AUTH_MODE=token", "search", config(), *there, RAY_AUTH_MODE="disabled")
    refused(3, "refuses the token", "search", config(), *there, RAY_AUTH_TOKEN="f" * 32)
    assert listed() == before


def test_sources_in_the_working_dir_hide_the_installed_lowprec_and_say_so(
    installation, cluster, config, user, tmp_path
):
    """Why `lowprec submit` sends no sources: with them the compiled module is missing."""
    _copy_sources(tmp_path)
    (tmp_path / "job.yaml").write_text((user / config()).read_text())
    command = (installation.bin / "python", "-m", "lowprec", "search", "job.yaml")
    said, code = ray_job(installation, cluster, ".", *command, cwd=tmp_path)()
    (error,) = {line for line in said.splitlines() if line.startswith("error:")}
    assert code == 3 and "sources without their native module" in error and "lowprec submit" in error
    assert f"they hide the lowprec installed in {installation.bin.parent}" in error


def test_the_job_scripts_do_what_the_commands_do_on_the_cluster_of_the_job(
    searched, installation, cluster, user, config
):
    done, document = searched
    changes = {"traffic__path": str(user / "traffic"), "model__checkpoint": str(user / "model.safetensors")}
    changes |= {"model__factory": "lowprec.models.dlrm:build", "results__root": str(user / "scripts")}
    jobs, python = ROOT / "jobs", installation.bin / "python"
    on_workers = user / config(**changes, evaluation__num_workers=1)
    searching = ray_job(installation, cluster, jobs, python, "search.py", on_workers, "--max-trials", 5, cwd=user)
    # The model has another name here.
    made = json.loads(Path(document["document"]["plan_path"]).read_text())
    renamed = user / "renamed-plan.json"
    renamed.write_text(json.dumps({**made, "model": changes["model__factory"]}))
    plan = ("--plan", renamed)
    verifying = ray_job(installation, cluster, jobs, python, "verify.py", user / config(**changes), *plan, cwd=user)
    debugging = ray_job(installation, cluster, jobs, python, "debug.py", user / config(**changes), *plan, cwd=user)
    said, code = searching()
    assert code in (0, 2, 4) and '"num_trials": 5' in said, said
    said, code = verifying()
    assert code == done.returncode and f'"verdict": "{document["verdict"]}"' in said, said
    said, code = debugging()
    assert code == 0 and '"is_as_planned": true' in said, said
