"""What waits at a volume's coordinator: for `csvfs why`. Facts, without words about what they mean for whom.

Place      coordinator floor; above leases.py, session_desk.py, lost.py, below service.py. Reads only.
"""

from typing import Any

import trio

from coordinator.leases import Leases
from coordinator.lost import FOR_GOOD, LostSlabs
from coordinator.session_desk import SessionDesk
from coordinator.slab_book import SlabBook

ROWS_MAX = 200


def describe_waits(desk: SessionDesk, leases: Leases, books: list[SlabBook], lost: LostSlabs) -> dict[str, Any]:
    """Reply of the call `waits` (PROTOCOL.md)."""
    now_s = trio.current_time()
    return {
        "reclaiming": [] if desk.is_open else sorted(session.node for session in desk.sessions.unclaimed),
        "requests": [
            {
                "node": ticket.session[0],
                "inodes": sorted(ticket.needs)[:ROWS_MAX],
                "since_s": round(now_s - since_s, 1),
                "recalls": [
                    {"node": recall.session[0], "ino": recall.ino, "left_s": round(max(0.0, until_s - now_s), 1)}
                    for recall, until_s in recalls
                ],
            }
            for ticket, since_s, recalls in leases.waiting(ROWS_MAX)
        ],
        "evicting": sorted(session.node for session in desk.sessions if session.ended and not session.leaving),
        "slabs": _waiting_slabs(books, lost),
    }


def _waiting_slabs(books: list[SlabBook], lost: LostSlabs) -> list[dict[str, Any]]:
    """Those none of whose in-sync copies serves."""
    faults: dict[bytes, str] = {}
    found: list[dict[str, Any]] = []
    for book in books:
        for descriptor in book.all():
            for member in descriptor.in_sync:
                if member.drive not in faults:
                    faults[member.drive] = lost.fault_of(member.drive)
            if not all(faults[member.drive] for member in descriptor.in_sync):
                continue
            copies = [
                {"drive": m.drive, "node": m.node, "fault": faults[m.drive], "for_good": faults[m.drive] in FOR_GOOD}
                for m in descriptor.in_sync
            ]
            found.append({"slab": descriptor.slab, "copies": copies})
            if len(found) >= ROWS_MAX:
                return found
    return found
