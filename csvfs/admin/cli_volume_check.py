"""`csvfs volume check`: whether a volume's metadata fit together, while it is in use; and mending them."""

import sys
from typing import Any

import click
import trio

from csvfs.admin.cli_context import Here, json_option, run_with_peers
from csvfs.admin.cli_volume import volume_group
from csvfs.admin.cluster_view import read_cluster_view
from csvfs.admin.peers import Peers
from csvfs.admin.render import print_json
from csvfs.errors import CsvfsError, ProtocolError, Unavailable

POLL_S = 0.5
CALL_TIMEOUT_S = 30.0
LINE_EVERY_S = 10.0  # of progress, where standard error is no terminal
SILENT_S_MAX = 60.0  # without an answer of the coordinator


@volume_group.command("check")
@click.argument("name")
@click.option("--repair", is_flag=True, help="Mend what can be mended without losing data.")
@json_option
def check_command(name: str, repair: bool, as_json: bool) -> None:
    """Check the metadata of volume NAME at its coordinator, while it is in use: names, links, space, counts.

    With --repair: counts are made right, blocks that nobody owns become free, inodes without a name get one in
    /lost+found. Status 1: something is wrong and was not mended.
    """

    async def work(here: Here, peers: Peers) -> dict[str, Any]:
        return await _check(here, peers, name, repair)

    report = _report(name, run_with_peers(work))
    if as_json:
        print_json(report)
    else:
        _print(report)
    if report["left"]:
        sys.exit(1)


async def _check(here: Here, peers: Peers, name: str, repair: bool) -> dict[str, Any]:
    """The coordinator's last word. Raises NotFound, Unavailable, what it answers."""
    (await read_cluster_view(here.store)).volume(name)
    state, heard_s, said_s = "none", trio.current_time(), trio.current_time()
    while True:
        try:
            view = await read_cluster_view(here.store)
            args = {"start": state == "none", "repair": repair}  # a new coordinator knows of no check: begin again
            answer = await peers.coordinator_slowly(view, name, "check", CALL_TIMEOUT_S, **args)
            if not isinstance(answer, dict) or not isinstance(answer.get("state"), str):
                raise ProtocolError(f"the coordinator of {name} answers check with {type(answer).__name__}")
            state, heard_s = answer["state"], trio.current_time()
        except CsvfsError as error:
            if not error.retryable or trio.current_time() > heard_s + SILENT_S_MAX:
                raise
            await trio.sleep(POLL_S)
            continue
        if state == "failed":
            raise Unavailable(f"the check of volume {name} ended: {answer.get('error')}")
        if state == "done":
            return answer
        if sys.stderr.isatty():
            click.echo(f"\r{_progress_line(answer):78}", nl=False, err=True)
        elif trio.current_time() >= said_s + LINE_EVERY_S:
            said_s = trio.current_time()
            click.echo(_progress_line(answer), err=True)
        await trio.sleep(POLL_S)


def _progress_line(answer: dict[str, Any]) -> str:
    eta = answer.get("eta_s")
    left = "" if eta is None else f", about {eta:.0f} s left"
    return f"{answer['phase']}: {100 * answer['fraction']:.0f} %, {answer['rate']:.0f} rows/s{left}"


def _report(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    mended = [{"kind": kind, "what": what, "done": done} for kind, what, done in answer["mended"]]
    return {
        "volume": name,
        "findings": [{"kind": kind, "what": what} for kind, what in answer["findings"]],
        "left": answer["found"],
        "mended": mended,
        "unchecked": answer["unchecked"],
        "skipped": answer["skipped"],
        "rows": answer["rows"],
        "took_s": round(answer["took_s"], 3),
    }


def _print(report: dict[str, Any]) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r{'':78}\r", nl=False, err=True)
    for row in report["mended"]:
        click.echo(f"mended: {row['what']}: {row['done']}")
    for row in report["findings"]:
        click.echo(f"wrong: {row['what']}")
    if report["left"] > len(report["findings"]):
        click.echo(f"and {report['left'] - len(report['findings'])} more")
    for text in report["skipped"]:
        click.echo(f"not done: {text}")
    if report["unchecked"]:
        click.echo(f"not checked: {report['unchecked']} inodes and slabs that changed all the time")
    verdict = f"{report['left']} findings" if report["left"] else "all fits together"
    click.echo(f"volume {report['volume']}: {report['rows']} rows in {report['took_s']:.1f} s, {verdict}")
