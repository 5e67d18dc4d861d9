"""`lowprec search --dry-run --workers N --worker-memory SIZE`: of a job, and of tables that are only written down."""

import json
import re
from pathlib import Path

import pytest

from lowprec.shards.estimate import kept_bytes

SPEC = {
    "tables": [
        {"name": "user", "num_rows": 2_000_000_000, "dim": 128, "lookups": [8, 4, 2, 1, 1]},
        {"name": "item", "num_rows": 500_000_000, "dim": 128, "ids": 20, "count": 4},
        {"name": "category", "num_rows": 1_000_000, "dim": 64, "count": 1500},
    ],
    "dense_bytes": 100_000_000,
    "batch_size": 512,
    "num_examples": 1e10,
}
WORKERS = ("--dry-run", "--workers", "20", "--worker-memory", "256GB")


@pytest.fixture
def spec(tmp_path):
    def write(document=None, **other):
        path = tmp_path / "tables.json"
        path.write_text(document if isinstance(document, str) else json.dumps({**SPEC, **other}))
        return path

    return write


def test_terabytes_are_placed_from_a_written_spec(lowprec, spec, tmp_path):
    done = lowprec("search", "--tables", spec(), *WORKERS, "--json", cwd=tmp_path)
    assert done.code == 0
    placement = done.document["placement"]
    rows = {}
    for shard in placement["shards"]:
        rows[shard["table"]] = rows.get(shard["table"], 0) + shard["end_row"] - shard["first_row"]
    assert rows["user"] == 2_000_000_000 and rows["item_3"] == 500_000_000
    assert len(placement["workers"]) == 20 and all(w["memory"] <= 256e9 for w in placement["workers"])
    assert len(rows) + len(placement["replicated"]) == 1 + 4 + 1500
    assert placement["network"]["profile_bytes_per_example"] > 0 and placement["time"] is None
    assert placement["limits"][0]["name"] == "memory"
    shown = lowprec("search", "--tables", spec(), *WORKERS, cwd=tmp_path)
    for part in ("shards", "workers", "2.432 TB on 20 workers", "network: ", "breaks first: memory: worker", "user"):
        assert part in shown.out


def test_time_comes_from_a_calibration(lowprec, spec, tmp_path):
    calibrated = lowprec("calibrate", "--quick", "--out", "lookups.json", cwd=tmp_path)
    assert calibrated.code == 0, calibrated.err
    done = lowprec("search", "--tables", spec(), *WORKERS, "--calibration", "lookups.json", "--json", cwd=tmp_path)
    time = done.document["placement"]["time"]
    assert time["exact_lookup_s"] > time["profile_lookup_s"] > 0 and time["profile_network_s"] > 0
    slow = lowprec(
        *("search", "--tables", spec(), *WORKERS, "--calibration", "lookups.json", "--network", "100Mbit", "--json"),
        cwd=tmp_path,
    )
    assert slow.document["placement"]["limits"][0]["name"] == "network"
    assert slow.document["placement"]["time"]["profile_network_s"] == pytest.approx(100 * time["profile_network_s"])
    shown = lowprec("search", "--tables", spec(), *WORKERS, "--calibration", "lookups.json", cwd=tmp_path)
    assert "s of lookups and" in shown.out and "without the dense part" in shown.out


def test_a_job_is_placed_with_the_lookups_of_its_traffic(lowprec, config_file):
    arguments = ("search", config_file(), "--dry-run", "--workers", "3", "--worker-memory", "600MB", "--json")
    done = lowprec(*arguments)
    assert done.code == 0, done.err
    placement = done.document["placement"]
    assert placement["num_workers"] == 3 and len(placement["replicated"]) == len(done.document["units"])
    # One feature has several ids an example.
    assert 6 < sum(worker["ids_per_example"] for worker in placement["workers"]) < 20
    assert lowprec(*arguments).document["placement"] == placement


