"""Commands about this machine: `lowprec calibrate`, `lowprec doctor`."""

from __future__ import annotations

import functools
from pathlib import Path

import click

from lowprec.cli.command import LOCAL_PATH, command, show
from lowprec.core import exit_codes

__all__ = ["machine"]

machine = click.Group("machine")
_command = functools.partial(command, machine)


@_command("calibrate", config=False)
@click.option(
    "--out",
    type=LOCAL_PATH,
    default=Path("runs/calibration.json"),
    show_default=True,
    help="The file to write.",
)
@click.option("--config", "model", type=LOCAL_PATH, help="Measure the layers and dims of this config's model as well.")
@click.option("--dim", "dims", type=click.IntRange(min=1), multiple=True, help="Measure this dim; may be repeated.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Examples that serving looks up at once.",
)
@click.option("--quick", is_flag=True, help="A small grid and few repetitions: seconds instead of a minute.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the ids that are looked up.")
@click.option("--threads", "num_threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--memory-mb",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Leave out tables that are larger (in MiB).",
)
def calibrate(
    out: Path,
    model: Path | None,
    dims: tuple[int, ...],
    batch_size: int,
    quick: bool,
    seed: int,
    num_threads: int,
    memory_mb: int,
    as_json: bool,
) -> None:
    """Measure lookups on this machine, by precision, dim, rows and ids in a bag; with --config, layers by shape."""
    from lowprec.cli import console, render
    from lowprec.latency.calibration_file import calibration_document, check_writable, write_calibration
    from lowprec.latency.measure import calibrate as measure
    from lowprec.ops.timing import default_grid

    check_writable(out)
    layers = None
    if model is not None:
        from lowprec.config import load_config
        from lowprec.search.record.describe import what_to_time

        of_tables, layers = what_to_time(load_config(model), batch_size)
        dims = (*dims, *of_tables)
    grid = default_grid(quick=quick, dims=dims, num_bags=batch_size, memory_limit_bytes=memory_mb * 2**20)
    with console.Bars().shown() as bars:
        calibration = measure(grid, layers, seed=seed, num_threads=num_threads, progress=bars)
    write_calibration(calibration, out)
    content = {"path": str(out), **calibration_document(calibration, grid)}
    show(console.json_document("calibrate", content), as_json, render.render_calibration)


@_command("doctor", config=False)
@click.option("--address", metavar="ADDRESS", help="Of a Ray cluster [default: RAY_ADDRESS, or one on this machine].")
def doctor(address: str | None, as_json: bool) -> int:
    """Look at this machine: kernels, libraries, memory bandwidth, GPU, Ray."""
    from lowprec.cli import console, render
    from lowprec.cli.doctor import examine

    with console.Bars().shown() as bars:
        content = examine(address=address, progress=bars)
    show(console.json_document("doctor", content), as_json, render.render_doctor)
    return 0 if content["state"] == "ok" else exit_codes.ERROR
