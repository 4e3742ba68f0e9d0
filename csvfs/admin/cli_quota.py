"""`csvfs quota`: how much the tree below a directory may hold."""

from typing import Any

import click

from csvfs.admin import quota_ops
from csvfs.admin.cli_context import Here, json_option, run_with_peers
from csvfs.admin.peers import Peers
from csvfs.admin.render import print_json, print_table
from csvfs.units import format_size, parse_size


@click.group("quota")
def quota_group() -> None:
    """Quotas: how many bytes and files the tree below a directory may hold, on all nodes together."""


@quota_group.command("set")
@click.argument("path")
@click.option("--size", default=None, metavar="SIZE", help="As 500G; 0: no limit.")
@click.option("--files", default=None, type=click.IntRange(0), help="Files and directories; 0: no limit.")
@json_option
def set_command(path: str, size: str | None, files: int | None, as_json: bool) -> None:
    """Limit what directory PATH and all below it may hold; what is not given has no limit.

    What is there already is counted in the background. Less than is in use: nothing more may be written. Whoever meets
    the limit gets EDQUOT ("Disk quota exceeded"); df PATH shows it.
    """
    if size is None and files is None:
        raise click.UsageError("say how much: --size, --files")

    async def work(here: Here, peers: Peers) -> dict[str, Any]:
        limit = parse_size(size or "0")
        return await quota_ops.set_quota(here.config, here.store, peers, path, limit, files or 0)

    row = run_with_peers(work)
    if as_json:
        print_json(row)
    else:
        click.echo(f"quota of {path}: {_limits(row)}; {_used(row)} in use{_doing(row)}")


@quota_group.command("remove")
@click.argument("path")
def remove_command(path: str) -> None:
    """Take the limits of directory PATH away."""

    async def work(here: Here, peers: Peers) -> None:
        await quota_ops.remove_quota(here.config, here.store, peers, path)

    run_with_peers(work)
    click.echo(f"{path} has no quota any more")


@quota_group.command("list")
@click.argument("volume", required=False)
@json_option
def list_command(volume: str | None, as_json: bool) -> None:
    """Show the quotas of VOLUME, or of all, and what is in use."""

    async def work(here: Here, peers: Peers) -> list[dict[str, Any]]:
        return await quota_ops.list_quotas(here.store, peers, volume)

    rows = run_with_peers(work)
    if as_json:
        print_json(rows)
        return
    print_table(
        ["VOLUME", "PATH", "USED", "SIZE", "USE%", "FILES", "MAX", "STATE"],
        [
            [
                row["volume"], row["path"], format_size(row["used"]), _size(row), _share(row),
                row["files"], row["files_max"] or "-", row["state"],
            ]
            for row in rows
        ],
        empty="no quotas; csvfs quota set PATH --size 500G",
    )  # fmt: skip


def _size(row: dict[str, Any]) -> str:
    return format_size(row["size"]) if row["size"] else "-"


def _share(row: dict[str, Any]) -> str:
    return f"{100 * row['used'] / row['size']:.0f} %" if row["size"] else "-"


def _limits(row: dict[str, Any]) -> str:
    files = f"{row['files_max']} files" if row["files_max"] else ""
    size = format_size(row["size"]) if row["size"] else ""
    return " and ".join(text for text in (size, files) if text) or "no limit"


def _used(row: dict[str, Any]) -> str:
    return f"{format_size(row['used'])} and {row['files']} files"


def _doing(row: dict[str, Any]) -> str:
    return " so far: what is there is being counted" if row["state"] == "counting" else ""
