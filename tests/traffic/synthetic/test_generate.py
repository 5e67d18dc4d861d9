from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lowprec.core.errors import ConfigError, TrafficError
from lowprec.traffic import (
    LabelShift,
    NewIds,
    PopularityShift,
    SyntheticSpec,
    Truth,
    Window,
    generate,
    open_traffic,
    synthetic_tables,
)
from lowprec.traffic.synthetic import generate as synthetic_module

DAY = 86_400
SMALL = {"num_rows": 40_000, "num_sparse": 6, "num_multi_hot": 2, "num_dense": 3, "largest_table": 2000}


def table_of(**values: Any) -> pa.Table:
    return pa.concat_tables(synthetic_tables(SyntheticSpec(**{**SMALL, **values}))).combine_chunks()


def column(table: pa.Table, name: str) -> Any:
    values = table.column(name).combine_chunks()
    return (values.flatten() if pa.types.is_list(values.type) else values).to_numpy()


def sigmoid(logits: Any) -> Any:
    return 1 / (1 + np.exp(-logits))


def test_the_default_is_what_the_design_asks_for() -> None:
    spec = SyntheticSpec()
    sizes = list(spec.num_embeddings.values())
    assert len(sizes) == 26 and sizes[0] == 100 and sizes[-1] == 50_000
    ratios = np.diff(np.log(sizes))
    assert ratios.max() - ratios.min() < 0.02  # geometric but for rounding: at most 1 in 100 at the small end
    assert len(spec.multi_hot) == 3 and spec.num_dense == 13
    table = next(synthetic_tables(spec))
    assert table.num_rows == 16_384
    names = ["ts", "label", *(f"d{i}" for i in range(13)), *(f"c{i}" for i in range(26)), "true_logit"]
    assert table.column_names == names
    assert {table.schema.field(f).type for f in spec.multi_hot} == {pa.list_(pa.int64())}


def test_what_is_written_is_what_the_reader_reads(tmp_path: Path) -> None:
    spec = SyntheticSpec(**SMALL | {"num_rows": 150_000, "num_users": 50})
    assert generate(spec, tmp_path / "traffic") == 150_000
    files = sorted((tmp_path / "traffic").glob("*.parquet"))
    assert [pq.ParquetFile(file).metadata.num_rows for file in files] == [65_536, 65_536, 150_000 - 131_072]
    window = open_traffic(str(tmp_path / "traffic"), spec.schema_of_columns(), batch_size=10_000).window(Window())
    truth = Truth(spec)
    written = pa.concat_tables([pq.read_table(file) for file in files])
    logits = column(written, "true_logit")
    for batch in window.batches():
        assert batch.bad_rows == () and batch.out_of_range == {}
        users = written.column("user")[batch.index * 10_000 : (batch.index + 1) * 10_000].to_numpy()
        assert batch.groups is not None and np.array_equal(batch.groups, users)
        # The column is reproducible from what a reader sees; sums over features differ in nothing but their blocks.
        expected = logits[batch.index * 10_000 :][: batch.num_rows]
        np.testing.assert_allclose(truth.logits(batch.times, batch.dense, batch.sparse, users), expected, atol=1e-9)


