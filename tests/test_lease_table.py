"""Lease table: what the mounts believe never conflicts, and nobody waits for ever."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import lease_table
from coordinator.lease_table import (
    NONE,
    OPEN,
    READ,
    WRITE,
    Action,
    Grant,
    LeaseTable,
    Need,
    Recall,
    SessionKey,
    Ticket,
)
from csvfs.ids import Incarnation, InodeNo, NodeName

A, B, C = ((NodeName(name), Incarnation(1)) for name in ("a", "b", "c"))
X, Y = InodeNo(10), InodeNo(11)


def recalls(actions: list[Action]) -> list[Recall]:
    return [action for action in actions if isinstance(action, Recall)]


def grants(actions: list[Action]) -> list[Ticket]:
    return [action.ticket for action in actions if isinstance(action, Grant)]


def hold(table: LeaseTable, session: SessionKey, ino: InodeNo, need: Need) -> None:
    ticket, actions = table.begin(session, {ino: need})
    assert ticket.granted and not actions
    table.finish(ticket)


def test_a_writer_is_asked_to_flush_before_another_reads():
    table = LeaseTable()
    hold(table, A, X, Need.WRITE)
    ticket, actions = table.begin(B, {X: Need.READ})
    assert not ticket.granted
    assert actions == [Recall(A, X, READ, False)]
    assert grants(table.answer(A, X, READ)) == [ticket]
    assert (table.held(A, X), table.held(B, X)) == (READ, READ)


def test_an_open_file_stays_open_through_a_recall():
    table = LeaseTable()
    hold(table, A, X, Need.READ)
    ticket, actions = table.begin(B, {X: Need.WRITE})
    assert actions == [Recall(A, X, NONE, False)]
    opened, _ = table.begin(A, {X: Need.OPEN})
    assert opened.granted, "open waits for nobody"
    table.finish(opened)
    assert grants(table.answer(A, X, NONE)) == [ticket]
    assert table.held(A, X) == OPEN, "the answer may be older than the open"


def test_two_readers_who_both_want_to_write_do_not_deadlock():
    table = LeaseTable()
    hold(table, A, X, Need.READ)
    hold(table, B, X, Need.READ)
    first, actions = table.begin(A, {X: Need.WRITE})
    assert actions == [Recall(B, X, NONE, False)]
    second, actions = table.begin(B, {X: Need.WRITE})
    assert actions == []
    assert grants(table.answer(B, X, OPEN)) == [first]
    actions = table.finish(first)
    assert actions == [Recall(A, X, NONE, False)]
    assert grants(table.answer(A, X, OPEN)) == [second]


def test_readers_do_not_starve_a_writer():
    table = LeaseTable()
    hold(table, A, X, Need.READ)
    writer, _ = table.begin(B, {X: Need.WRITE})
    late, actions = table.begin(C, {X: Need.READ})
    assert not late.granted and not actions
    assert table.try_read(C, X) is None
    assert grants(table.answer(A, X, NONE)) == [writer]


def test_a_change_in_a_directory_takes_the_others_caches_and_keeps_the_own():
    table = LeaseTable()
    for session in (A, B, C):
        assert table.try_read(session, X) is not None
    change, actions = table.begin(A, {X: Need.ENTRIES})
    assert recalls(actions) == [Recall(B, X, NONE, False), Recall(C, X, NONE, False)]
    assert not grants(table.answer(B, X, NONE))
    assert table.try_read(B, X) is None, "the old entries must not be cached again before the change"
    assert grants(table.answer(C, X, NONE)) == [change]
    assert table.try_read(B, X) is None
    table.finish(change)
    assert table.try_read(B, X) is not None
    assert table.held(A, X) == READ


def test_a_change_of_attributes_leaves_leases_alone():
    table = LeaseTable()
    hold(table, A, X, Need.WRITE)
    change, actions = table.begin(B, {X: Need.ATTRIBUTES})
    assert actions == [Recall(A, X, WRITE, True)]
    assert grants(table.answer(A, X, OPEN)) == [change]
    assert table.held(A, X) == WRITE
    assert table.writer(X) == A


def test_a_reply_computed_before_a_recall_carries_no_lease_after_it():
    table = LeaseTable()
    serial = table.try_read(A, X)
    assert table.lease_at_send(A, X, serial) == READ
    table.begin(B, {X: Need.ENTRIES})
    assert table.lease_at_send(A, X, serial) == NONE
    table.answer(A, X, NONE)
    assert table.lease_at_send(A, X, serial) == NONE


def test_renames_across_two_directories_in_both_directions_do_not_deadlock():
    table = LeaseTable()
    for session in (A, B, C):
        for ino in (X, Y):
            table.try_read(session, ino)
    first, actions = table.begin(A, {X: Need.ENTRIES, Y: Need.ENTRIES})
    second, more = table.begin(B, {Y: Need.ENTRIES, X: Need.ENTRIES})
    assert len(actions) == 4 and not more
    for recall in recalls(actions):
        granted = grants(table.answer(recall.session, recall.ino, NONE))
    assert granted == [first]
    granted = []
    for recall in recalls(table.finish(first)):
        granted = grants(table.answer(recall.session, recall.ino, NONE))
    assert granted == [second] and second.granted


def test_the_leases_of_an_evicted_session_pass_on():
    table = LeaseTable()
    hold(table, A, X, Need.WRITE)
    ticket, _ = table.begin(B, {X: Need.READ})
    waiting, _ = table.begin(A, {X: Need.READ, Y: Need.READ})
    held, actions = table.end_session(A)
    assert held == [X]
    assert grants(actions) == [ticket]
    assert waiting.finished
    assert table.answer(A, X, WRITE) == []


def test_a_conflicting_reclaim_is_refused():
    table = LeaseTable()
    assert table.reclaim(A, X, WRITE)
    assert not table.reclaim(B, X, READ)
    assert table.reclaim(B, X, OPEN)
    assert table.reclaim(A, X, WRITE), "said twice"


def test_a_session_with_too_many_leases_gives_the_oldest_back(monkeypatch):
    monkeypatch.setattr(lease_table, "LEASES_PER_SESSION_MAX", 2)
    table = LeaseTable()
    for number in range(4):
        table.try_read(A, InodeNo(number + 1))
    assert [recall.ino for recall in recalls(table.trim())] == [1, 2]
    table.answer(A, InodeNo(1), NONE)
    table.answer(A, InodeNo(2), OPEN)
    assert table.lease_counts() == {A: 3}


# -- a model of three mounts behind links that keep order but take their time ---------------------


@dataclass
class Mounts:
    """Each step delivers one message; what mounts believe is checked after every step."""

    table: LeaseTable = field(default_factory=LeaseTable)
    believed: dict[tuple[SessionKey, InodeNo], int] = field(default_factory=dict)
    to_mount: dict[SessionKey, list[tuple]] = field(default_factory=lambda: {A: [], B: [], C: []})
    to_table: dict[SessionKey, list[tuple]] = field(default_factory=lambda: {A: [], B: [], C: []})
    unsent: list[tuple[Ticket | None, SessionKey, InodeNo, int]] = field(default_factory=list)
    executing: list[Ticket] = field(default_factory=list)
    waiting: list[Ticket] = field(default_factory=list)

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Recall):
                self.to_mount[action.session].append(("recall", action))
            else:
                self.waiting.remove(action.ticket)
                self.executing.append(action.ticket)

    def request(self, session: SessionKey, needs: dict[InodeNo, Need]) -> None:
        ticket, actions = self.table.begin(session, needs)
        (self.executing if ticket.granted else self.waiting).append(ticket)
        self.act(actions)

    def execute(self) -> None:
        ticket = self.executing.pop(0)
        for ino in ticket.needs:
            self.unsent.append((None, ticket.session, ino, self.table.serial(ticket.session, ino)))
        self.act(self.table.finish(ticket))

    def look(self, session: SessionKey, ino: InodeNo) -> None:
        serial = self.table.try_read(session, ino)
        if serial is not None:
            self.unsent.append((None, session, ino, serial))

    def send(self) -> None:
        _, session, ino, serial = self.unsent.pop(0)
        self.to_mount[session].append(("lease", ino, self.table.lease_at_send(session, ino, serial)))

    def deliver(self, session: SessionKey) -> None:
        kind, *rest = self.to_mount[session].pop(0)
        if kind == "lease":
            ino, lease = rest
            self.believed[session, ino] = max(self.believed.get((session, ino), NONE), lease)
            return
        (recall,) = rest
        if not recall.attr:
            held = self.believed.get((session, recall.ino), NONE)
            self.believed[session, recall.ino] = min(held, recall.to_kind)
        self.to_table[session].append((recall.ino, self.believed.get((session, recall.ino), NONE)))

    def receive(self, session: SessionKey) -> None:
        ino, kept = self.to_table[session].pop(0)
        self.act(self.table.answer(session, ino, kept))

    def check(self) -> None:
        for ino in (X, Y):
            beliefs = [self.believed.get((session, ino), NONE) for session in (A, B, C)]
            assert beliefs.count(WRITE) <= 1 and not (WRITE in beliefs and READ in beliefs)
            for session in (A, B, C):
                assert self.believed.get((session, ino), NONE) <= self.table.held(session, ino), "T4"

    def settle(self) -> None:
        for _ in range(1000):
            if self.executing:
                self.execute()
            if self.unsent:
                self.send()
            for session in (A, B, C):
                if self.to_mount[session]:
                    self.deliver(session)
                if self.to_table[session]:
                    self.receive(session)
            self.check()
        assert not self.waiting and not self.executing


SESSION = st.sampled_from([A, B, C])
MOVE = st.one_of(
    st.tuples(
        st.just("request"),
        SESSION,
        st.dictionaries(st.sampled_from([X, Y]), st.sampled_from(Need), min_size=1),
    ),
    st.tuples(st.just("look"), SESSION, st.sampled_from([X, Y])),
    st.tuples(st.sampled_from(["deliver", "receive"]), SESSION),
    st.tuples(st.sampled_from(["execute", "send"])),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(MOVE, max_size=60))
def test_no_two_mounts_ever_believe_in_conflicting_leases_and_all_requests_end(moves):
    mounts = Mounts()
    for name, *arguments in moves:
        queues = {"execute": mounts.executing, "send": mounts.unsent}
        if name in ("deliver", "receive"):
            queue = (mounts.to_mount if name == "deliver" else mounts.to_table)[arguments[0]]
            if not queue:
                continue
        elif name in queues and not queues[name]:
            continue
        getattr(mounts, name)(*arguments)
        mounts.check()
    mounts.settle()
