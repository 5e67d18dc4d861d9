"""A config is checked once, and whatever is wrong is named by file and key."""

import textwrap
from pathlib import Path
from typing import get_args, get_origin

import pytest
from click.testing import CliRunner

from lowprec.cli.main import cli
from lowprec.config import Config, MonitorConfig, SearchConfig, SpaceConfig, load_config
from lowprec.core.errors import ConfigError
from lowprec.core.section import Section

CONFIG = """
name: t
traffic:
  path: data
  dense: [d0, d1]
  log1p: "*"
  sparse: [c0, {name: c1, column: raw, modulo: 7}]
windows:
  search: {start: 2026-01-01, end: 2026-01-02}
  confirm: {start: 5}
model: {checkpoint: m.safetensors}
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(textwrap.dedent(CONFIG))
    return file


def test_short_forms(path):
    config = load_config(path)
    schema = config.traffic.schema_of_columns()
    assert [(f.name, f.column, f.num_embeddings) for f in schema.sparse] == [("c0", "c0", None), ("c1", "raw", 7)]
    assert schema.log1p == {"d0", "d1"}
    assert config.windows.search.start == "2026-01-01"
    assert config.windows.confirm.start == 5
    assert config.model.factory == "lowprec.models.dlrm:build"


def test_overrides_are_yaml(path):
    config = load_config(path, ("search.budget=0.5", "traffic.dense=[x]", "traffic.log1p=[]", "model.args.dim=8"))
    assert config.search.budget == 0.5
    assert config.traffic.dense == ("x",)
    assert config.model.args == {"dim": 8}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("search.budgt=1", 'search.budgt: no such key; did you mean "budget"?'),
        ("serach.budget=1", 'serach: no such key; did you mean "search"?'),
        ("search.budget=0", "search.budget: input should be greater than 0; got 0"),
        ("search.budget=-1", "greater than 0; got -1"),
        ("search.budget=big", 'search.budget: .*; got "big"'),
        ("space.precisions=[int5]", "space.precisions: int5 is not among fp32, fp16, int8, int4, int2; got "),
        ("space.precisions=[bf16]", "space.precisions: bf16 is not among fp32, fp16, int8, int4, int2; got "),
        ("space.layers=[int4]", "space.layers.precisions: int4 is not among fp32, fp16, bf16, int8_dynamic, "),
        ("space.units=[{match: 'table:*', fixed: bf16}]", r"units\[0\].fixed: bf16 is not among .* int4, int2; got"),
        ("space.units=[{match: 'layer:*', precisions: [int2]}]", "int2 is not among fp32, .* emulated; got"),
        ("space.units=[{match: '*', precisions: [int3]}]", "int3 is not among fp32, .*int2; got"),
        ("traffic.sparse=[c0, {name: c1, wieghts: w}]", r'sparse\[1\].wieghts: no such key; did you mean "weights"'),
        ("monitor.webhook={ulr: x}", 'monitor.webhook.ulr: no such key; did you mean "url"'),
        ("space.units=[{mtach: x}]", 'space.units.*mtach: no such key; did you mean "match"'),
        ("search=3", "search: input should be a mapping; got 3"),
        ("windows.search=1", "windows.search: input should be a mapping; got 1"),
        ("traffic=null", "traffic.path: is required"),
        ("space.units=[{match: x}]", "give either precisions or fixed"),
        ("traffic.bounds_check=ignore", "traffic.bounds_check: .*'error', 'drop' or 'zero'"),
        ("traffic.sparse=[{column: x}]", r"traffic.sparse\[0\].name: is required"),
        ("windows.search={2026-01-06: 1}", "windows.search.2026-01-06: no such key"),
        ("windows.search={2026-01-06 12:00:00: 1}", "windows.search.2026-01-06 12:00:00: no such key"),
        ("search={~: 1, yes: 2}", "search.null: no such key.*; search.true: no such key"),
        ("search={[a, b]: 1}", "the value is not YAML: a key must be text, not a list"),
        ("search={budget: 1, budget: 2}", 'the value is not YAML: key "budget" is there twice'),
        ("windows.search.end=2026-02-30", 'not YAML: "2026-02-30" is not a timestamp: day is out of range'),
        ("nonsense", "expected KEY=VALUE"),
        ("name.x=1", '"name" is not a section'),
    ],
)
def test_what_is_wrong_is_named(path, override, said):
    with pytest.raises(ConfigError, match=said):
        load_config(path, (override,))


def numeric_keys(section=Config, prefix=""):
    """Every key of the config whose type has an int or a float in it, with whether it is a list."""
    for key, field in section.model_fields.items():
        kinds = list(parts(field.annotation))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from numeric_keys(kind, f"{prefix}{key}.")
        if {int, float} & set(kinds):
            yield f"{prefix}{key}", tuple in kinds


def parts(annotation):
    yield get_origin(annotation) or annotation
    for inner in get_args(annotation):
        yield from parts(inner)


@pytest.mark.parametrize(("key", "is_list"), list(numeric_keys()))
@pytest.mark.parametrize("value", ["yes", "false", ".nan", ".inf", "-.inf"])
def test_booleans_and_infinities_are_no_numbers(path, key, is_list, value):
    text = f"[0.5, {value}]" if is_list else value
    section, _, last = key.rpartition(".")
    override = {
        "traffic.sparse": f"traffic.sparse=[{{name: c0, {last}: {text}}}]",
        "monitor.webhook": f"monitor.webhook={{url: http://x, {last}: {text}}}",
        "space.layers": f"space.layers={{precisions: [fp32], {last}: {text}}}",
        "space.layers.arithmetic": f"space.layers={{precisions: [fp32, emulated], arithmetic: {{{last}: {text}}}}}",
    }.get(section, f"{key}={text}")
    with pytest.raises(ConfigError, match=rf"{last}(\[1\])?(\.\S+)?: .*; got "):
        load_config(path, (override,))


def test_a_boolean_budget_is_refused_in_words(path):
    with pytest.raises(ConfigError, match=r"search.budget: input should be a number, not a boolean .*; got true"):
        load_config(path, ("search.budget=yes",))


def test_sections_without_keys_have_their_defaults(path):
    path.write_text(path.read_text() + "search:\nmonitor:\n  drift:\n  webhook:\nspace: ~\n")
    config = load_config(path)
    assert (config.search, config.monitor, config.space) == (SearchConfig(), MonitorConfig(), SpaceConfig())
    config = load_config(path, ("search.budget=0.1", "monitor.drift.min_distance=0.2"))
    assert (config.search.budget, config.monitor.drift.min_distance) == (0.1, 0.2)


def test_every_wrong_key_is_named_at_once(path):
    with pytest.raises(ConfigError, match="model.chekpoint: .*; search.budget: "):
        load_config(path, ("search.budget=0", "model.chekpoint=1"))


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml: cannot be read"):
        load_config(tmp_path / "none.yaml")
    for text, said in (
        ("a: [", "is not YAML"),
        ("- 1", "must be a mapping"),
        ("? [a, b]\n: 3", "is not YAML: a key must be text, not a list.* line 1"),
        ("a:\n  ? {b: 1}\n  : 3", "is not YAML: a key must be text, not a mapping.* line 2"),
        ("a: 2026-13-45", 'is not YAML: "2026-13-45" is not a timestamp'),
        ("a: !!bool maybe", 'is not YAML: "maybe" is not a bool'),
        ("a: &x [*x]", "is not YAML: it is nested too deeply"),
    ):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize("name", ["demo", "movielens", "criteo"])
def test_the_configs_of_the_project_load_and_have_windows_in_time_order(name):
    config = load_config(Path(__file__).parents[2] / "configs" / f"{name}.yaml")
    ends = [config.windows.train.end, config.windows.validation.end, config.windows.search.end]
    assert [config.windows.validation.start, config.windows.search.start, config.windows.confirm.start] == ends


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("option", ["--budget", "--max-ne"])
def test_options_refuse_numbers_that_are_not_finite(path, option, value):
    found = CliRunner().invoke(cli, ["verify", str(path), "--uniform", "int4", option, value])
    assert (found.exit_code, "is not a finite number" in found.output) == (2, True)
