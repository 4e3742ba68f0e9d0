"""`csvfs drive claim`: what of this node may become a drive by itself, and why the rest may not."""

import click

from csvfs.admin.claim_watch import candidates_here, claim_once
from csvfs.admin.cli_context import Here, json_option, run_here
from csvfs.admin.cluster_view import Record
from csvfs.admin.drive_claim import ClaimCandidate
from csvfs.admin.pool_ops import require_pool
from csvfs.admin.render import note, plain, print_json, print_table, progress, size_or_unknown
from csvfs.units import format_size

BY_COMMAND = "csvfs drive claim"


@click.command("claim")
@click.option("--dry-run", is_flag=True, help="Say what would be claimed and why the rest would not; write nothing.")
@json_option
def claim_command(dry_run: bool, as_json: bool) -> None:
    """Take every eligible file and disk of this node into the pool, now.

    Eligible is what [drives] claim in this node's configuration names, is blank, and is the same at two looks.
    With csvfs pool set --auto-claim on the nodes do this by themselves.
    """
    if dry_run:
        _show(as_json)
        return
    claimed: list[Record] = []

    def announce(drive: Record) -> None:
        claimed.append(drive)
        if not as_json:
            click.echo(f"drive {drive.name[:8]} claimed: {drive.text('path')}, {format_size(drive.number('size'))}")

    async def work(here: Here) -> list[ClaimCandidate]:
        return await claim_once(here.config, here.store, announce, BY_COMMAND)

    with progress("looking twice at what could be claimed"):
        run_here(work)
    if as_json:
        print_json([{"id": drive.name, **drive.value} for drive in claimed])
    elif not claimed:
        click.echo("nothing to claim: csvfs drive claim --dry-run says why")


def _show(as_json: bool) -> None:
    async def work(here: Here) -> tuple[list[ClaimCandidate], bool]:
        pool = await require_pool(here.store)
        return await candidates_here(here.config, here.store), bool(pool.value.get("auto_claim"))

    candidates, is_on = run_here(work)
    if as_json:
        rows = [{k: v for k, v in plain(c).items() if k != "sighting"} for c in candidates]
        print_json({"auto_claim": is_on, "candidates": rows})
        return
    print_table(
        ("PATH", "KIND", ">SIZE", "ELIGIBLE", "REASON"),
        [
            (c.path, c.kind or None, size_or_unknown(c.size or None), "yes" if c.eligible else "no", c.reason)
            for c in candidates
        ],
        empty="no disks, and nothing that [drives] claim names",
    )
    if is_on:
        note("auto-claim is on: what is eligible is claimed within seconds")
    else:
        note("auto-claim is off: csvfs drive claim takes what is eligible now, csvfs pool set --auto-claim on always")
