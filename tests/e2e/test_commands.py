"""The commands of the README, as a user types them."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest


@pytest.fixture(scope="module")
def trained(lowprec, tmp_path_factory):
    """A folder with a config of a user's own: traffic generated and a model trained by the commands."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "job.yaml").write_text(
        """
name: mine
traffic:
  path: traffic
  time: ts
  dense: [d0, d1]
  sparse:
    - {name: c0, num_embeddings: 50}
    - {name: c1, num_embeddings: 200}
    - {name: c2, num_embeddings: 800}
  batch_size: 1024
  synthetic:
    {num_rows: 12000, num_sparse: 3, table_sizes: [50, 200, 800], num_dense: 2, num_multi_hot: 1, num_interactions: 2}
windows:
  train: {end: 2026-01-05}
  search: {start: 2026-01-05, end: 2026-01-08}
  confirm: {start: 2026-01-08}
model:
  args: {embedding_dim: 8, bottom: [8], top: [16]}
  checkpoint: model.safetensors
train: {epochs: 3, batch_size: 128, learning_rate: 0.01}
search: {budget: 1.0, max_trials: 16, wave_size: 8}
evaluation: {num_workers: 0}
"""
    )
    assert lowprec("generate", "job.yaml", cwd=folder).code == 0
    done = lowprec("train", "job.yaml", "--json", cwd=folder)
    assert done.code == 0, done.err
    return folder, done.document


def test_train_reports_quality_and_calibration(trained):
    _, document = trained
    assert document["schema_version"] == 1 and document["command"] == "train"
    for window in ("train", "validation"):
        assert 0 < document[window]["ne"] < 1.2 and 0.5 < document[window]["calibration"] < 2


@pytest.fixture(scope="module")
def searched(lowprec, trained):
    folder, _ = trained
    # The one search here that is done as most are: by a Ray worker, which takes longer to begin than all the rest.
    done = lowprec("search", "job.yaml", "--json", "--set", "evaluation.num_workers=1", cwd=folder)
    assert done.code in (0, 4), done.err
    return folder, done


def test_search_prints_one_document_and_a_plan_that_verifies(lowprec, searched):
    folder, done = searched
    document = done.document
    assert document["num_trials"] == 16
    assert document["confirm"]["num_examples"] > 2000
    assert document["bytes"] < document["fp32_bytes"]
    assert {0: "certified", 2: "rejected", 4: "inconclusive"}[done.code] == document["verdict"]
    again = lowprec("verify", "job.yaml", "--plan", document["plan_path"], "--json", cwd=folder)
    assert again.code == done.code
    shared = ("gap_pct", "kl_pct", "ne_plan", "auc_plan", "num_examples")
    assert {k: again.document[k] for k in shared} == {k: document["confirm"][k] for k in shared}
    # The same examples are the same look.
    assert (document["confirm"]["confidence"], again.document["confidence"]) == (
        pytest.approx(0.955),
        pytest.approx(0.955),
    )
    assert document["confirm"]["gap_upper_pct"] == again.document["gap_upper_pct"] > again.document["gap_pct"]


def test_search_and_verify_print_for_people(lowprec, trained):
    folder, _ = trained
    done = lowprec("search", "job.yaml", "--max-trials", 5, "--set", "results.root=other", cwd=folder)
    assert done.code in (0, 2, 4), done.err
    for part in ("Pareto front", "confirm: gap", "one-sided bounds", "examples", "plan written to", "budget of 1.0 %"):
        assert part in done.out


def test_from_a_plan_to_what_serves(lowprec, searched):
    folder, done = searched
    plan = done.document["plan_path"]
    debugged = lowprec("debug", "job.yaml", "--plan", plan, "--arrays", "arrays", cwd=folder)
    assert debugged.code == 0, debugged.err
    assert "in the order of the model" in debugged.out and (folder / "arrays" / "rows.parquet").exists()
    exported = lowprec("export", "job.yaml", "--plan", plan, "--out", "served", cwd=folder)
    assert exported.code == 0 and "equal to the bit to what was evaluated" in exported.out, exported.err
    again = lowprec("export", "job.yaml", "--plan", plan, "--out", "served", cwd=folder)
    assert again.code == 3 and "is there already" in again.err
    served = lowprec("bench-serving", "served", "--batch-size", 64, "--seconds", 0.1, cwd=folder)
    assert served.code == 0 and "requests of 64:" in served.out, served.err
    spoilt = folder / "served" / "dense.safetensors"
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"x")
    broken = lowprec("bench-serving", "served", "--batch-size", 64, cwd=folder)
    assert broken.code == 3 and "dense.safetensors is not what the manifest says" in broken.err


