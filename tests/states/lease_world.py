"""World of leases: mounts ask, are recalled, and are evicted; what they believe is compared with what the table says.

Place      state checker, beside world.py. `LeaseTable` is the product's; the mounts and their links, which keep order
           and take their time, are those of tests/test_lease_table.py.
Symmetry   sessions are alike but for their names: the first to ask is A.

Checked    T1: no two mounts believe in leases that exclude each other. T4: the table never believes less than a mount.
           In the end (no messages under way) every request has been granted.
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from coordinator.lease_table import LeaseTable, Need, Recall, Ticket
from tests.states.explorer import Violation
from tests.states.world import Step
from tests.test_lease_table import A, B, C, Mounts, X, Y


@dataclass(slots=True, frozen=True)
class LeaseSetup:
    """How many requests there are in all, of how many sessions, and how many sessions are evicted."""

    requests_max: int = 3
    sessions: int = 2
    inodes: int = 1
    evictions_max: int = 1


class LeaseWorld:
    """See the head of this module."""

    def __init__(self, setup: LeaseSetup) -> None:
        self.setup = setup
        self.mounts = Mounts()
        self.sessions = (A, B, C)[: setup.sessions]
        self.inodes = (X, Y)[: setup.inodes]
        self.requests_left = setup.requests_max
        self.evictions_left = setup.evictions_max
        self.evicted: set[Any] = set()

    def steps(self) -> list[str]:
        return [name for name, _ in self._steps()]

    def do(self, step: str) -> None:
        for name, go in self._steps():
            if name == step:
                go()
                return
        raise AssertionError(f"{step!r} cannot happen now")

    def _steps(self) -> Iterator[Step]:
        mounts = self.mounts
        if mounts.executing:
            yield "a granted request is carried out", mounts.execute
        if mounts.unsent:
            yield "a reply leaves", mounts.send
        for session in self.sessions:
            if session in self.evicted:
                continue
            if mounts.to_mount[session]:
                yield f"{session[0]} hears the next message", lambda s=session: mounts.deliver(s)  # type: ignore[misc]
            if mounts.to_table[session]:
                yield f"{session[0]} is heard", lambda s=session: mounts.receive(s)  # type: ignore[misc]
            if self.evictions_left and len(self.evicted) < len(self.sessions) - 1:
                yield f"{session[0]} is evicted", lambda s=session: self._evict(s)  # type: ignore[misc]
            if self.requests_left:
                for ino in self.inodes:
                    for need in Need:
                        name = f"{session[0]} asks for {need.name} of inode {ino}"
                        yield name, lambda s=session, i=ino, n=need: self._ask(s, {i: n})  # type: ignore[misc]
                    yield f"{session[0]} looks at inode {ino}", lambda s=session, i=ino: self._look(s, i)  # type: ignore[misc]
                if len(self.inodes) > 1:
                    both = dict.fromkeys(self.inodes, Need.ENTRIES)
                    yield f"{session[0]} changes both", lambda s=session, b=both: self._ask(s, b)  # type: ignore[misc]

    def _ask(self, session: Any, needs: dict[Any, Need]) -> None:
        self.requests_left -= 1
        self.mounts.request(session, needs)

    def _look(self, session: Any, ino: Any) -> None:
        self.requests_left -= 1
        self.mounts.look(session, ino)

    def _evict(self, session: Any) -> None:
        """It is fenced and serves nothing any more (eviction.py); only then its leases pass on."""
        mounts = self.mounts
        self.evictions_left -= 1
        self.evicted.add(session)
        mounts.to_mount[session], mounts.to_table[session] = [], []
        mounts.believed = {key: kind for key, kind in mounts.believed.items() if key[0] != session}
        mounts.unsent = [reply for reply in mounts.unsent if reply[1] != session]
        _, actions = mounts.table.end_session(session)
        mounts.waiting = [ticket for ticket in mounts.waiting if not ticket.finished]
        mounts.act(actions)

    def check(self) -> None:
        try:
            self.mounts.check()
        except AssertionError as error:
            believed = {f"{session[0]}/{ino}": kind for (session, ino), kind in self.mounts.believed.items() if kind}
            raise Violation(f"T1, T4: mounts believe in leases {believed}: {str(error).splitlines()[0]}") from None
        mounts = self.mounts
        under_way = mounts.executing or mounts.unsent or any(
            mounts.to_mount[session] or mounts.to_table[session] for session in self.sessions
        )
        if mounts.waiting and not under_way:
            raise Violation("T3: a request waits, and nothing is under way that could let it go on")

    def fingerprint(self) -> Hashable:
        mounts = self.mounts
        unsent = [(session, ino, _Serial(serial)) for _, session, ino, serial in mounts.unsent]
        return (
            _Names().of(
                (mounts.table, mounts.believed, mounts.to_mount, mounts.to_table, unsent, mounts.executing, mounts.waiting)
            ),
            self.requests_left, self.evictions_left, tuple(sorted(self.evicted)),
        )  # fmt: skip


class _Serial(int):
    """A serial of the table: only the order counts."""


class _Names:
    """Values by content; tickets by the order in which they are met; serials by their order."""

    def __init__(self) -> None:
        self._tickets: dict[int, int] = {}
        self._serials: list[int] = []

    def of(self, value: Any) -> Hashable:
        frozen = self._freeze(value)
        order = {serial: rank for rank, serial in enumerate(sorted(set(self._serials)))}
        return _ranked(frozen, order)

    def _freeze(self, value: Any) -> Hashable:
        if isinstance(value, Ticket):
            number = self._tickets.setdefault(id(value), len(self._tickets))
            asked = tuple(sorted(value.asked))
            return number, value.session, self._freeze(dict(value.needs)), value.granted, value.finished, asked
        if isinstance(value, _Serial):
            self._serials.append(value)
            return value
        if isinstance(value, Need):
            return value.name
        if isinstance(value, Recall):
            return value
        if isinstance(value, LeaseTable):
            return self._freeze((value._inodes, value._sessions))
        if isinstance(value, Mapping):
            return tuple((key, self._freeze(item)) for key, item in sorted(value.items()))
        if isinstance(value, list | tuple):
            return tuple(self._freeze(item) for item in value)
        if isinstance(value, set | frozenset):
            return tuple(sorted(value))
        if hasattr(value, "__dataclass_fields__"):
            row = ((f.name, getattr(value, f.name)) for f in fields(value))
            return tuple(self._freeze(_Serial(item) if name == "serial" else item) for name, item in row)
        return value  # type: ignore[no-any-return]


def _ranked(value: Any, order: dict[int, int]) -> Hashable:
    if isinstance(value, tuple):
        return tuple(_ranked(item, order) for item in value)
    return ("serial", order[value]) if isinstance(value, _Serial) else value
