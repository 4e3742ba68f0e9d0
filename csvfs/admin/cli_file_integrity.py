"""`csvfs file integrity`: whether every block of a file is intact, on every copy."""

import sys

import click
import trio

from csvfs.admin.cli_context import Here, json_option, run_with_peers
from csvfs.admin.cli_file import file_group
from csvfs.admin.file_integrity import Integrity, Progress, examine
from csvfs.admin.peers import Peers
from csvfs.admin.render import format_duration, plain, print_json, print_table
from csvfs.units import BLOCK_SIZE, format_size

LINE_EVERY_S = 10.0  # of progress, where standard error is no terminal
RANGES_SHOWN_MAX = 64


@file_group.command("integrity")
@click.argument("path")
@click.option("--verify", is_flag=True, help="Read every copy of every block by its checksum, and heal what is bad.")
@json_option
def integrity_command(path: str, verify: bool, as_json: bool) -> None:
    """Say of file PATH how many copies of it are in sync, and which of its bytes cannot be read, if any.

    Checksums are always on, and verified at every read. Without --verify, blocks that have rotted and that nobody has read
    since are not known. Status 1: something of it is lost, cannot be read now, or could not be verified.
    """

    async def work(here: Here, peers: Peers) -> Integrity:
        return await examine(
            here.config, here.store, peers, path, verify=verify, on_progress=_Lines().say
        )  # fmt: skip

    report = run_with_peers(work)
    if verify and sys.stderr.isatty():
        click.echo(f"\r{'':78}\r", nl=False, err=True)
    if as_json:
        shown = {"integrity": "on", **plain(report)}
        shown |= {"readable": report.is_readable, "sound": report.is_sound, "slabs_by_copies": plain(report.by_copies())}
        print_json(shown)
    else:
        _print(report)
    if not report.is_sound:
        sys.exit(1)


class _Lines:
    """Progress on standard error: one line that changes on a terminal, else one every LINE_EVERY_S."""

    def __init__(self) -> None:
        self._said_s: float | None = None

    def say(self, progress: Progress) -> None:
        text = progress_text(progress)
        now_s = trio.current_time()
        if sys.stderr.isatty():
            click.echo(f"\r{text:78}", nl=False, err=True)
        elif self._said_s is None or now_s >= self._said_s + LINE_EVERY_S:
            if self._said_s is not None:
                click.echo(text, err=True)
            self._said_s = now_s


def progress_text(progress: Progress) -> str:
    percent = 100 * progress.done / progress.total if progress.total else 100
    return (
        f"verified {format_size(progress.done * BLOCK_SIZE)} of {format_size(progress.total * BLOCK_SIZE)} "
        f"({percent:.0f} %), {format_size(round(progress.rate))}/s, about {format_duration(progress.eta_s)} left"
    )


def _print(report: Integrity) -> None:
    unwritten = "an unknown number" if report.unwritten is None else str(report.unwritten)
    copies = ", ".join(f"{count} slabs with {copies}" for copies, count in report.by_copies().items())
    lines = {
        "file": f"{report.path}: {format_size(report.size)}",
        "integrity": f"on: {report.checksum} of every block of 4 KiB, verified at every read",
        "blocks": f"{report.allocated} ({format_size(report.allocated * BLOCK_SIZE)}), of which {unwritten} were never "
        f"written, {report.shared} are shared with other files",
        "copies": f"{report.copies_wanted} wanted; in sync and serving: {copies or 'no slabs'}",
        "readable": "yes" if report.is_readable else _unreadable_text(report),
    }
    for title, value in lines.items():
        click.echo(f"{title + ':':11}{value}")
    for slab in report.slabs:
        if slab.why:
            click.echo(f"  slab {slab.slab}: {'; '.join(slab.why)}")
    for row in report.unreadable[:RANGES_SHOWN_MAX]:
        click.echo(f"  bytes {row.offset} to {row.offset + row.size - 1}: {row.what}")
    if len(report.unreadable) > RANGES_SHOWN_MAX:
        click.echo(f"  and {len(report.unreadable) - RANGES_SHOWN_MAX} more ranges")
    if report.verified is not None:
        click.echo(f"verified in {report.verify_s:.1f} s:")
        rows = [
            (row.node, row.drive[:8], row.verified, row.found, row.healed, row.left, row.skipped, row.why)
            for row in sorted(report.verified, key=lambda row: (row.node, row.drive))
        ]
        columns = ("NODE", "DRIVE", ">BLOCKS", ">BAD", ">HEALED", ">LEFT BAD", ">NOT VERIFIED", "WHY")
        print_table(columns, rows, empty="it has no blocks")


_WORDS = {
    "bad": "bad on all copies (good again once overwritten in whole blocks)",
    "lost": "lost with its drives (csvfs volume status {volume} --lost)",
    "waiting": "waits for drives (csvfs why {volume})",
}


def _unreadable_text(report: Integrity) -> str:
    sizes: dict[str, int] = {}
    for row in report.unreadable:
        sizes[row.what] = sizes.get(row.what, 0) + row.size
    parts = [
        f"{format_size(size)} {_WORDS.get(what, what).format(volume=report.volume)}"
        for what, size in sorted(sizes.items())
    ]
    return f"not all of it: {', '.join(parts)}"