def test_the_gate_for_a_newer_snapshot(lowprec, searched):
    folder, done = searched
    arguments = ("--plan", done.document["plan_path"], "--snapshot", "model.safetensors", "--json")
    gate = lowprec("verify", "job.yaml", *arguments, cwd=folder)
    assert gate.code == {"certified": 0, "inconclusive": 4}[gate.document["verdict"]]
    path = gate.document["snapshot"]["plan_path"]
    assert (path is not None) == (gate.code == 0)
    repaired = lowprec("verify", "job.yaml", *arguments, "--budget", 0.0001, "--repair", cwd=folder)
    assert repaired.document["repair"]["budget_pct"] == 0.0001
    assert repaired.code == {"certified": 0, "rejected": 2, "inconclusive": 4}[repaired.document["final_verdict"]]


def test_the_report_of_sensitivities_and_a_profile_used_again(lowprec, searched):
    folder, done = searched
    report = lowprec("results", "sensitivities", cwd=folder)
    assert report.code == 0 and "each unit alone" in report.out and "table:c0" in report.out
    rows = json.loads(lowprec("results", "sensitivities", "--format", "json", cwd=folder).out)["rows"]
    assert len(rows) == 3 * 4 and {"gap_pct", "gap_lower_pct", "gap_upper_pct", "gap_pct_per_mb"} <= rows[0].keys()
    again = lowprec(
        "search",
        "job.yaml",
        "--profile",
        done.document["profile_path"],
        "--json",
        "--set",
        "results.root=re",
        cwd=folder,
    )
    assert again.document["promised_pct"] == done.document["promised_pct"]
    other = lowprec(
        "search",
        "job.yaml",
        "--profile",
        done.document["profile_path"],
        "--set",
        "space.precisions=[fp16, int8]",
        cwd=folder,
    )
    assert other.code == 64 and "the space (the profile has" in other.err


def test_several_budgets_end_with_a_verdict_each(lowprec, trained):
    folder, _ = trained
    budgets = ("--set", "search.budget=null", "--set", "search.budgets=[1.0, 3.0]", "--set", "results.root=both")
    done = lowprec("search", "job.yaml", *budgets, "--max-trials", 8, cwd=folder)
    assert "against a budget of 1.0 %" in done.out and "against a budget of 3.0 %" in done.out
    plan = next((folder / "both").glob("artifacts/*/plan-3.json"))
    verified = lowprec("verify", "job.yaml", *budgets, "--plan", plan, "--json", cwd=folder)
    assert verified.document["budget_pct"] == 3.0
    assert (
        lowprec("verify", "job.yaml", *budgets, "--plan", plan, "--budget", 7, "--json", cwd=folder).document[
            "budget_pct"
        ]
        == 7.0
    )


def test_dry_run_says_what_would_be_done_and_writes_nothing(lowprec, trained):
    folder, _ = trained
    done = lowprec("search", "job.yaml", "--dry-run", "--json", "--set", "results.root=nowhere", cwd=folder)
    assert done.code == 0
    document = done.document
    assert document["num_plans"] == 5**3 and document["fp32_bytes"] == 1050 * 8 * 4
    assert [w["name"] for w in document["windows"]] == ["search", "confirm"]
    assert not (folder / "nowhere").exists()
    text = lowprec("search", "job.yaml", "--dry-run", cwd=folder).out
    assert "table:c2" in text and "rows" in text and "plans: 125" in text


def test_results_as_table_json_csv_and_parquet(lowprec, searched):
    folder, done = searched
    run = done.document["run_id"]
    table = lowprec("results", cwd=folder)
    assert table.code == 0 and "gap" in table.out
    where = f"run_id = '{run}' AND evaluation = 'exact'"
    sql = f"SELECT trial_key, size_bytes, gap_pct FROM trials WHERE {where} ORDER BY number"
    rows = json.loads(lowprec("results", sql, "--format", "json", cwd=folder).out)["rows"]
    assert len(rows) == 16 and set(rows[0]) == {"trial_key", "size_bytes", "gap_pct"}
    csv = pd.read_csv(io.StringIO(lowprec("results", sql, "--format", "csv", cwd=folder).out))
    assert list(csv.trial_key) == [r["trial_key"] for r in rows]
    assert lowprec("results", sql, "--format", "parquet", "--out", "x.parquet", cwd=folder).code == 0
    assert list(pd.read_parquet(folder / "x.parquet").size_bytes) == [r["size_bytes"] for r in rows]
    front = json.loads(lowprec("results", "--run", run, "--format", "json", cwd=folder).out)["rows"]
    assert [r["size_bytes"] for r in front] == [t["bytes"] for t in done.document["front"]]


