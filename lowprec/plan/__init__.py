"""Precisions, units and plans."""

from lowprec.plan.plan import Plan, Unit, is_layer, rowwise_ranges
from lowprec.plan.plan_file import Form, Forms, PlanFile, form_of, read_plan, write_plan
from lowprec.plan.precision import (
    LAYER_PRECISIONS,
    TABLE_PRECISIONS,
    Precision,
    RowRange,
    precision_counts,
    precision_texts,
    precisions_of,
)

__all__ = [
    "LAYER_PRECISIONS",
    "TABLE_PRECISIONS",
    "Form",
    "Forms",
    "Plan",
    "PlanFile",
    "Precision",
    "RowRange",
    "Unit",
    "form_of",
    "is_layer",
    "precision_counts",
    "precision_texts",
    "precisions_of",
    "read_plan",
    "rowwise_ranges",
    "write_plan",
]
