"""Documents of commands as text for people."""

from lowprec.cli.render.debug import render_debug, render_debug_comparison
from lowprec.cli.render.export import render_export, render_serving
from lowprec.cli.render.job import render_calibration, render_doctor, render_dry_run, render_train
from lowprec.cli.render.jobs import job_commands, render_job, render_jobs, render_submitted
from lowprec.cli.render.monitor import render_monitor
from lowprec.cli.render.search import render_front, render_plan, render_search, render_sensitivities, render_verify
from lowprec.cli.render.text import gap_text, render_frame
from lowprec.core.sizes import bytes_text

__all__ = [
    "bytes_text",
    "gap_text",
    "job_commands",
    "render_calibration",
    "render_debug",
    "render_debug_comparison",
    "render_doctor",
    "render_dry_run",
    "render_export",
    "render_frame",
    "render_front",
    "render_job",
    "render_jobs",
    "render_monitor",
    "render_plan",
    "render_search",
    "render_sensitivities",
    "render_serving",
    "render_submitted",
    "render_train",
    "render_verify",
]