def test_the_same_spec_gives_the_same_bytes_and_another_seed_another_log(tmp_path: Path) -> None:
    spec = SyntheticSpec(**SMALL)
    for name in ("one", "two"):
        generate(spec, tmp_path / name)
    for file in ("part-00000.parquet", "_synthetic.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert not table_of(seed=1).equals(table_of())


def test_a_chunk_does_not_depend_on_the_others() -> None:
    spec = SyntheticSpec(**SMALL)
    curve = synthetic_module._time_curve(spec)
    alone = synthetic_module._table(Truth(spec), 1, curve)
    assert alone.equals(list(synthetic_tables(spec))[1])


def test_clicks_follow_their_true_probability() -> None:
    table = table_of(num_rows=160_000)
    probability = sigmoid(column(table, "true_logit"))
    labels = column(table, "label").astype(np.float64)
    # Bins of equal size; five standard deviations of a sum of Bernoullis, 20 times: by chance once in 80,000.
    for rows in np.array_split(np.argsort(probability), 20):
        deviation = math.sqrt(float((probability[rows] * (1 - probability[rows])).sum()))
        assert abs(labels[rows].sum() - probability[rows].sum()) < 5 * deviation


@pytest.mark.parametrize("click_rate", [0.03, 0.25, 0.5])
def test_click_rate_and_signal_are_as_asked_for(click_rate: float) -> None:
    tables = [table_of(click_rate=click_rate, signal=1.5, seed=seed, num_sparse=26) for seed in range(3)]
    logits = np.concatenate([column(table, "true_logit") for table in tables])
    # Logits are only roughly normal (products, head ids), and few ids carry much of the variance of one seed.
    assert logits.std() == pytest.approx(1.5, rel=0.15)
    assert sigmoid(logits).mean() == pytest.approx(click_rate, rel=0.15)


@pytest.mark.parametrize("exponent", [0.8, 1.2])
def test_ids_follow_a_zipf_law(exponent: float) -> None:
    table = table_of(zipf_exponent=exponent, num_rows=100_000)
    for name in ("c5", "c4"):  # one id a row, and several
        counts = np.sort(np.bincount(column(table, name)))[::-1][:30].astype(np.float64)
        slope, _ = np.polyfit(np.log(np.arange(1, 31)), np.log(counts), 1)
        # The least count is above 300 (a relative error of 6 percent); over 30 ranks that moves the slope by 0.02.
        assert counts[-1] > 300 and slope == pytest.approx(-exponent, abs=0.06)


def test_popular_ids_are_anywhere_in_the_table() -> None:
    counts = np.bincount(column(table_of(), "c5"), minlength=2000)
    popularity = np.argsort(np.argsort(counts))
    # The rank correlation of two independent orders has a standard deviation of 1 / sqrt(n - 1).
    assert abs(np.corrcoef(popularity, np.arange(2000))[0, 1]) < 5 / math.sqrt(1999)


def test_multi_hot_bags_have_geometric_lengths_with_empty_ones() -> None:
    lengths = table_of(mean_length=3.0).column("c1").combine_chunks().value_lengths().to_numpy()
    # Variance of a geometric law from 0 with mean 3 is 12; five standard errors.
    assert abs(lengths.mean() - 3) < 5 * math.sqrt(12 / len(lengths))
    assert abs((lengths == 0).mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(lengths))
    assert lengths.max() <= 61


def test_time_rises_with_a_daily_wave() -> None:
    times = column(table_of(days=4.0, daily_cycle=0.6), "ts")
    start = SyntheticSpec().start
    assert (np.diff(times) >= 0).all() and times[0] >= start and times[-1] < start + 4 * DAY
    assert times[-1] > start + 3.99 * DAY
    hours = (times - start) % DAY // 3600
    noon, night = ((hours == h).sum() for h in (12, 0))
    assert noon / night == pytest.approx(1.6 / 0.4, rel=0.1)  # 1 + 0.6 against 1 - 0.6


def test_users_move_all_their_rows() -> None:
    spec = SyntheticSpec(**SMALL | {"num_users": 40, "user_signal": 1.0})
    table = pa.concat_tables(synthetic_tables(spec))
    users, logits = column(table, "user"), column(table, "true_logit")
    means = np.array([logits[users == user].mean() for user in range(40)])
    assert np.corrcoef(means, Truth(spec).user_effects)[0, 1] > 0.99


def share_of(ids: Any, chosen: Any) -> float:
    return float(np.isin(ids, chosen).mean())


def test_popularity_shift_changes_who_is_popular_from_its_day_on() -> None:
    drift = PopularityShift(day=5, features=("c5",), share=0.6)
    table = table_of(drifts=(drift,))
    start = SyntheticSpec().start + 5 * DAY
    times = column(table, "ts")
    before, after = (table.filter(pa.array(mask)) for mask in (times < start, times >= start))
    head = np.argsort(np.bincount(column(before, "c5"), minlength=2000))[::-1][:10]
    old, new = share_of(column(before, "c5"), head), share_of(column(after, "c5"), head)
    assert new == pytest.approx(0.4 * old, abs=0.05)
    # The other features, and the days before, are as without the drift.
    plain = table_of()
    for name in ("ts", "d0", "d1", "d2", "c0", "c1", "c2", "c3", "c4"):
        assert table.column(name).equals(plain.column(name)), name
    assert before.equals(plain.slice(0, before.num_rows))


def test_new_ids_appear_on_their_day_and_not_before() -> None:
    drift = NewIds(day=6, features=("c5", "c4"), share=0.3)
    table, truth = table_of(drifts=(drift,)), Truth(SyntheticSpec(**SMALL, drifts=(drift,)))
    start = SyntheticSpec().start + 6 * DAY
    times = column(table, "ts")
    before, after = (table.filter(pa.array(mask)) for mask in (times < start, times >= start))
    for name in ("c5", "c4"):
        feature = truth.features[int(name[1:])]
        kept_back = feature.id_of_rank[feature.num_seen :]
        assert not np.isin(kept_back, column(before, name)).any()
        ids = column(after, name)
        assert abs(share_of(ids, kept_back) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / len(ids))
    assert share_of(column(after, "c3"), np.unique(column(before, "c3"))) > 0.99


def test_label_shift_moves_the_logits_from_its_day_on() -> None:
    shifted, plain = table_of(drifts=(LabelShift(day=7, offset=-0.8),)), table_of()
    moved = column(shifted, "true_logit") - column(plain, "true_logit")
    expected = np.where(column(plain, "ts") >= SyntheticSpec().start + 7 * DAY, -0.8, 0.0)
    np.testing.assert_allclose(moved, expected, atol=1e-12)
    assert shifted.column("c5").equals(plain.column("c5"))


def test_ids_carry_signal_that_can_be_learned() -> None:
    table = table_of(num_rows=160_000, num_sparse=8)
    spec = SyntheticSpec(**SMALL | {"num_sparse": 8})
    labels, half = column(table, "label").astype(np.float64), 80_000
    rate = labels[:half].mean()
    score = np.zeros(half)
    for name in sorted(set(spec.features) - spec.multi_hot):
        ids, size = column(table, name), spec.num_embeddings[name]
        clicks = np.bincount(ids[:half], labels[:half], minlength=size) + 20 * rate
        counts = np.bincount(ids[:half], minlength=size) + 20
        score += np.log(clicks / (counts - clicks))[ids[half:]] - math.log(rate / (1 - rate))
    loss = np.log1p(np.exp(score + math.log(rate / (1 - rate)))) - labels[half:] * (score + math.log(rate / (1 - rate)))
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    # Even counting alone, feature by feature, finds a good part of what ids tell.
    assert loss.mean() / entropy < 0.92


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"num_row": 5}, ["traffic.synthetic.num_row: no such key", 'did you mean "num_rows"?']),
        ({"num_rows": 0}, ["traffic.synthetic.num_rows: ", "greater than 0", "got 0"]),
        ({"days": True}, ["traffic.synthetic.days: ", "a number, not a boolean"]),
        ({"days": math.inf}, ["traffic.synthetic.days: ", "finite number"]),
        ({"drifts": [{"kind": "label_shift", "day": True, "offset": 1}]}, ["drifts[0].day: ", "not a boolean"]),
        ({"num_rows": "many"}, ["traffic.synthetic.num_rows: ", 'got "many"']),
        ({"zipf_exponent": -1}, ["traffic.synthetic.zipf_exponent: ", "got -1"]),
        ({"table_sizes": [10, 20]}, ["table_sizes must have num_sparse = 26 entries"]),
        ({"largest_table": 50}, ["largest_table must be at least smallest_table"]),
        ({"num_multi_hot": 27}, ["num_multi_hot must be at most num_sparse"]),
        ({"dense_share": 0.8, "interaction_share": 0.3}, ["add up to at most 1"]),
        ({"drifts": [{"kind": "label_shift", "day": 3}]}, ["traffic.synthetic.drifts[0].offset: is required"]),
        ({"drifts": [{"kind": "lable_shift", "day": 3}]}, ["traffic.synthetic.drifts[0]: ", "popularity_shift"]),
        ({"drifts": [{"kind": "new_ids", "day": 3, "features": []}]}, ["drifts[0].features: "]),
        ({"drifts": [{"kind": "new_ids", "day": 3, "features": ["x"]}]}, ['drifts[0]: no feature "x"', "c0 to c25"]),
        ({"drifts": [{"kind": "new_ids", "day": 3, "features": ["c1"], "fraction": 0.2}] * 3}, ["more than half"]),
        ({"num_rows": 0, "days": 0}, ["num_rows: ", "days: "]),
    ],
)
def test_a_wrong_spec_names_every_key(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        SyntheticSpec.from_dict(values)
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


def test_a_spec_from_a_config() -> None:
    drift = {"kind": "label_shift", "day": 3, "offset": 1}
    values = {"num_sparse": 2, "table_sizes": [10, 20], "num_multi_hot": 1, "drifts": [drift]}
    spec = SyntheticSpec.from_dict(values)
    assert spec.num_embeddings == {"c0": 10, "c1": 20}
    assert spec.drifts == (LabelShift(day=3, offset=1),)
    assert SyntheticSpec.from_dict(spec.model_dump(mode="json")) == spec


def test_generating_again_does_nothing_and_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SyntheticSpec(**SMALL)
    generate(spec, tmp_path / "t")
    made = (tmp_path / "t" / "part-00000.parquet").stat().st_mtime_ns
    generate(spec, tmp_path / "t")
    assert (tmp_path / "t" / "part-00000.parquet").stat().st_mtime_ns == made
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data.parquet").write_text("precious")
    for place, other in (("t", SyntheticSpec(**SMALL, seed=1)), ("mine", spec)):
        with pytest.raises(TrafficError, match=rf"{place}: holds something else.*choose another traffic\.path"):
            generate(other, tmp_path / place)
    assert (tmp_path / "mine" / "data.parquet").read_text() == "precious"

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic_module, "_write", full)
    with pytest.raises(TrafficError, match="cannot be written: No space left on device"):
        generate(spec, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "t"]


def test_few_features_and_no_extras() -> None:
    table = table_of(num_sparse=1, num_multi_hot=0, num_dense=0, num_interactions=5, num_rows=100)
    assert table.column_names == ["ts", "label", "c0", "true_logit"] and table.num_rows == 100
