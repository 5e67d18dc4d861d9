"""A profile comes back from its file as it was, or is refused in one sentence that says why."""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from lowprec.core.errors import ConfigError, ResultsError
from lowprec.evaluation.profile.profile_file import FORMAT_VERSION, read_profile, write_profile
from lowprec.evaluation.profile.window_profile import measure_profile
from lowprec.evaluation.workers.worker import LocalWorkers
from lowprec.plan import TABLE_PRECISIONS, Plan, Precision, RowRange
from lowprec.search import open_job

KINDS = ["dense", "sketch", "groups"]


@pytest.fixture
def made(small_config, monkeypatch, tmp_path):
    """Makes a job, its profile of the window `search`, and a file of it."""

    def make(kind="dense"):
        if kind == "sketch":
            monkeypatch.setattr("lowprec.evaluation.profile.profile.MAX_DENSE_COLUMNS", 4)
        job = open_job(small_config(*(["traffic.group=user"] if kind == "groups" else [])))
        measured = measure_profile(
            LocalWorkers(job.spec, job.adapter),
            job.window("search"),
            job.columns,
            by_group=kind == "groups",
            batches_per_task=2,
        )
        path = tmp_path / "deep" / "profile.npz"
        write_profile(measured, job.profile_origin("search"), path)
        return job, measured, path

    return make


def bits(profile):
    found = []
    for block in profile.blocks:
        moment = [v for v in vars(block.second).values() if v is not None]
        scalars = [block.num_rows, block.num_unlabelled, block.weight, block.label, block.prediction, block.loss]
        found += [np.array(scalars, dtype=float), block.first, *moment]
    found += [v for v in vars(profile.evidence).values() if v is not None]
    return [np.asarray(v, dtype=float).tobytes() for v in found]


def one_sentence(error, path):
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    assert error.value.__suppress_context__ or error.value.__context__ is None
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_a_profile_comes_back_bit_for_bit(made, kind):
    job, measured, path = made(kind)
    back = read_profile(path, job.profile_origin("search"))
    assert bits(back.profile) == bits(measured.profile)
    assert back.profile.columns == measured.profile.columns
    assert [type(b.second) for b in back.profile.blocks] == [type(b.second) for b in measured.profile.blocks]
    assert type(back.profile.evidence) is type(measured.profile.evidence)
    assert (back.rows, back.use) == (measured.rows, measured.use)
    z = measured.profile.selected([Plan.uniform(job.units, p) for p in TABLE_PRECISIONS])
    assert back.profile.gaps_pct(z)[0].tolist() == measured.profile.gaps_pct(z)[0].tolist()
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half written is left


def test_writing_again_replaces_the_file(made):
    job, measured, path = made()
    path.write_bytes(b"old")
    write_profile(measured, job.profile_origin("search"), path)
    assert read_profile(path, job.profile_origin("search")).profile.num_rows == measured.profile.num_rows


def test_a_profile_of_something_else_is_refused_with_what_differs(made, small_config):
    job, _, path = made()
    origin = job.profile_origin("search")
    narrow = open_job(small_config("space.precisions=[fp32, int8, int4]"))
    wide = replace(origin, columns=(*origin.columns, ("table:new", Precision.INT8)))
    for wanted, words, others in [
        (replace(origin, checkpoint_sha256="f" * 64), ["the checkpoint", "f" * 12], ["window", "space", "traffic"]),
        (job.profile_origin("confirm"), ["the window", job.window_text("search"), job.window_text("confirm")], []),
        (replace(origin, row_range=RowRange.MINMAX), ["the row range", "minmax", "mse"], ["checkpoint (", "space"]),
        (replace(origin, traffic="x"), ["the traffic or the model", "batch size"], ["checkpoint", "window", "space"]),
        (
            narrow.profile_origin("search"),
            ["the space", "has table:c0 at fp16"],
            ["misses", "checkpoint (", "window ("],
        ),
        (wide, ["the space", "misses table:new at int8"], ["has table"]),
        (replace(origin, columns=origin.columns[::-1]), ["the space", "another order"], ["misses"]),
    ]:
        with pytest.raises(ConfigError) as error:
            read_profile(path, wanted)
        message = one_sentence(error, path)
        assert all(word in message for word in words) and "broken" not in message, message
        difference = message.split(": is not of this search: ")[1].split("; leave")[0]
        assert not [word for word in others if word in difference], message


