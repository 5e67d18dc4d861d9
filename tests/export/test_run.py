"""A plan becomes a folder that serves what was certified, or nothing."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import planted_faults as faults
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import torch
from plans import LAYERS, LOW_LAYERS, write_mixed_plan
from rough_model import save_rough_model
from safetensors.numpy import load_file, save_file

import lowprec
from lowprec import ops
from lowprec.core.errors import ExportError, ModelError, PlanError, TrafficError
from lowprec.core.sizes import bytes_text
from lowprec.debug import debug_plan
from lowprec.evaluation.workers.worker import evaluator_of
from lowprec.export import export_plan, read_manifest
from lowprec.models.adapter import inputs_of
from lowprec.ops.served_bag import ServedBag
from lowprec.plan import Precision
from lowprec.plan.layer_form import Arithmetic
from lowprec.search import open_job

EMULATED = "space.layers={precisions: [fp32, emulated], arithmetic: {}}"


@pytest.fixture
def exported(small_config, tmp_path):
    """A mixed plan, exported: the config, the plan, the folder and what the export said."""

    def make(*overrides, layers=None, **options):
        config = small_config(*([LAYERS] if layers else []), *overrides)
        file = write_mixed_plan(config, tmp_path / "plan.json", layers)
        found = export_plan(config, tmp_path / "plan.json", tmp_path / "served" / "model", **options)
        return config, file, found

    return make


def evaluated(config, file, num_batches=3):
    """Batches of the confirm window, and what the evaluation finds of the plan."""
    job = open_job(config).as_planned(file)
    evaluator = evaluator_of(job.spec, job.adapter)
    window = job.window("confirm")
    with evaluator.using(job.forms):
        for k in range(num_batches):
            batch = window.batch(k)
            yield inputs_of(batch), torch.from_numpy(evaluator.logits(batch, [file.plan]).plans[0])


@pytest.mark.parametrize("layers", [None, LOW_LAYERS])
def test_what_is_loaded_gives_the_logits_that_were_evaluated(exported, layers):
    config, file, found = exported(layers=layers)
    module = lowprec.load(found.folder)
    for inputs, logits in evaluated(config, file):
        with torch.inference_mode():
            assert torch.equal(module(inputs.dense, dict(inputs.sparse)), logits)
    document = found.to_dict()
    assert document["parity"]["num_examples"] > 3000 and document["warnings"] == []
    assert document["table_bytes"] == sum(
        ops.row_bytes(u.dim, file.plan[u.name]) * u.num_rows for u in open_job(config).adapter.units
    )
    low = sum(p != "fp32" for unit, p in file.plan.items() if unit.startswith("table:"))
    assert (document["num_tables"], document["num_low_tables"]) == (6, low) and low < 6
    kinds = [type(m).__name__ for m in module.modules()]
    assert kinds.count("ServedBag") == kinds.count("IntNBitTableBatchedEmbeddingBagsCodegen") == 4
    assert kinds.count("ServedLinear") == (4 if layers else 0)
    assert kinds.count("Linear") == (0 if layers else 4)


def test_rows_are_mapped_and_not_copied(exported):
    _, _, found = exported()
    module = lowprec.load(found.folder)
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split() for line in lines if str(found.folder / "tables") in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    bags = [m for m in module.modules() if isinstance(m, ServedBag)]
    for pointer in [bag.tbe.weights_host.data_ptr() for bag in bags] + [module.tables["c0"].weight.data_ptr()]:
        assert any(start <= pointer < end for start, end in ranges)


def test_rows_may_be_read_into_memory(exported):
    config, file, found = exported()
    module = lowprec.load(found.folder, in_memory=True)
    assert str(found.folder / "tables") not in Path("/proc/self/maps").read_text()
    for inputs, logits in evaluated(config, file):
        with torch.inference_mode():
            assert torch.equal(module(inputs.dense, dict(inputs.sparse)), logits)


def test_rows_in_the_files_are_what_fbgemm_reads(exported):
    """Dequantized by the definition, and looked up by PyTorch."""
    _, _, found = exported()
    module = lowprec.load(found.folder)
    ids, ends = torch.arange(40), torch.arange(0, 41, 2)
    for table in found.manifest.tables:
        rows = load_file(found.folder / table.file)[table.tensor]
        if table.precision.startswith("int"):
            rows = ops.dequantize(rows, Precision(table.precision), table.dim)
        expected = torch.nn.functional.embedding_bag(
            ids, torch.from_numpy(rows.astype(np.float32)), ends, mode="sum", include_last_offset=True
        )
        bag = module.get_submodule(table.modules[0])
        torch.testing.assert_close(bag(ids, ends), expected, rtol=1e-6, atol=1e-6)


# A process that knows neither lowprec nor the model.
ALONE = """
import sys, torch, fbgemm_gpu
assert not any(name.startswith("lowprec") for name in sys.modules)
kind, program, inputs = sys.argv[1:]
module = torch.jit.load(program) if kind == "torchscript" else torch.export.load(program).module()
for dense, sparse, logits in torch.load(inputs):
    assert torch.equal(module(dense, sparse).detach(), logits), (module(dense, sparse) - logits).abs().max()
