"""The Ray side of evaluation: workers as actors of a Ray that is started for the command, or of a cluster."""

from lowprec.evaluation.cluster.connect import cluster_resources
from lowprec.evaluation.cluster.watch import Timeouts
from lowprec.evaluation.cluster.workers import RayWorkers

__all__ = ["RayWorkers", "Timeouts", "cluster_resources"]