def test_all_differences_are_told_at_once(made):
    job, _, path = made()
    origin = job.profile_origin("search")
    wanted = replace(origin, checkpoint_sha256="0" * 64, window="[a, b)", columns=origin.columns[:-1])
    with pytest.raises(ConfigError, match="the checkpoint .*the window .*the space"):
        read_profile(path, wanted)


@pytest.mark.parametrize(
    "override", ["traffic.batch_size=512", "traffic.bounds_check=drop", "traffic.group=user", "model.args.top=[16, 4]"]
)
def test_what_changes_the_examples_or_the_model_changes_the_origin(small_config, override):
    def origin(*overrides):
        config = small_config(*overrides)
        return replace(open_job(small_config()), config=config)

    before, after = origin().profile_origin("search"), origin(override).profile_origin("search")
    assert before.differences(after) and before.differences(before) == []
    assert "the traffic or the model" in before.differences(after)[0]


def test_a_file_that_was_cut_short_is_refused(made):
    job, _, path = made()
    content = path.read_bytes()
    for length in (0, 1, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ConfigError) as error:
            read_profile(path, job.profile_origin("search"))
        assert "is no profile of lowprec, or a broken one" in one_sentence(error, path)


def test_a_file_with_a_broken_byte_is_refused_or_reads_the_same(made):
    """The checksums of the archive find damage to content; what they leave out holds no numbers."""
    job, measured, path = made()
    content, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        broken = bytearray(content)
        place = int(rng.integers(len(broken))) if rng.random() < 0.5 else len(broken) - 1 - int(rng.integers(900))
        broken[place] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(broken))
        try:
            assert bits(read_profile(path, job.profile_origin("search")).profile) == bits(measured.profile)
        except ConfigError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 75


@pytest.mark.parametrize("content", ["text", "array", "other archive", "a list", "no use"])
def test_what_is_no_profile_is_refused(made, content):
    job, _, path = made()
    if content == "text":
        path.write_text("profile\n")
    elif content == "array":
        with path.open("wb") as out:
            np.save(out, np.zeros(3))
    elif content == "other archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "x")
    elif content == "a list":
        with path.open("wb") as out:
            np.savez(out, meta=np.array("[1, 2]"))
    else:
        change_meta(path, lambda meta: meta.update(use=3))
    with pytest.raises(ConfigError) as error:
        read_profile(path, job.profile_origin("search"))
    assert "is no profile of lowprec, or a broken one" in one_sentence(error, path)


def change_meta(path, change):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays["meta"]))
    change(meta)
    with path.open("wb") as out:
        np.savez(out, **{**arrays, "meta": np.array(json.dumps(meta))})


def test_another_format_is_refused_before_anything_else(made):
    job, _, path = made()
    change_meta(path, lambda meta: meta.update(format_version=FORMAT_VERSION + 1, columns="as they are then"))
    with pytest.raises(ConfigError) as error:
        read_profile(path, job.profile_origin("search"))
    message = one_sentence(error, path)
    assert f"has format {FORMAT_VERSION + 1}, this version reads {FORMAT_VERSION}" in message
    assert "broken" not in message


def test_arrays_that_miss_are_refused(made):
    job, _, path = made()
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    for name in set(arrays) - {"meta"}:
        with path.open("wb") as out:
            np.savez(out, **{k: v for k, v in arrays.items() if k != name})
        with pytest.raises(ConfigError, match="is no profile of lowprec"):
            read_profile(path, job.profile_origin("search"))


def test_a_missing_file_and_a_folder(made):
    job, _, path = made()
    with pytest.raises(ConfigError, match="there is no such file"):
        read_profile(path.with_name("absent.npz"), job.profile_origin("search"))
    with pytest.raises(ConfigError, match=str(path.parent)):
        read_profile(path.parent, job.profile_origin("search"))


def test_a_place_that_cannot_be_written(made, tmp_path):
    job, measured, path = made()
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "profile.npz", path.parent):
        with pytest.raises(ResultsError) as error:
            write_profile(measured, job.profile_origin("search"), place)
        assert "cannot be written" in one_sentence(error, place)
    assert read_profile(path, job.profile_origin("search")).profile.num_rows == measured.profile.num_rows
