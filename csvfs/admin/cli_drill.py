"""`csvfs drill`: break something on purpose, and see what programs notice.

Place      admin floor, over drill.py.
Exit       1 when anything was lost, un-happened, or any program saw an error.
"""

import sys
from pathlib import Path

import click

from csvfs.admin.cli_context import json_option
from csvfs.admin.drill import Round, check_possible, run_drill
from csvfs.admin.drill_ground import ClusterGround, LabGround, fill_volume
from csvfs.admin.drill_html import page
from csvfs.admin.drill_plans import ALL, DRILLS, FREEZE_S, FROZEN, ON_CLUSTER, Drill, narrowed
from csvfs.admin.drill_report import (
    COLUMNS,
    DrillReport,
    round_line,
    summary,
    table_rows,
    what_went_wrong,
)
from csvfs.admin.files import write_whole
from csvfs.admin.lab_files import LAB_DIR_DEFAULT
from csvfs.admin.render import note, print_json, print_table, progress
from csvfs.errors import BadRequest

REPEAT_MAX, FILES_MAX, SECONDS_MAX = 1000, 10_000_000, 3600.0
_NAMES = "\n".join(f"  {name:<12} {drill.what}" for name, drill in DRILLS.items())
_CLUSTER = "\n".join(f"  {name:<12} {what}" for name, what in ON_CLUSTER.items())


@click.command(
    "drill",
    help=f"""Break something on purpose while programs are at work, and judge what they saw.

\b
{_NAMES}
  all          all of them, as far as they apply

A drill holds when nothing that was acknowledged is lost, nothing un-happened, and no program saw an error. On a lab
(--dir), or with --on-cluster on the cluster of this node, where only csvfs's own commands are used:

\b
{_CLUSTER}
""",
)
@click.argument("what", type=click.Choice([*DRILLS, "all"]))
@click.argument("kind", required=False, type=click.Choice(FROZEN))
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path, file_okay=False), default=LAB_DIR_DEFAULT, show_default=True,
    help="Which lab.",
)  # fmt: skip
@click.option("--on-cluster", is_flag=True, help="The cluster of this node instead of a lab.")
@click.option("--volume", metavar="NAME", help="By default the lab's first; a lab that has none gets one.")
@click.option("--repeat", type=click.IntRange(1, REPEAT_MAX), default=1, show_default=True, help="How often.")
@click.option("--files", type=click.IntRange(0, FILES_MAX), default=0, help="So many files the volume shall hold first.")
@click.option(
    "--seconds", type=click.FloatRange(0.1, SECONDS_MAX), help=f"How long freeze lasts.  [default: {FREEZE_S:g}]"
)
@click.option("--html", "html_path", type=click.Path(path_type=Path, dir_okay=False), help="Draw a page, too.")
@json_option
def drill_command(
    what: str,
    kind: str | None,
    directory: Path,
    on_cluster: bool,
    volume: str | None,
    repeat: int,
    files: int,
    seconds: float | None,
    html_path: Path | None,
    as_json: bool,
) -> None:
    drills = [narrowed(DRILLS[name], kind, seconds) for name in (ALL if what == "all" else (what,))]
    ground = ClusterGround(volume) if on_cluster else LabGround(directory, volume)
    chosen, not_run = _applicable(ground, drills)
    for line in not_run:
        note(line)
    if files:
        with progress(f"making {files:,} files"):
            fill_volume(ground, files, note)
    report = DrillReport(ground.volume, files, repeat, [], not_run)
    for drill in chosen:
        with progress(f"drill {drill.name}"):
            report.rounds += run_drill(ground, drill, repeat, note, _note_round)
    _print(report, html_path, as_json)
    if not report.held:
        sys.exit(1)


def _note_round(round_: Round) -> None:
    note(round_line(round_))


def _applicable(ground: LabGround | ClusterGround, drills: list[Drill]) -> tuple[list[Drill], list[str]]:
    """What to run, and why some of several are not. Raises BadRequest: the only one does not apply."""
    chosen, not_run = [], []
    for drill in drills:
        try:
            check_possible(ground, drill)
            chosen.append(drill)
        except BadRequest as error:
            if len(drills) == 1:
                raise
            not_run.append(str(error))
    return chosen, not_run


def _print(report: DrillReport, html_path: Path | None, as_json: bool) -> None:
    if html_path is not None:
        write_whole(html_path, page(report))
    if as_json:
        print_json(report.to_json())
        return
    print_table(COLUMNS, table_rows(report), empty="nothing was measured")
    click.echo("pauses: median / worst of the rounds")
    for line in what_went_wrong(report):
        click.echo(line)
    click.echo(summary(report))
