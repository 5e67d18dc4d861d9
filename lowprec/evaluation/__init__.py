"""How much accuracy a plan costs, measured on traffic."""

from lowprec.evaluation.evaluate import Evaluation, evaluate_plans
from lowprec.evaluation.exact.exact_evaluator import ExactEvaluator
from lowprec.evaluation.metrics import PlanMetrics, Sums

__all__ = ["Evaluation", "ExactEvaluator", "PlanMetrics", "Sums", "evaluate_plans"]