def test_the_spec_of_the_readme_is_placed(lowprec, tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (document,) = re.findall(r'^    (\{"tables".*?1e10\})$', readme, re.MULTILINE | re.DOTALL)
    (tmp_path / "tables.json").write_text(document)
    done = lowprec("search", "--tables", "tables.json", *WORKERS, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.document["placement"]["table_bytes"] == 4 * (2_000_000_000 * 128 + 1500 * 1_000_000 * 64)


def test_the_command_of_the_page_about_scale_places_tables(lowprec, spec):
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    (command,) = re.findall(r"^    lowprec (search .*--tables FILE .*)$", page, re.MULTILINE)
    done = lowprec(*command.replace("FILE", spec().name).split(), "--json", cwd=spec().parent)
    assert done.code == 0, done.err
    assert len(done.document["placement"]["workers"]) == 64


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--dry-run", "--workers", "4", "--worker-memory", "8GB"), r"tables of .* do not fit on 4 workers that have"),
        (("--dry-run", "--workers", "4", "--worker-memory", "300MB"), "have no room for tables: they need"),
        (("--dry-run", "--workers", "4"), "needs both --workers and --worker-memory"),
        (("--workers", "4", "--worker-memory", "8GB"), "add --dry-run"),
        (("--network", "10Gbit"), "add --dry-run"),
        (("--dry-run", "--workers", "4", "--worker-memory", "8 parsecs"), "expected a size such as 8GB"),
        ((*WORKERS, "--network", "fast"), "expected a rate such as 10Gbit"),
        ((*WORKERS, "--calibration", "nowhere.json"), "nowhere.json"),
    ],
)
def test_what_cannot_be_placed_says_why(lowprec, spec, tmp_path, options, said):
    done = lowprec("search", "--tables", spec(), *options, cwd=tmp_path)
    assert done.code == 64
    assert re.search(said, done.err), done.err


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("{", "JSON"),
        ({"tables": []}, "tables: "),
        ({"tables": [{"name": "t", "num_rows": 0, "dim": 4}]}, "greater than 0; got 0"),
        ({"tables": [{"name": "t", "num_rows": 1, "dim": 4, "rows": 1}]}, 'tables.0.rows (table "t"): extra inputs'),
        ({"tables": [{"name": "t", "num_rows": 1, "dim": 4}] * 2}, "need names of their own"),
        ({"tables": [{"name": "t", "num_rows": 1, "dim": 4, "lookups": [-1, 2]}]}, "tables.0.lookups.0"),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(lowprec, tmp_path, document, said):
    (tmp_path / "tables.json").write_text(document if isinstance(document, str) else json.dumps(document))
    done = lowprec("search", "--tables", "tables.json", *WORKERS, cwd=tmp_path)
    assert done.code == 64 and said in done.err, done.err


def test_a_config_or_tables_but_not_both_or_none(lowprec, spec, config_file, tmp_path):
    assert "CONFIG is missing" in lowprec("search", "--dry-run", cwd=tmp_path).err
    assert "either CONFIG or --tables" in lowprec("search", config_file(), "--tables", spec(), *WORKERS).err


def test_a_search_whose_tables_no_worker_can_hold(lowprec, config_file, tmp_path):
    """Three workers of a third of the tables each find what one process finds, up to the last bits of gaps."""
    ask = ("--dry-run", "--workers", "3", "--worker-memory", "1GB", "--json")
    placement = lowprec("search", config_file(), *ask).document["placement"]
    own = placement["needs"]["total"] - kept_bytes(10**9)
    for_tables = 1.3 * sum(w["held_bytes"] for w in placement["workers"]) / 9
    memory = int((own + for_tables) / (1 - kept_bytes(10**9) / 10**9))  # of which a part is kept for batches
    root = tmp_path / "shared"
    config = config_file(evaluation__num_workers=3, evaluation__worker_memory=memory, results__root=str(root))
    placed = lowprec("search", config, "--dry-run", "--workers", "3", "--worker-memory", str(memory), "--json")
    shards = placed.document["placement"]["shards"]
    assert len(shards) > len({shard["table"] for shard in shards}) > 1, "no table is cut"
    shared = lowprec("search", config, "--json")
    resume = ("--resume", shared.document["run_id"], "--json")
    fewer = config_file(evaluation__num_workers=2, evaluation__worker_memory=2 * memory, results__root=str(root))
    again = lowprec("search", fewer, *resume)
    assert again.code == shared.code and again.document["confirm"] == shared.document["confirm"], again.err
    alone = lowprec("search", config_file(results__root=str(tmp_path / "alone")), "--json")
    assert shared.code == alone.code, shared.err
    for key in ("search", "confirm"):
        assert shared.document[key]["gap_pct"] == pytest.approx(alone.document[key]["gap_pct"], abs=0.02)
    assert shared.document["bytes"] == pytest.approx(alone.document["bytes"], rel=0.1)


def test_memory_for_workers_that_are_not_there_is_refused(lowprec, config_file):
    done = lowprec("search", config_file(evaluation__num_workers=0, evaluation__worker_memory="8GB"))
    assert done.code == 64 and "worker_memory needs workers to share tables" in done.err
    done = lowprec("search", config_file(evaluation__num_workers=2, evaluation__worker_memory="8 apples"))
    assert done.code == 64 and "expected a size such as 8GB" in done.err
