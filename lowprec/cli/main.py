"""The command line. Every command parses, loads what it needs, makes one call and prints."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowprec._version import __version__
from lowprec.cli.command import DURATION, LOCAL_PATH, PLACE, POSITIVE, command, show
from lowprec.cli.jobs import as_job, submit
from lowprec.cli.machine import machine
from lowprec.cli.plan import by_hand, chosen_plan, plans
from lowprec.cli.serving import serving
from lowprec.cli.signals import run_and_exit
from lowprec.core import exit_codes

if TYPE_CHECKING:
    from lowprec.cli.render.frame import Format
    from lowprec.config import Config
    from lowprec.session.placement import Machines
    from lowprec.storage import Location

__all__ = ["cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="lowprec")
def cli() -> None:
    """Find the cheapest numeric precision for every embedding table, and prove on logged traffic that accuracy holds.

    Exit codes: 0 certified, ok or done, 1 warning, 2 rejected or broken, 3 error, 4 inconclusive, 64 wrong usage.
    """


_command = functools.partial(command, cli)
cli.add_command(submit)
for _added in (*plans.commands.values(), *serving.commands.values(), *machine.commands.values()):
    cli.add_command(_added)


@_command("demo", config=False)
@click.option("--root", type=LOCAL_PATH, default=Path("runs"), show_default=True, help="Where all goes.")
def demo(root: Path, as_json: bool) -> int:
    """Make traffic, train a small DLRM, search, confirm: everything on this machine, in a few minutes."""
    from lowprec.cli import console, render
    from lowprec.cli.demo import run_demo

    with console.Bars().shown() as bars:
        outcome = run_demo(root, progress=bars)
    document = console.json_document("demo", outcome.to_dict())
    show(document, as_json, render.render_search)
    return exit_codes.VERDICTS[outcome.verdict]


@_command("generate")
def generate(config: Config, as_json: bool) -> None:
    """Write the synthetic traffic that CONFIG describes in traffic.synthetic to traffic.path."""
    from lowprec.cli import console
    from lowprec.cli.demo import generate_traffic

    with console.Bars().shown() as bars:
        rows = generate_traffic(config, progress=bars)
    document = console.json_document("generate", {"path": config.traffic.path, "num_rows": rows})
    show(document, as_json, _print_rows_written)


@_command("convert", config=False)
@click.argument("source")
@click.argument("out")
def convert(source: str, out: str, as_json: bool) -> None:
    """Convert an original Criteo file (tab separated, also gzip) to Parquet."""
    from lowprec.cli import console
    from lowprec.traffic.criteo import convert_criteo

    rows = convert_criteo(source, out)
    document = console.json_document("convert", {"path": out, "num_rows": rows})
    show(document, as_json, _print_rows_written)


@_command("train")
def train(config: Config, as_json: bool) -> None:
    """Train the model of CONFIG on its train window and write its checkpoint."""
    from dataclasses import asdict

    from lowprec.cli import console, render
    from lowprec.models.training.train import train as train_model

    with console.Bars().shown() as bars:
        report = train_model(config, progress=bars)
    show(console.json_document("train", asdict(report)), as_json, render.render_train)


@_command("search", optional=True)
@click.option("--resume", metavar="RUN", help="Continue a run that was stopped or killed.")
@click.option("--dry-run", is_flag=True, help="Print tables, space, bytes and windows, and stop.")
@click.option("--timeout", type=DURATION, metavar="DURATION", help="Stop proposing plans after so long: 90s, 15m, 2h.")
@click.option("--max-trials", type=click.IntRange(min=1), help="Evaluate at most so many plans.")
@click.option("--profile", type=PLACE, metavar="FILE", help="Use the profile.npz of an earlier run (a path or URL).")
@click.option("--workers", type=click.IntRange(min=1), help="With --dry-run: place the tables on so many workers,")
@click.option("--worker-memory", metavar="SIZE", help="each of so much memory: 8GB, 64GiB.")
@click.option("--network", metavar="RATE", help="Between any two of them; 10Gbit when left out.")
@click.option("--calibration", type=LOCAL_PATH, help="Lookup times by `lowprec calibrate`.")
@click.option("--tables", type=LOCAL_PATH, help="Place the tables of a JSON file, without CONFIG.")
def search(
    config: Config | None,
    resume: str | None,
    dry_run: bool,
    timeout: float | None,
    max_trials: int | None,
    profile: Location | None,
    workers: int | None,
    worker_memory: str | None,
    network: str | None,
    calibration: Path | None,
    tables: Path | None,
    as_json: bool,
) -> int:
    """Find the cheapest plan within budget and confirm it on a later window.

    With --dry-run, say what that would be, and with --workers where the tables would lie.
    """
    from lowprec.cli import console, render

    machines = _machines(config, dry_run, workers, worker_memory, network, calibration, tables)
    if tables is not None:
        from lowprec.session.placement import place_spec

        assert machines is not None
        placed = console.json_document("search", {"dry_run": True, "placement": place_spec(tables, machines)})
        show(placed, as_json, render.render_dry_run)
        return 0
    assert config is not None
    _check_results_root(config)
    limits = {"timeout_s": timeout, "max_trials": max_trials}
    config = config.with_(search={k: v for k, v in limits.items() if v is not None})
    if dry_run:
        from lowprec.search.job import open_job
        from lowprec.search.record.describe import describe_job
        from lowprec.session.placement import describe_placement

        job = open_job(config, is_placed=workers is None)
        described = describe_job(job) | ({"placement": describe_placement(job.demand(), machines)} if machines else {})
        show(console.json_document("search", described), as_json, render.render_dry_run)
        return 0
    from lowprec.search.search_run import run_search

    with console.Bars().shown() as bars:
        outcome = run_search(config, resume=resume, profile=profile, progress=bars)
    show(console.json_document("search", outcome.to_dict()), as_json, render.render_search)
    return exit_codes.VERDICTS[outcome.verdict]


@_command("verify")
@click.option("--plan", type=PLACE, metavar="PLAN", help="The plan.json to evaluate (a path or URL).")
@by_hand
@click.option("--window", type=click.Choice(["search", "confirm"]), default="confirm", show_default=True)
@click.option("--budget", type=POSITIVE, help="Percent; else the config's or the plan's.")
@click.option("--snapshot", metavar="CHECKPOINT", help="Judge the plan on a newer checkpoint of the same model.")
@click.option("--repair", is_flag=True, help="Where it is not certified, search for one that is, from this plan on.")
@click.option("--sequential", is_flag=True, help="Allow repeated runs on a growing window (wider interval).")
@click.option("--max-ne", type=POSITIVE, help="Reject an NE that is not below it.")
@click.option("--calibration", metavar="LOWEST,HIGHEST", help="Reject a calibration outside of this range.")
@click.option("--max-ne-change", type=float, metavar="PERCENT", help="With --snapshot: reject a larger rise of NE.")
def verify(
    config: Config,
    plan: Location | None,
    uniform: str | None,
    units: tuple[str, ...],
    window: str,
    budget: float | None,
    snapshot: str | None,
    repair: bool,
    sequential: bool,
    max_ne: float | None,
    calibration: str | None,
    max_ne_change: float | None,
    as_json: bool,
) -> int:
    """Evaluate one plan exactly against its budget; with --snapshot the gate before a launch.

    The plan is a file (--plan), or by hand (--uniform, --unit). Floors (--max-ne, --calibration, --max-ne-change, or
    the config's section gate) judge the model itself: a broken one rejects the plan.

    Exit codes: 0 certified, 2 rejected, 4 inconclusive: more data is needed; with --repair those of the search.
    """
    from lowprec.cli import console, render
    from lowprec.config import with_gate
    from lowprec.gate.verify import verify_plan

    chosen = chosen_plan(plan, uniform, units)
    _check_results_root(config)
    config = with_gate(
        config,
        max_ne=max_ne,
        calibration=calibration,
        max_ne_change_pct=max_ne_change,
        has_snapshot=snapshot is not None,
    )
    with console.Bars().shown() as bars:
        outcome = verify_plan(
            config,
            chosen,
            window=window,
            budget_pct=budget,
            snapshot=snapshot,
            repair=repair,
            sequential=sequential,
            progress=bars,
        )
    show(console.json_document("verify", outcome.to_dict()), as_json, render.render_verify)
    return exit_codes.VERDICTS[outcome.final_verdict]


@_command("monitor")
@click.option("--plan", type=PLACE, required=True, metavar="PLAN", help="The deployed plan.json (a path or URL).")
@click.option("--since", metavar="TIME", help="Judge windows from here on that were not judged: a date, or an integer.")
@click.option("--until", metavar="TIME", help="Judge windows that end by then.")
@click.option("--every", type=DURATION, metavar="DURATION", help="Stay, and do this again every 15m, 1h, 1d.")
def monitor(
    config: Config, plan: Location, since: str | None, until: str | None, every: float | None, as_json: bool
) -> int:
    """Judge every complete window since the last run: does the deployed plan keep its promise?

    Exit codes: 0 ok, 1 warning, 2 the gap is above the budget, 3 error, 4 not enough data, 64 wrong usage or config.
    """
    from lowprec.cli import console, render
    from lowprec.monitor import run_monitor

    def once() -> int:
        with console.Bars().shown() as bars:
            outcome = run_monitor(config, plan, since=_time(since), until=_time(until), progress=bars)
        show(console.json_document("monitor", outcome.to_dict()), as_json, render.render_monitor)
        return exit_codes.STATES[outcome.state]

    if every is None:
        return once()
    from lowprec.monitor.judging.repeat import repeat

    repeat(
        once, every, on_error=lambda error: console.report_error(error, command="monitor", as_json=as_json, debug=False)
    )
    return 0


@_command("results", config=False)
@click.argument("sql", required=False, metavar="[SQL|sensitivities]")
@click.option("--root", default=lambda: os.environ.get("LOWPREC_RESULTS", "runs"), help="Results root [default: runs].")
@click.option("--run", "run_id", metavar="RUN", help="The run to show, instead of the latest.")
@click.option("--format", "form", type=click.Choice(["table", "json", "csv", "parquet"]), default="table")
@click.option("--out", type=LOCAL_PATH, help="Write to a file (needed for parquet on a terminal).")
def results(sql: str | None, root: str, run_id: str | None, form: Format, out: Path | None, as_json: bool) -> None:
    """Query results with SQL; without, the latest search's Pareto front; `sensitivities`: each table by itself."""
    from lowprec.cli.render.frame import write_frame
    from lowprec.results import latest_front, query, sensitivity_report

    is_report = sql == "sensitivities"
    shown = sensitivity_report if is_report else latest_front
    frame = query(sql, root) if sql and not is_report else shown(root, run_id)
    if (sql and not is_report) or as_json or form != "table":
        write_frame(frame, form="json" if as_json else form, out=out)
    else:
        from lowprec.cli.render import render_front, render_sensitivities

        rows = [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]
        (render_sensitivities if is_report else render_front)(rows)


# What can be a job of a cluster: with its own options, but for those that have no use there.
as_job(search, leave_out=("dry_run", "workers", "worker_memory", "network", "calibration", "tables"))
as_job(verify, check=lambda values: chosen_plan(values["plan"], values["uniform"], values["units"]))
as_job(monitor, leave_out=("every",))
as_job(serving.commands["debug"])


def main(arguments: Sequence[str] | None = None) -> None:
    """The `lowprec` command, with the arguments of this process unless some are given; ends the process."""
    run_and_exit(lambda: cli.main(arguments, standalone_mode=False))


def _print_rows_written(document: dict[str, Any]) -> None:
    from lowprec.cli import console

    console.stdout.print(f"{document['num_rows']:,} rows written to {document['path']}", markup=False)


def _machines(
    config: Config | None,
    dry_run: bool,
    workers: int | None,
    worker_memory: str | None,
    network: str | None,
    calibration: Path | None,
    tables: Path | None,
) -> Machines | None:
    """The workers that a dry run is asked to place tables on; None where it is not asked to."""
    from lowprec.core.errors import ConfigError

    if config is None and tables is None:
        raise ConfigError("CONFIG is missing; with --dry-run, --tables FILE may stand in its place")
    if config is not None and tables is not None:
        raise ConfigError("give either CONFIG or --tables")
    if all(option is None for option in (workers, worker_memory, network, calibration, tables)):
        return None
    if not dry_run:
        raise ConfigError(
            "--workers, --worker-memory, --network, --calibration and --tables are for a dry run: add --dry-run"
        )
    if workers is None or worker_memory is None:
        raise ConfigError(
            "placing tables needs both --workers and --worker-memory, such as --workers 4 --worker-memory 8GB"
        )
    from lowprec.core.sizes import parse_bytes, parse_rate
    from lowprec.session.placement import Machines

    memory = int(_parsed("--worker-memory", worker_memory, parse_bytes))
    return Machines(workers, memory, _parsed("--network", network or "10Gbit", parse_rate), calibration)


def _time(text: str | None) -> int | str | None:
    """A time of traffic: an integer where it is one, else a date."""
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


def _check_results_root(config: Config) -> None:
    """Raise `ResultsError` for a root that cannot be used, before traffic and model are opened."""
    from lowprec.results import ResultsStore

    ResultsStore(config.results.root)


def _parsed(option: str, text: str, parse: Callable[[str], float]) -> float:
    from lowprec.core.errors import ConfigError

    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f'{option} "{text}": {error}') from None
