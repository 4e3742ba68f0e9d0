"""Adoption: what the next process of a departed mount says that it holds, and what of that it gets back.

Place      coordinator floor; above departures.py and leases.py, below service.py.
Rule       A write lease comes back only where nobody else has had it since: then all that the mount had begun may be done
           again, and pages that programs have dirtied may be written. It is asked for as any other is, so it waits for
           its turn behind those who asked before, and reads elsewhere end first. Where somebody wrote, it has the
           inode open and no more, and is told so.
Limits     WAIT_S for all claims of a call: who does not give a read lease back by then keeps it, and the claim is refused.
"""

import trio

from coordinator.arguments import Args
from coordinator.departures import Departed
from coordinator.dispatch import claims_of
from coordinator.lease_table import OPEN, WRITE, Need, Ticket
from coordinator.leases import Leases
from coordinator.metadata import Metadata
from coordinator.sessions import Session
from csvfs.errors import CsvfsError, Fenced
from csvfs.ids import InodeNo

WAIT_S = 2.0  # below session.HELLO_TIMEOUT_S


class Adoption:
    def __init__(self, metadata: Metadata, leases: Leases) -> None:
        self._metadata = metadata
        self._leases = leases

    async def reclaim(self, session: Session, departed: Departed, args: Args) -> list[int]:
        """The inodes on which it has less than it claims: it has them open, if they are there.

        Raises  BadRequest, Fenced; Unavailable: too many wait for leases. Cancel safe.
        """
        claims = claims_of(args)
        there = self._metadata.inodes.sizes([ino for ino, _, _, _ in claims])
        refused = [ino for ino, _, _, _ in claims if ino not in there]
        wanted: list[InodeNo] = []
        for ino, kind, _, _ in claims:
            if ino not in there:
                continue
            self._leases.table.reclaim(session.key, InodeNo(ino), OPEN)
            if kind == WRITE and not departed.may_be_changed(ino):
                wanted.append(InodeNo(ino))
            elif kind > OPEN or departed.may_be_changed(ino):
                refused.append(ino)
        refused += await self._take(session, departed, wanted)
        if session.ended:
            raise Fenced(f"{session.writer} incarnation {session.incarnation} was evicted")
        return refused

    async def _take(self, session: Session, departed: Departed, inos: list[InodeNo]) -> list[InodeNo]:
        """Get the write leases, each in its turn; those that it cannot have back."""
        tickets: dict[InodeNo, Ticket] = {}
        refused: list[InodeNo] = []
        try:
            for ino in inos:
                tickets[ino] = self._leases.begin(session, {ino: Need.WRITE})
            with trio.move_on_after(WAIT_S):
                async with trio.open_nursery() as nursery:
                    for ticket in tickets.values():
                        if not ticket.granted:
                            nursery.start_soon(self._wait, session, ticket)
        finally:
            for ino, ticket in tickets.items():
                is_granted = ticket.granted
                self._leases.finish(ticket)
                if not is_granted or departed.may_be_changed(ino):
                    self._leases.release(session, ino, OPEN)
                    refused.append(ino)
        return refused

    async def _wait(self, session: Session, ticket: Ticket) -> None:
        try:
            await self._leases.wait(session, ticket)
        except CsvfsError:
            pass  # refused, as every claim that is not granted
