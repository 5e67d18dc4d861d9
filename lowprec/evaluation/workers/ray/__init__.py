"""The Ray side of evaluation: workers as actors of a Ray that is started for the command, or of a cluster."""

from lowprec.evaluation.workers.ray.connect import cluster_resources
from lowprec.evaluation.workers.ray.liveness import Timeouts
from lowprec.evaluation.workers.ray.ray_workers import RayWorkers

__all__ = ["RayWorkers", "Timeouts", "cluster_resources"]
