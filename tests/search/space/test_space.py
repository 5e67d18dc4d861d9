"""A space holds exactly the plans that the config allows."""

import pytest

from lowprec.config import SpaceConfig
from lowprec.core.errors import ConfigError
from lowprec.plan import Plan, Precision, Unit
from lowprec.search.space.space import build_space

P = Precision
UNITS = tuple(
    Unit(f"table:{name}", rows, 16) for name, rows in (("user", 100), ("item", 50), ("tag_a", 10), ("tag_b", 20))
)


def space(**section):
    return build_space(UNITS, SpaceConfig.model_validate(section))


def test_without_rules_every_unit_is_free():
    s = space()
    assert s.num_plans == 5**4
    assert s.most_exact == Plan.uniform(UNITS, P.FP32)
    assert s.cheapest == Plan.uniform(UNITS, P.INT2)
    assert s.fp32_bytes == 180 * 64 and s.size_bytes(s.cheapest) == 180 * 8


def test_rules_by_pattern_a_later_one_wins():
    s = space(
        precisions=["fp32", "int8"],
        units=[{"match": "table:tag_*", "precisions": ["int4", "int2"]}, {"match": "table:tag_b", "fixed": "fp16"}],
    )
    choices = {d.name: d.choices for d in s.decisions}
    assert choices == {
        "table:user": (P.FP32, P.INT8),
        "table:item": (P.FP32, P.INT8),
        "table:tag_a": (P.INT4, P.INT2),
        "table:tag_b": (P.FP16,),
    }
    assert [d.name for d in s.free] == ["table:user", "table:item", "table:tag_a"]
    assert s.nearest_uniform(P.INT8)["table:tag_a"] is P.INT4
    assert s.nearest_uniform(P.INT2)["table:user"] is P.INT8


def test_groups_share_a_precision():
    s = space(groups=[["table:tag_*"]], units=[{"match": "table:tag_b", "precisions": ["fp16", "int4"]}])
    (group,) = [d for d in s.decisions if d.name == "group:0"]
    assert group.units == ("table:tag_a", "table:tag_b") and group.choices == (P.FP16, P.INT4)
    plan = s.plan({"group:0": P.INT4})
    assert plan["table:tag_a"] is plan["table:tag_b"] is P.INT4
    assert s.holds(plan) and s.choices(plan)["group:0"] is P.INT4
    assert not s.holds(plan.replace({"table:tag_a": P.FP16}))
    assert not s.holds(plan.replace({"table:tag_a": P.INT2, "table:tag_b": P.INT2}))


def test_dominated_choices_are_dropped_and_reported():
    s = space(row_alignment=16)
    assert all(d.choices == (P.FP32, P.FP16, P.INT4) for d in s.decisions)
    assert {(d.name, d.precision) for d in s.dominated} == {(u.name, p) for u in UNITS for p in (P.INT8, P.INT2)}


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"units": [{"match": "table:usr", "fixed": "int8"}]},
            r'space.units\[0\].match: "table:usr" matches no unit.*table:user',
        ),
        ({"groups": [["table:tag_*"], ["table:tag_a"]]}, "table:tag_a is in groups 0 and 1"),
        ({"groups": [["nothing"]]}, r"space.groups\[0\]"),
        (
            {
                "groups": [["table:tag_*"]],
                "units": [{"match": "table:tag_a", "fixed": "int8"}, {"match": "table:tag_b", "fixed": "int4"}],
            },
            "no precision is allowed for all of table:tag_a, table:tag_b",
        ),
    ],
)
def test_rules_that_contradict(section, said):
    with pytest.raises(ConfigError, match=said):
        space(**section)