print("equal")
"""


@pytest.mark.parametrize(("kind", "layers"), [("torchscript", LOW_LAYERS), ("torch_export", None)])
def test_programs_need_no_code_of_the_model(exported, tmp_path, kind, layers):
    config, file, found = exported(layers=layers, programs=[kind])
    batches = [(i.dense, dict(i.sparse), logits) for i, logits in evaluated(config, file)]
    torch.save(batches, tmp_path / "inputs.pt")
    program = found.folder / found.manifest.programs[kind]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, kind, str(program), str(tmp_path / "inputs.pt")], capture_output=True, text=True
    )
    assert done.stdout == "equal\n", done.stderr


def test_torch_export_says_which_layers_it_cannot_hold(exported, tmp_path):
    with pytest.raises(ExportError, match="int8 and fp16 layers in packed objects .* or take torchscript"):
        exported(layers=LOW_LAYERS, programs=["torch_export"])
    assert list((tmp_path / "served").iterdir()) == []


def test_a_plan_of_another_checkpoint_is_refused(small_config, small_folder, tmp_path):
    config = small_config()
    write_mixed_plan(config, tmp_path / "plan.json")
    weights = load_file(small_folder / "model.safetensors")
    save_file({name: 2 * w for name, w in weights.items()}, tmp_path / "other.safetensors")
    other = small_config(f"model.checkpoint={tmp_path}/other.safetensors")
    with pytest.raises(PlanError, match="was made for checkpoint"):
        export_plan(other, tmp_path / "plan.json", tmp_path / "served")
    assert not (tmp_path / "served").exists()


@pytest.mark.parametrize("limit", [1000, 3000, 12_000, 40_000])
def test_a_full_disk_leaves_nothing(small_config, tmp_path, limit):
    """The limit stands for the disk: a table, or the dense part, cannot be written to its end."""
    config = small_config(
        "model.args={embedding_dim: 8, bottom: [8], top: [400]}", f"model.checkpoint={tmp_path}/m.safetensors"
    )

    save_rough_model(config)
    write_mixed_plan(config, tmp_path / "plan.json")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(ExportError, match="cannot be written: .*File too large"):
            export_plan(config, tmp_path / "plan.json", tmp_path / "served" / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "served").iterdir()) == []


def test_what_does_not_fit_the_disk_is_said_at_once(small_config, tmp_path, monkeypatch):
    config = small_config()
    write_mixed_plan(config, tmp_path / "plan.json")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(ExportError, match=r"needs about .* tables, .* dense part\) and the disk has 1 KB free"):
        export_plan(config, tmp_path / "plan.json", tmp_path / "served")


KILLED = """
import os, signal, sys
import lowprec.export.export_run as run
from lowprec.config import load_config
written = run.write_table_tensor
def kill_at_third(*args, **kwargs):
    if "0002" in str(args[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return written(*args, **kwargs)
run.write_table_tensor = kill_at_third
config, plan, out = sys.argv[1:]
run.export_plan(load_config(config), plan, out)
"""


def test_a_killed_export_is_not_taken_for_one(small_config, tmp_path):
    config = small_config()
    write_mixed_plan(config, tmp_path / "plan.json")
    (tmp_path / "config.json").write_text(config.to_json())
    out = tmp_path / "served" / "model"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "config.json"), str(tmp_path / "plan.json"), str(out)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    (left,) = out.parent.iterdir()
    assert left.name.endswith(".partial") and (left / "tables").exists()
    with pytest.raises(ExportError, match=r"has no manifest\.json, so it is no export"):
        lowprec.load(left)
    again = export_plan(config, tmp_path / "plan.json", out)
    lowprec.load(out)
    size = sum(file.stat().st_size for file in left.rglob("*") if file.is_file())
    assert f"{left} is what an export that was killed has left ({bytes_text(size)}); remove it" in again.notes


def test_a_file_is_no_folder_to_export_to(small_config, tmp_path):
    write_mixed_plan(config := small_config(), tmp_path / "plan.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"file is a file; give a path whose folders can be made"):
        export_plan(config, tmp_path / "plan.json", tmp_path / "file" / "deep" / "model")


def broken(folder, what):
    """The exported folder after something happened to it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    table = folder / manifest["tables"][3]["file"]
    if what == "bit":
        content = bytearray(table.read_bytes())
        content[-5] ^= 1
        table.write_bytes(content)
    elif what == "cut":
        table.write_bytes(table.read_bytes()[:-7])
    elif what == "gone":
        table.unlink()
    elif what == "hash":
        manifest["files"]["dense.safetensors"]["sha256"] = "0" * 64
        (folder / "manifest.json").write_text(json.dumps(manifest))
    elif what == "unhashed":
        del manifest["files"]["plan.json"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    elif what == "outside":
        manifest["files"]["../../else"] = manifest["files"]["plan.json"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    elif what == "form":
        manifest["tables"][1]["precision"] = "int8"
        (folder / "manifest.json").write_text(json.dumps(manifest))
    elif what == "version":
        (folder / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    elif what == "json":
        (folder / "manifest.json").write_text("{")
    else:
        del manifest["tables"][0]["row_bytes"]
        (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("bit", r"0003-c3\.safetensors is not what the manifest says \(its SHA-256 is \w+ and not \w+\); copy"),
        ("cut", r"0003-c3\.safetensors is not what the manifest says \(it has [\d,]+ of [\d,]+ bytes\)"),
        ("gone", r"0003-c3\.safetensors cannot be read: No such file"),
        ("hash", r"dense\.safetensors is not what the manifest says"),
        ("unhashed", r"manifest\.json has no SHA-256 of plan\.json"),
        ("outside", r"manifest\.json names \.\./\.\./else, which is not in it"),
        ("form", r'manifest\.json and plan\.json say different things of "table:c1"'),
        ("version", "has schema_version 99, this lowprec reads 1; export again"),
        ("json", r"manifest\.json is not JSON"),
        ("key", r"manifest\.json is not what lowprec writes \(.*row_bytes"),
    ],
)
def test_a_folder_that_is_not_what_was_written_is_refused(exported, what, said):
    _, _, found = exported()
    broken(found.folder, what)
    with pytest.raises(ExportError, match=said):
        lowprec.load(found.folder)


def test_without_hashes_a_changed_bit_is_loaded_and_a_cut_file_is_not(exported):
    _, _, found = exported()
    broken(found.folder, "bit")
    lowprec.load(found.folder, verify=False)
    broken(found.folder, "cut")
    with pytest.raises(ExportError, match="cannot be read"):
        lowprec.load(found.folder, verify=False)


def test_other_code_makes_another_model(exported, monkeypatch):
    _, _, found = exported()
    document = json.loads((found.folder / "config.json").read_text())
    for args, said in (
        ({"embedding_dim": 16, "bottom": [16], "top": [16]}, "of another size"),
        ({"embedding_dim": 8, "bottom": [8, 8], "top": [16]}, "missing or new"),
    ):
        document["model"]["args"] = args
        (found.folder / "config.json").write_text(json.dumps(document))
        faults._fit_hash(found.folder, found.folder / "config.json")
        with pytest.raises(ExportError, match=f"another model than the one that was exported: .*{said}"):
            lowprec.load(found.folder, verify=False)
    document["model"]["factory"] = "no.such:model"
    (found.folder / "config.json").write_text(json.dumps(document))
    faults._fit_hash(found.folder, found.folder / "config.json")
    with pytest.raises(ModelError, match="cannot import"):
        lowprec.load(found.folder, verify=False)


def test_a_difference_is_found_and_nothing_is_left(small_config, tmp_path, monkeypatch):
    """One code of a row that traffic meets is another one than was certified."""
    import lowprec.export.tables as tables

    stored = tables._stored

    def flipped(rows, start, tensor, *args):
        out = stored(rows, start, tensor, *args)
        if tensor == "tables.c2.weight":
            out[:, -1] ^= 1
        return out

    monkeypatch.setattr(tables, "_stored", flipped)
    config = small_config()
    write_mixed_plan(config, tmp_path / "plan.json")
    with pytest.raises(ExportError, match=r'"table:c2" differ in \d+ of \d+ values when served, first at \[\d+, \d+\]'):
        export_plan(config, tmp_path / "plan.json", tmp_path / "served" / "model")
    assert list((tmp_path / "served").iterdir()) == []


def test_what_has_no_served_form_or_place_is_refused(exported, small_config, tmp_path):
    with pytest.raises(ExportError, match='"layer:top.0" is emulated'):
        exported(EMULATED, layers={"layer:top.0": (Precision.EMULATED, Arithmetic())})
    _, _, found = exported()
    with pytest.raises(ExportError, match="is there already"):
        export_plan(small_config(), tmp_path / "plan.json", found.folder)
    with pytest.raises(ExportError, match="a folder of this machine"):
        export_plan(small_config(), tmp_path / "plan.json", "s3://bucket/model")
    assert read_manifest(found.folder) == found.manifest


def test_secrets_of_the_config_stay_out(exported):
    _, _, found = exported("monitor.webhook={url: 'https://hooks.example/secret'}")
    assert "hooks.example" not in (found.folder / "config.json").read_text()


def test_every_table_has_its_dtype_for_torchrec(exported):
    _, _, found = exported()
    dtypes = lowprec.export.per_table_weight_dtype(found.folder)
    assert dtypes == {
        "c0": torch.float32,
        "c1": torch.float16,
        "c2": torch.qint8,
        "c3": torch.quint4x2,
        "c4": torch.quint2x4,
        "c5": torch.float32,
    }
    state = lowprec.export.quantized_state_dict(found.folder, row_alignment=16)
    # TorchRec's tensors of int4 and int2 count values: two and four in a byte.
    shapes = {"c0": (40, 32), "c1": (80, 16), "c2": (160, 16), "c3": (320, 32), "c4": (640, 64), "c5": (1000, 32)}
    assert {name: tuple(state[f"tables.{name}.weight"].shape) for name in shapes} == shapes


@pytest.fixture
def spoilt(small_config, small_folder, tmp_path):
    """A config on traffic whose last three rows, of the confirm window, have another value in a column, and a plan."""

    def make(column, value):
        table = pads.dataset(small_folder / "traffic", format="parquet", exclude_invalid_files=True).to_table()
        values = table[column].to_numpy().copy()
        values[-3:] = value
        (tmp_path / "traffic").mkdir()
        changed = table.set_column(table.schema.get_field_index(column), column, pa.array(values))
        pq.write_table(changed, tmp_path / "traffic" / "part.parquet")
        config = small_config(f"traffic.path={tmp_path}/traffic")
        write_mixed_plan(config, tmp_path / "plan.json")
        return config, tmp_path / "plan.json", tmp_path / "served"

    return make


def test_bad_rows_of_the_sample_are_said_and_left_out(spoilt):
    config, plan, out = spoilt("d0", np.nan)
    exported, debugged = export_plan(config, plan, out).to_dict(), debug_plan(config, plan).to_dict()
    for document in (exported, debugged):
        (said,) = document["warnings"][-1:]
        assert said.startswith("3 bad rows of the sample were left out; the first is ") and "part.parquet, row" in said
        assert "d0" in said and "mend the traffic" in said


def test_an_id_that_is_no_row_stops_what_serves_nothing(spoilt):
    config, plan, out = spoilt("c5", 10**6)
    for command in (lambda: export_plan(config, plan, out), lambda: debug_plan(config, plan)):
        with pytest.raises(TrafficError, match=r'part.parquet, row \d+: feature "c5" has id 1000000; .*bounds_check'):
            command()
    assert not out.exists()
