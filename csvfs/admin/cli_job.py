"""`csvfs job`: what is being repaired, emptied and levelled, and how far it is."""

import click
import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from csvfs.admin.cli_context import Here, json_option, run_with_peers
from csvfs.admin.cli_status import job_map
from csvfs.admin.job_ops import control_jobs
from csvfs.admin.peers import Peers
from csvfs.admin.render import format_duration, print_json, print_table, size_or_unknown
from csvfs.admin.status import JobStatus, collect_status
from csvfs.block.pace import SPEEDS
from csvfs.errors import NotFound
from csvfs.units import format_size

KINDS = ("repair", "evacuate", "rebalance", "copies", "scrub")
WATCH_INTERVAL_S = 1.0

volume_option = click.option("--volume", default=None, help="Only of this volume.")
kind_argument = click.argument("kind", type=click.Choice(KINDS), required=False)


@click.group("job")
def job_group() -> None:
    """Storage jobs: repair, evacuation, rebalance, changes of the number of copies. They go on by themselves."""


async def _jobs(here: Here, peers: Peers, volume: str | None) -> list[JobStatus]:
    status = await collect_status(here.store, peers)
    if volume is not None and all(known.name != volume for known in status.volumes):
        there_are = ", ".join(known.name for known in status.volumes) or "none"
        raise NotFound(f"no volume {volume!r}; there are: {there_are}")
    return [job for job in status.jobs if volume in (None, job.volume)]


@job_group.command("list")
@volume_option
@json_option
def list_command(volume: str | None, as_json: bool) -> None:
    """List all jobs with what they have done, what is left, how fast, and what they wait for."""
    jobs = run_with_peers(lambda here, peers: _jobs(here, peers, volume))
    if as_json:
        print_json([job_map(job) for job in jobs])
        return
    print_table(
        ("VOLUME", "KIND", "WHAT", ">DONE", ">LEFT", ">COPIED", ">RATE", ">ETA", "WAITING FOR"),
        [
            (
                job.volume,
                job.kind,
                job.what,
                size_or_unknown(job.done),
                size_or_unknown(job.left),
                None if job.copied is None else format_size(job.copied),
                rate_text(job),
                None if job.eta_s is None else format_duration(job.eta_s),
                job.waiting_for,
            )
            for job in jobs
        ],
        empty="no jobs: nothing is being repaired, emptied or levelled",
    )


def rate_text(job: JobStatus) -> str | None:
    return None if not job.rate else f"{format_size(int(job.rate))}/s"


@job_group.command("watch")
@volume_option
@click.option(
    "--interval", "interval_s", type=click.FloatRange(0.1, 60), default=WATCH_INTERVAL_S, help="Seconds."
)
@json_option
def watch_command(volume: str | None, interval_s: float, as_json: bool) -> None:
    """Watch all jobs until none is left. Interrupting it interrupts no job."""

    async def work(here: Here, peers: Peers) -> list[JobStatus]:
        with make_progress() as shown:
            bars: dict[tuple[str, str], TaskID] = {}
            while jobs := await _jobs(here, peers, volume):
                show_jobs(shown, bars, jobs)
                await trio.sleep(interval_s)
            return jobs

    jobs = run_with_peers(work)
    if as_json:
        print_json([job_map(job) for job in jobs])
    else:
        click.echo("no jobs are left")


def make_progress() -> Progress:
    """On standard error: the result alone goes to standard output."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True, highlight=False, markup=False),
    )


def show_jobs(shown: Progress, bars: dict[tuple[str, str], TaskID], jobs: list[JobStatus]) -> None:
    """One bar a job; those that are over go."""
    keys = {(job.volume, job.what) for job in jobs}
    for key in [key for key in bars if key not in keys]:
        shown.remove_task(bars.pop(key))
    for job in jobs:
        key = (job.volume, job.what)
        if key not in bars:
            bars[key] = shown.add_task(f"{job.volume}: {job.what}", total=None, note="")
        shown.update(bars[key], total=job.total, completed=job.done or 0, note=note_text(job))


def note_text(job: JobStatus) -> str:
    if job.waiting_for:
        return f"waiting for {job.waiting_for}"
    return f"{rate_text(job) or '?'}, {format_duration(job.eta_s)} left"


@job_group.command("pause")
@click.argument("volume")
@kind_argument
@json_option
def pause_command(volume: str, kind: str | None, as_json: bool) -> None:
    """Pause the jobs of VOLUME, all or those of one KIND, until they are resumed. What is begun is
    finished."""
    _control(volume, "pause", kind, as_json)


@job_group.command("resume")
@click.argument("volume")
@kind_argument
@json_option
def resume_command(volume: str, kind: str | None, as_json: bool) -> None:
    """Let paused jobs of VOLUME go on."""
    _control(volume, "resume", kind, as_json)


def _control(volume: str, action: str, kind: str | None, as_json: bool) -> None:
    answers = run_with_peers(lambda here, peers: control_jobs(here.store, peers, volume, action, kind=kind))
    if as_json:
        print_json(answers)
        return
    paused = ", ".join(answers[volume]["paused"]) or "none"
    click.echo(f"volume {volume}: jobs that are paused: {paused}")


@job_group.command("speed")
@click.argument("level", type=click.Choice(SPEEDS))
@volume_option
@json_option
def speed_command(level: str, volume: str | None, as_json: bool) -> None:
    """Set how jobs weigh against programs, from "very low" to "very high". Idle drives are always used in
    full."""
    answers = run_with_peers(
        lambda here, peers: control_jobs(here.store, peers, volume, "speed", speed=level)
    )
    if as_json:
        print_json(answers)
    else:
        click.echo(f"jobs of {', '.join(sorted(answers)) or 'no volumes'} run at speed {level}")
