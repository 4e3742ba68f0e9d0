"""`csvfs file`: single files of volumes."""

import click

from csvfs.admin.cli_context import Here, json_option, run_with_peers
from csvfs.admin.file_map import FileMap, copies_text, read_map, summary
from csvfs.admin.peers import Peers
from csvfs.admin.render import plain, print_json, print_table
from csvfs.units import format_size


@click.group("file")
def file_group() -> None:
    """Files of volumes, by their paths on this node."""


@file_group.command("map")
@click.argument("path")
@json_option
def map_command(path: str, as_json: bool) -> None:
    """Say where the bytes of file PATH lie: in which slabs, on which drives, and what it shares with other files.

    Space that was reserved and never written counts as an extent.
    """

    async def work(here: Here, peers: Peers) -> FileMap:
        return await read_map(here.config, here.store, peers, path)

    found = run_with_peers(work)
    figures = summary(found)
    if as_json:
        print_json({**plain(found), **figures})
        return
    click.echo(
        f"{found.path}: {format_size(found.size)}, {figures['extents']} extents with "
        f"{format_size(figures['allocated'])}, of which {format_size(figures['shared'])} are shared"
    )
    rows = [
        (
            row.offset,
            format_size(row.length),
            "hole" if row.slab is None else row.slab,
            "" if row.slab is None else row.slab_offset,
            "" if row.slab is None else "-" if row.owners == 1 else row.owners,
            copies_text(row.copies),
        )
        for row in found.rows
    ]
    print_table((">OFFSET", ">LENGTH", ">SLAB", ">AT", ">OWNERS", "COPIES"), rows, empty="it has no bytes")
