"""`csvfs status`: the whole cluster on one screen of 80 by 24."""

import click
from rich.console import Console

from csvfs.admin.cli_context import Here, json_option, run_with_peers
from csvfs.admin.peers import Peers
from csvfs.admin.render import (
    format_duration,
    make_table,
    print_json,
    size_or_unknown,
    stdout_console,
)
from csvfs.admin.status import ClusterStatus, JobStatus, NodeStatus, VolumeStatus, collect_status
from csvfs.units import format_size

BAD_DRIVES_SHOWN = 2
JOBS_SHOWN = 5


@click.command("status")
@json_option
def status_command(as_json: bool) -> None:
    """Show nodes, drives, pool, volumes, and what is being repaired."""

    async def work(here: Here, peers: Peers) -> ClusterStatus:
        return await collect_status(here.store, peers)

    status = run_with_peers(work)
    if as_json:
        print_json(as_map(status))
    else:
        print_status(status, stdout_console())


def as_map(status: ClusterStatus) -> dict[str, object]:
    """The JSON: the dataclasses' fields, and of jobs also what follows from them."""
    return {
        "cluster": status.cluster,
        "nodes": status.nodes,
        "pool": status.pool,
        "drives": status.drives,
        "volumes": status.volumes,
        "jobs": [job_map(job) for job in status.jobs],
    }


def job_map(job: JobStatus) -> dict[str, object]:
    """A job as JSON has it: sizes in bytes, rate in bytes per second."""
    return {
        "volume": job.volume,
        "kind": job.kind,
        "what": job.what,
        "done": job.done,
        "left": job.left,
        "total": job.total,
        "copied": job.copied,
        "rate": job.rate,
        "percent": job.percent,
        "eta_s": job.eta_s,
        "paused": job.paused,
        "waiting_for": job.waiting_for,
    }


def print_status(status: ClusterStatus, console: Console) -> None:
    if status.cluster is None:
        console.print("no cluster in this cluster store yet: csvfs cluster create NAME")
        return
    console.print(f"cluster {status.cluster}, {pool_line(status)}")
    if status.pool is not None and status.pool.warning:
        console.print(status.pool.warning, style="yellow" if status.pool.percent_used < 90 else "red")
    console.print()
    if status.nodes:
        columns = ("NODE", "STATE", "ADDRESS", "DRIVES", "NOTE")
        console.print(make_table(columns, [node_row(node) for node in status.nodes]))
        for node in status.nodes:
            if node.refused:
                console.print(f"{node.name} refused {refused_text(node.refused)}", style="yellow")
    else:
        console.print("no nodes yet: start one with csvfs node run")
    console.print()
    if status.volumes:
        volume_columns = ("VOLUME", "RESILIENCY", "STATE", "HEALTH", "COORDINATOR", ">SIZE", ">FREE")
        console.print(make_table(volume_columns, [volume_row(volume) for volume in status.volumes]))
        for volume in status.volumes:
            if volume.note:
                console.print(f"{volume.name}: {volume.note}", style="yellow")
    else:
        console.print("no volumes yet: csvfs volume create NAME")
    console.print()
    print_jobs(status.jobs, console)


def pool_line(status: ClusterStatus) -> str:
    pool = status.pool
    if pool is None:
        return "no pool yet: csvfs pool create"
    line = f"pool {pool.name}: {format_size(pool.size)}, {format_size(pool.free)} free"
    if pool.nodes_unknown:
        line += f" (without {', '.join(pool.nodes_unknown)})"
    return line


def refused_text(counts: dict[str, int]) -> str:
    """`3 connections: 2 no certificate, 1 not tls`."""
    total = sum(counts.values())
    reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(counts.items()))
    return f"{total} connection{'s' if total != 1 else ''}: {reasons}"


def node_row(node: NodeStatus) -> tuple[str, ...]:
    drives = f"{node.drives - len(node.drives_bad)} ok"
    if node.state != "up":
        drives = str(node.drives)
    elif node.drives_bad:
        drives += f", {len(node.drives_bad)} bad"
    notes = [node.note] if node.note else []
    if node.drives_bad:
        shown = ", ".join(node.drives_bad[:BAD_DRIVES_SHOWN])
        more = len(node.drives_bad) - BAD_DRIVES_SHOWN
        notes.append(f"bad: {shown}" + (f" and {more} more" if more > 0 else ""))
    return (node.name, node.state, node.address, drives, "; ".join(notes))


def resiliency_text(resiliency: str, copies: int) -> str:
    return f"{resiliency} x{copies}" if resiliency == "mirror" else resiliency


def volume_row(volume: VolumeStatus) -> tuple[str | None, ...]:
    return (
        volume.name,
        resiliency_text(volume.resiliency, volume.copies),
        volume.state,
        volume.health,
        volume.coordinator or None,
        size_or_unknown(volume.size),
        size_or_unknown(volume.free),
    )


def job_line(job: JobStatus) -> str:
    percent = "?" if job.percent is None else f"{job.percent:.0f}"
    rate = "" if job.rate is None else f", {format_size(int(job.rate))}/s"
    total = "" if job.total is None else f" of {format_size(job.total)}"
    left = f"waiting for {job.waiting_for}" if job.waiting_for else f"{format_duration(job.eta_s)} left"
    return f"{job.volume}: {job.what}, {percent} %{total}{rate}, {left}"


def print_jobs(jobs: list[JobStatus], console: Console) -> None:
    if not jobs:
        console.print("nothing is being repaired")
        return
    console.print("being repaired:")
    for job in jobs[:JOBS_SHOWN]:
        console.print("  " + job_line(job))
    if len(jobs) > JOBS_SHOWN:
        console.print(f"  and {len(jobs) - JOBS_SHOWN} more: csvfs job list")