def test_results_from_python(searched):
    import lowprec

    folder, done = searched
    frame = lowprec.query("SELECT status, verdict FROM runs ORDER BY started_at", root=str(folder / "runs"))
    assert isinstance(frame, pd.DataFrame)
    assert (frame.iloc[0].status, frame.iloc[0].verdict) == ("done", done.document["verdict"])


def test_a_budget_that_nothing_meets_returns_the_best_and_says_so(lowprec, trained):
    folder, _ = trained
    settings = (
        "--set",
        "search.budget=0.000001",
        "--set",
        "space.precisions=[int2]",
        "--set",
        "space.row_range=minmax",
        "--set",
        "results.root=strict",
    )
    done = lowprec("search", "job.yaml", "--json", *settings, cwd=folder)
    assert done.code in (2, 4)
    assert not done.document["meets_budget_in_search"]
    assert "no plan meets the budget" in done.document["because"] and "no plan meets the budget" in done.err
    assert set(done.document["plan"].values()) == {"int2"}


def test_help_is_quick_and_knows_no_torch(lowprec):
    done = lowprec("--help")
    assert done.code == 0
    for command in ("demo", "generate", "convert", "train", "search", "verify", "results", "doctor"):
        assert command in done.out


def test_jobs_do_what_the_commands_do(searched):
    folder, done = searched
    job = Path(__file__).parents[2] / "jobs" / "verify.py"
    command = [
        sys.executable,
        job,
        "job.yaml",
        "--plan",
        done.document["plan_path"],
        "--set",
        "evaluation.num_workers=0",
    ]
    verified = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert verified.returncode == done.code, verified.stderr
    assert json.loads(verified.stdout)["gap_pct"] == done.document["confirm"]["gap_pct"]
    job = job.with_name("search.py")
    command = [sys.executable, job, "job.yaml", "--set", "search.max_trials=3", "--set", "evaluation.num_workers=0"]
    again = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert json.loads(again.stdout)["num_trials"] == 3
    wrong = subprocess.run([*command, "--set", "search.budget=0"], cwd=folder, capture_output=True, text=True)
    assert wrong.returncode == 64 and json.loads(wrong.stdout)["error"]["exit_code"] == 64


def test_what_a_model_prints_does_not_spoil_the_document(lowprec, trained):
    folder, _ = trained
    (folder / "loud.py").write_text(
        """
from lowprec.models.dlrm import build as quiet
print("hello on import")


def build(schema, **args):
    model = quiet(schema, **args)
    model.register_forward_pre_hook(lambda *_: print("hello on every pass", flush=True))
    return model
"""
    )
    settings = ("--set", "model.factory=loud:build", "--set", "results.root=loud", "--max-trials", 3)
    for num_workers in (0, 1):
        workers = ("--set", f"evaluation.num_workers={num_workers}")
        done = lowprec("search", "job.yaml", "--json", *settings, *workers, cwd=folder)
        assert done.document["num_trials"] == 3, done.err


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        ("raise ValueError('no way')", "its forward raised ValueError: no way .*broken.py, line"),
        ("raise SystemExit(0)", "its forward raised SystemExit"),
        ("return self.table(*sparse['nosuch']).sum(1)", "KeyError: 'nosuch' .*is it in traffic.sparse"),
        ("return self.table(*sparse['c0']).sum(1) * float('nan')", "a logit that is not finite"),
    ],
    ids=["raises", "exits", "missing-feature", "nan"],
)
@pytest.mark.parametrize("how", ["--dry-run", "--json"])
def test_models_that_fail_are_named(lowprec, trained, forward, said, how):
    import torch
    from safetensors.torch import save_file

    folder, _ = trained
    save_file({"table.weight": torch.zeros(50, 4)}, folder / "broken.safetensors")
    (folder / "broken.py").write_text(
        f"""
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.EmbeddingBag(50, 4, mode="sum", include_last_offset=True)

    def forward(self, dense, sparse):
        {forward}


def build():
    return Model()
"""
    )
    model = "{factory: 'broken:build', checkpoint: broken.safetensors}"
    settings = ("--set", f"model={model}", "--set", "evaluation.num_workers=0")
    done = lowprec("search", "job.yaml", how, *settings, cwd=folder)
    assert done.code == 3 and "Traceback" not in done.err
    assert re.search(said, done.err), done.err


def test_a_reader_that_stops_early_is_no_error(searched):
    folder, _ = searched
    lowprec = Path(sys.executable).with_name("lowprec")
    sql = "SELECT * FROM trials, range(2000)"
    done = subprocess.run(
        f"{lowprec} results '{sql}' --format csv | head -1", shell=True, cwd=folder, capture_output=True
    )
    assert done.stdout.startswith(b"run_id") or b"row_key" in done.stdout
    assert done.stderr == b""
