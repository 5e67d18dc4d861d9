"""Traffic, checkpoint and results on an object store: a search there is one of a folder, and as hard to lose."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import lowprec as package
from lowprec.cli.demo import generate_traffic
from lowprec.cli.main import cli
from lowprec.config import load_config
from lowprec.core.errors import LowprecError
from lowprec.core.progress import Silent
from lowprec.search import run_search
from lowprec.storage import Location


def upload(path, url):
    with Location.of(url).whole_file() as partial:
        partial.write_bytes(path.read_bytes())


@pytest.fixture
def remote(bucket, small_folder, config_file):
    """The small config with everything in a bucket; changes by dotted key."""
    for file in (small_folder / "traffic").iterdir():
        upload(file, f"{bucket}/logs/{file.name}")
    upload(small_folder / "model.safetensors", f"{bucket}/models/model.safetensors")

    def write(**changes):
        places = {"traffic__path": f"{bucket}/logs", "model__checkpoint": f"{bucket}/models/model.safetensors"}
        path = config_file(**{**places, "results__root": f"{bucket}/runs", **changes})
        return path.rename(path.with_name(f"{len(list(path.parent.iterdir()))}.yaml"))

    return write


def trials(root, run_id):
    frame = package.query(f"SELECT * FROM trials WHERE run_id = '{run_id}' ORDER BY evaluation, number", root=root)
    return frame.drop(columns=["run_id", "row_key", "committed_at"]).to_json(orient="records")


@pytest.fixture
def alone(small_config):
    """The trials of the same search with everything in folders."""
    config = small_config()
    return trials(config.results.root, run_search(config).run_id)


def search(config):
    command = [str(Path(sys.executable).with_name("lowprec")), "search", str(config), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)


def copies():
    return list(Path(os.environ["LOWPREC_SCRATCH"]).rglob("model.safetensors"))


def test_a_search_killed_and_resumed_is_that_of_a_folder(lowprec, remote, bucket, alone, tmp_path, monkeypatch):
    root, elsewhere = f"{bucket}/runs", tmp_path / "elsewhere"
    elsewhere.mkdir()
    config = remote()
    process = search(config)
    wait_until(lambda: "trials" in Location.of(root).names(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (run,) = package.query("SELECT run_id FROM runs", root=root).run_id
    found = Location.of(root) / "artifacts" / run
    assert "profile.npz" in found.names()
    # Whatever is needed is in the bucket: another folder, and another scratch folder, as on another machine.
    monkeypatch.setenv("LOWPREC_SCRATCH", str(tmp_path / "scratch2"))
    done = lowprec("search", config, "--json", "--resume", run, cwd=elsewhere)
    assert done.code in (0, 2, 4), done.err
    assert trials(root, run) == alone
    document = done.document
    assert document["plan_path"] == f"{found}/plan.json" and document["profile_path"] == f"{found}/profile.npz"
    verified = lowprec("verify", config, "--plan", document["plan_path"], "--json", cwd=elsewhere)
    assert verified.code == done.code and verified.document["gap_pct"] == document["confirm"]["gap_pct"], verified.err
    front = lowprec("results", "--root", root, "--run", run, "--format", "json", cwd=elsewhere)
    assert {t["bytes"] for t in document["front"]} <= {r["size_bytes"] for r in json.loads(front.out)["rows"]}
    again = run_search(load_config(config, ("search.max_trials=3",)), profile=document["profile_path"])
    assert again.num_trials == 3
    assert list(elsewhere.iterdir()) == []


def test_two_searches_at_once_on_one_root(remote, bucket, alone, s3):
    """One of them with Ray workers, which inherit the environment. They share one copy of the checkpoint."""
    processes = [search(remote())]
    # Who finds no copy reads the checkpoint for its identity alone, so the other begins when there is one. That takes
    # far longer to start its workers: the first waits for it, and both do their trials at once.
    wait_until(copies, processes[0])
    processes[0].send_signal(signal.SIGSTOP)
    try:
        processes.append(search(remote(evaluation__num_workers=2)))
        wait_until(lambda: "sensitivities" in Location.of(f"{bucket}/runs").names(), processes[1])
    finally:
        processes[0].send_signal(signal.SIGCONT)
    documents = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode in (0, 2, 4), err
        documents.append(json.loads(out))
    statuses = package.query("SELECT run_id, status FROM runs", root=f"{bucket}/runs").set_index("run_id").status
    assert dict(statuses) == {document["run_id"]: "done" for document in documents} and len(statuses) == 2
    # The second to confirm is held to a stricter confidence, because the first one has spent its part of the window.
    exact = [row for row in json.loads(alone) if row["evaluation"] == "exact"]
    for document in documents:
        found = json.loads(trials(f"{bucket}/runs", document["run_id"]))
        assert [row for row in found if row["evaluation"] == "exact"] == exact
    assert len(copies()) == 1
    ranges = [asked.removeprefix("bytes=") for _, path, asked in s3.requests if path.endswith("model.safetensors")]
    size = Location.of(f"{bucket}/models/model.safetensors").state().size
    assert ranges.count(f"0-{size - 1}") == 1


def test_bad_rows_are_kept_in_the_bucket(remote, bucket, small_folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lowprec.traffic import read_quarantine

    table = pq.read_table(small_folder / "traffic")
    labels = table["label"].to_pylist()
    labels[9000] = 2
    changed = table.set_column(table.column_names.index("label"), "label", pa.array(labels, table["label"].type))
    with Location.of(f"{bucket}/bad/part.parquet").whole_file() as partial:
        pq.write_table(changed, partial)
    with pytest.raises(LowprecError, match=f"row 9000: .* kept in {bucket}/runs/artifacts/.*/quarantine/search.parq"):
        run_search(load_config(remote(traffic__path=f"{bucket}/bad")))
    (run,) = (Location.of(bucket) / "runs" / "artifacts").names()
    (row,) = read_quarantine(f"{bucket}/runs/artifacts/{run}/quarantine/search.parquet")
    assert row.row == 9000


@pytest.mark.parametrize(
    ("changes", "endpoint", "said"),
    [
        ({"traffic__path": "s3://nowhere/logs"}, None, 'traffic s3://nowhere/logs: .*there is no bucket "nowhere"'),
        ({"model__checkpoint": "s3://nowhere/m.pt"}, None, "checkpoint s3://nowhere/m.pt: .*there is no bucket"),
        ({"results__root": "s3://nowhere/runs"}, None, r'runs \(s3://nowhere/runs/runs\): .*no bucket "nowhere"'),
        ({}, "http://127.0.0.1:2", "http://127.0.0.1:2 cannot be reached: nothing listens there; check AWS_ENDPOINT"),
    ],
    ids=["traffic", "checkpoint", "results", "endpoint"],
)
def test_what_is_not_there_is_one_sentence(remote, monkeypatch, changes, endpoint, said):
    config = load_config(remote(**changes))
    if endpoint is not None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setattr("lowprec.storage.object_store._ATTEMPTS", 1)
    with pytest.raises(LowprecError, match=said) as raised:
        run_search(config)
    assert raised.value.exit_code == 3 and "\n" not in str(raised.value)


def test_commands_that_write_to_this_machine_refuse_a_url(config_file, small_config, bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    traffic = json.loads(small_config().to_json())["traffic"] | {"path": f"{bucket}/new", "synthetic": {}}
    with pytest.raises(LowprecError, match=f"traffic {bucket}/new: is made in a folder of this machine; give a path"):
        generate_traffic(load_config(config_file(traffic=traffic)), progress=Silent())
    for arguments in (
        ("demo", "--root", bucket),
        ("calibrate", "--quick", "--out", f"{bucket}/c.json"),
        ("results", "SELECT 1", "--format", "csv", "--out", f"{bucket}/x.csv"),
    ):
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 2 and "is a URL; give a path of this machine" in done.output
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("s3")]


@pytest.mark.parametrize("wrong", ["missing", "short"])
@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_a_broken_checkpoint_is_told_before_a_run_begins(config_file, small_folder, tmp_path, wrong, where, request):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tensors = load_file(small_folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[: len(names) // 2], "model-2.safetensors": names[len(names) // 2 :]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    victim = folder / "model-2.safetensors"
    if wrong == "missing":
        victim.unlink()
        said = "model.safetensors.index.json: shard model-2.safetensors is missing"
    else:
        victim.write_bytes(victim.read_bytes()[:-1000])
        said = "model-2.safetensors: is cut short: it has .* bytes; copy or save it again"
    checkpoint = str(folder)
    if where == "bucket":
        checkpoint = request.getfixturevalue("bucket") + "/model"
        for file in folder.iterdir():
            upload(file, f"{checkpoint}/{file.name}")
    config = config_file(model__checkpoint=checkpoint, results__root=str(tmp_path / "none"))
    with pytest.raises(LowprecError, match=f"checkpoint {checkpoint}/{said}") as raised:
        run_search(load_config(config))
    assert raised.value.exit_code == 3
    assert not (tmp_path / "none").exists()
