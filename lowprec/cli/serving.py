"""Commands for a finished plan: `lowprec debug`, `lowprec export`, `lowprec bench-serving`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lowprec.cli.command import LOCAL_PATH, PLACE, POSITIVE, command, show
from lowprec.core import exit_codes

if TYPE_CHECKING:
    from lowprec.config import Config
    from lowprec.storage import Location

__all__ = ["serving"]

serving = click.Group("serving")
_command = functools.partial(command, serving)


@_command("debug")
@click.option("--plan", type=PLACE, required=True, metavar="PLAN", help="A plan.json, or a folder of lowprec export.")
@click.option("--against", type=PLACE, metavar="PLAN", help="Another one, to compare with: what got worse?")
@click.option("--snapshot", metavar="CHECKPOINT", help="Compare with the same plan on another snapshot of the model.")
@click.option("--window", type=click.Choice(["search", "confirm"]), default="confirm", show_default=True)
@click.option("--examples", type=click.IntRange(min=1), default=32_768, show_default=True, help="Size of the sample.")
@click.option("--arrays", type=LOCAL_PATH, metavar="DIR", help="Errors by channel and by row, as Parquet files.")
def debug(
    config: Config,
    plan: Location,
    against: Location | None,
    snapshot: str | None,
    window: str,
    examples: int,
    arrays: Path | None,
    as_json: bool,
) -> int:
    """Where numeric error comes from: each unit alone and all together, the suspects, the change that helps most.

    Exit codes: 0 all is as planned, 2 values that are not finite, or a folder that is not what its plan makes.
    """
    from lowprec.cli import console, render
    from lowprec.debug import compare_plans, debug_plan

    with console.Bars().shown() as bars:
        if against is None and snapshot is None:
            report = debug_plan(config, plan, window=window, num_examples=examples, arrays=arrays, progress=bars)
            content, is_as_planned, shown = report.to_dict(), report.is_as_planned, render.render_debug
        else:
            compared = compare_plans(
                config, plan, against, snapshot, window=window, num_examples=examples, arrays=arrays, progress=bars
            )
            content, is_as_planned = compared.to_dict(), compared.is_as_planned
            shown = render.render_debug_comparison
    show(console.json_document("debug", content), as_json, shown)
    return 0 if is_as_planned else exit_codes.VERDICTS["rejected"]


@_command("export")
@click.option("--plan", type=PLACE, required=True, metavar="PLAN", help="The plan.json to export (a path or URL).")
@click.option(
    "--out", type=LOCAL_PATH, required=True, metavar="DIR", help="The folder to write; must not be there yet."
)
@click.option("--window", type=click.Choice(["search", "confirm"]), default="confirm", help="Traffic to compare on.")
@click.option("--torchscript", is_flag=True, help="Also as one TorchScript file, which needs no code of the model.")
@click.option("--torch-export", is_flag=True, help="Also as one file of torch.export.")
def export(
    config: Config, plan: Location, out: Path, window: str, torchscript: bool, torch_export: bool, as_json: bool
) -> None:
    """Write what serves a plan to a folder for `lowprec.load(DIR)`, after comparing it with what was certified."""
    from lowprec.cli import console, render
    from lowprec.export import export_plan

    programs = [name for name, wanted in {"torchscript": torchscript, "torch_export": torch_export}.items() if wanted]
    with console.Bars().shown() as bars:
        exported = export_plan(config, plan, out, window=window, programs=programs, progress=bars)
    show(console.json_document("export", exported.to_dict()), as_json, render.render_export)


@_command("bench-serving", config=False)
@click.argument("folder", type=LOCAL_PATH, metavar="DIR")
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(min=1),
    multiple=True,
    help="Examples of a request [default: 1, 64, 1024].",
)
@click.option("--seconds", type=POSITIVE, default=2.0, show_default=True)
@click.option("--threads", "num_threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--in-memory", is_flag=True, help="Tables of both in huge pages, not in mapped files.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the exported config.")
def bench_serving(
    folder: Path,
    batch_sizes: tuple[int, ...],
    seconds: float,
    num_threads: int,
    in_memory: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Requests a second and latencies of an exported folder beside its fp32 model, and the capacity that it saves.

    Each is measured for --seconds at every size, in turns. With --set cost.calibration=FILE also what that predicted.
    """
    from lowprec.cli import console, render
    from lowprec.export import measure_serving

    with console.Bars().shown() as bars:
        report = measure_serving(
            folder,
            batch_sizes=batch_sizes or (1, 64, 1024),
            seconds=seconds,
            num_threads=num_threads,
            in_memory=in_memory,
            overrides=overrides,
            progress=bars,
        )
    show(console.json_document("bench-serving", report.to_dict()), as_json, render.render_serving)
