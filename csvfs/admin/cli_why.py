"""`csvfs why`: what something waits for."""

import click

from csvfs.admin.cli_context import Here, json_option, run_with_peers
from csvfs.admin.peers import Peers
from csvfs.admin.render import print_json
from csvfs.admin.why import Heard, explain, listen


@click.command("why")
@click.argument("what", metavar="PATH|VOLUME")
@json_option
def why_command(what: str, as_json: bool) -> None:
    """Say what VOLUME, or the file PATH in one, waits for: on what, since when, what comes next.

    Answers within 3 s, also when cluster store, coordinator or mount do not.
    """

    async def work(here: Here, peers: Peers) -> Heard:
        return await listen(here.config, here.store, peers, what)

    heard = run_with_peers(work)
    rows = explain(heard)
    mode, reason = str(heard.mount.get("mode") or "unknown"), str(heard.mount.get("why") or "")
    if as_json:
        print_json({"volume": heard.volume, "node": heard.node, "mode": mode, "why": reason, "waits": rows})
        return
    click.echo(f"I/O of {heard.node} to {heard.volume}: {mode}{': ' if reason else ''}{reason}")
    for row in rows:
        since = "" if row["since_s"] is None else f", for {row['since_s']:.1f} s"
        click.echo(f"{row['what']} wait{since}\n  on   {row['on']}\n  next {row['next']}")
    if not rows:
        click.echo("nothing waits")
