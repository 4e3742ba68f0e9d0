"""The mount's own socket, `<run_dir>/mount-<hash of the name>.sock`: `csvfs why` asks there what this mount waits for.

Place      mount floor, on net/link.py. It answers from memory: also when nothing else answers.
Who        root and the user of this process, by the credentials that the kernel tells of the peer.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from csvfs.net.calls import CallTable
from csvfs.net.engine import Engine
from csvfs.net.link import Link, Listener

log = logging.getLogger(__name__)

LINKS_MAX = 16


class AdminSocket:
    """Answers the call `why` with what `why()` returns, until closed."""

    def __init__(self, engine: Engine, path: Path, nursery: trio.Nursery, why: Callable[[], dict[str, Any]]) -> None:
        """Raises OSError: the socket cannot be made."""
        self._nursery = nursery
        self._calls = CallTable({"why": lambda link, args: why()})
        self._links: set[Link] = set()
        before = os.umask(0o177)
        try:
            self._listener = Listener(engine, str(path), self._accept)
        finally:
            os.umask(before)

    def _accept(self, link: Link) -> None:
        if link.peer_uid not in (0, os.geteuid()) or len(self._links) >= LINKS_MAX:
            log.warning("a connection of user %s is refused", link.peer_uid)
            link.close()
            return
        self._links.add(link)
        link.on_close = lambda closed, error: self._links.discard(closed)
        link.on_frame = lambda sender, frame: self._calls.handle(sender, frame, self._nursery)

    def close(self) -> None:
        self._listener.close()
        for link in list(self._links):
            link.close()
