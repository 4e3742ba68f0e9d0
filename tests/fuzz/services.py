"""Whole services under hostile frames: a drive server and a coordinator, each real, over real connections.

Place      beside targets.py; for what no parser alone shows: handlers of calls, and what becomes of the process.
Inputs     one frame each, with a checksum that holds: a call with arguments that are right, nearly right or
           nonsense, a read or write with a head made up of the same, or bytes. A connection that was closed is
           made anew, with or without a hello.
Findings   an error that nobody planned for (the product logs those with a traceback), a service that does not
           answer within ANSWER_S, memory that grows.
"""

import logging
import random
import resource
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from csvfs.errors import CsvfsError, Disconnected
from csvfs.ids import SlabId
from csvfs.net.engine import Engine
from csvfs.net.link import Address, Link, connect
from csvfs.wire import control
from csvfs.wire.block_messages import BLOCK_HEAD, block_checksums, pack_checksums, slab_seed
from csvfs.wire.frames import Kind
from tests.block_cluster import CLUSTER, SLAB, VOLUME, BlockCluster
from tests.coordinator_cluster import NAME, TestCluster

BATCH = 64  # frames that are under way at once
ANSWER_S = 60.0
GROWTH_MIB_MAX = 400  # beyond what there was after the first tenth
INTEGERS = (-1, 0, 1, 2, 7, 16, 255, 256, 257, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1,
            1 << 63, (1 << 64) - 1)  # fmt: skip


class Unplanned(logging.Handler):
    """Collects what the product logs of errors that nobody planned for."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.findings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            where = traceback.extract_tb(record.exc_info[2])[-1]
            self.findings.append(f"{record.getMessage()}: {record.exc_info[1]!r} at {where.filename}:{where.lineno}")


class Words:
    """Draws values; `known` are those that would be right somewhere."""

    def __init__(self, seed: int, known: dict[str, list[Any]]) -> None:
        self._draw = random.Random(seed)
        self._known = known

    def value(self, depth: int = 0) -> Any:
        draw = self._draw
        kind = draw.randrange(11 if depth < 3 else 8)
        if kind < 3:
            return draw.choice(INTEGERS)
        if kind == 3:
            return draw.randbytes(draw.choice((0, 1, 15, 16, 17, 300)))
        if kind == 4:
            return draw.choice(("", "a", "n1", NAME, "mount/n1", "\0", "é" * 300))
        if kind == 5:
            return draw.choice((None, True, False, 0.5, float("nan"), float("inf")))
        if kind < 8:
            return draw.choice(draw.choice(list(self._known.values())))
        if kind == 8:
            return {draw.choice((*self._known, "x")): self.value(depth + 1) for _ in range(draw.randrange(4))}
        return [self.value(depth + 1) for _ in range(draw.randrange(5))]

    def arguments(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Of a call: most as they should be."""
        found = {}
        for name in names:
            chance = self._draw.random()
            if chance < 0.65 and name in self._known:
                found[name] = self._draw.choice(self._known[name])
            elif chance < 0.95:
                found[name] = self.value()
        return found

    def frame(self, calls: dict[str, tuple[str, ...]], *, rude: bool) -> tuple[int, bytes, bytes | None]:
        """(kind, head, payload). Rude ones are mostly answered by closing the connection."""
        draw, chance = self._draw, self._draw.random()
        if rude and chance < 0.5:
            return draw.choice(list(Kind)), draw.randbytes(draw.randrange(80)), draw.choice((None, bytes(4096)))
        if rude and chance < 0.6:
            return Kind.CALL, _packed(self.value()), None
        if chance < 0.85:
            name = draw.choice(list(calls))
            return Kind.CALL, _packed([name, self.arguments(calls[name])]), None
        return self._block_frame(rude)

    def _block_frame(self, rude: bool) -> tuple[int, bytes, bytes | None]:
        draw = self._draw
        counts = (0, 1, 1, 2, 256, 257, 65535) if rude else (1, 2, 16)
        count, slab, block = draw.choice(counts), draw.choice((SLAB, *INTEGERS[1:])), draw.choice((0, 5, 1023, 1 << 31))
        head = BLOCK_HEAD.pack(
            slab, draw.choice(INTEGERS[1:]), draw.choice(INTEGERS[1:]), draw.choice((1, 2, 3, 0xFFFFFFFF)), block, count,
            draw.choice((0, 0, 0, 1, 65535)), draw.randrange(4),
        )  # fmt: skip
        kind = draw.choice((Kind.READ, Kind.WRITE, Kind.HEAL))
        if kind == Kind.READ:
            return kind, head, None
        data = draw.randbytes(64) * (64 * min(count, 16))
        sums = block_checksums(memoryview(data), slab_seed(VOLUME, SlabId(slab)), block) if not rude else [7] * min(count, 16)
        return kind, head + pack_checksums(sums), data


def _packed(value: Any) -> bytes:
    try:
        return control.pack_value(value)
    except (OverflowError, ValueError):
        return b"\xc1"


DRIVE_CALLS = {
    "hello": ("cluster", "volume", "writer", "incarnation"), "drives": (), "ping": (), "status": (), "load": (),
    "create_slab": ("drive", "slab", "epoch", "term", "role"), "delete_slab": ("drive", "slab", "term"),
    "install": ("term", "items", "alone"), "fence": ("writer", "min_incarnation"), "register_term": ("term",),
    "trim": ("items",), "active": ("writer",), "stamp": ("drive", "slab", "epoch", "chunks"),
    "equal": ("drive", "slab", "epoch", "chunks"), "unequal": ("drive", "slab"),
    "pull": ("drive", "slab", "epoch", "source", "since", "chunks", "term", "speed", "even_if_lost"),
    "list_slabs": ("drive",), "scrub": ("drive", "slab", "block", "count", "rate_mib_s"), "scrub_tables": ("drive",),
    "heal_from": ("drive", "slab", "epoch", "source", "blocks", "term"), "settle": ("writer", "min_incarnation"),
    "completed": ("below",), "locate": ("drive", "slab"), "read_table": ("drive", "slab"),
}  # fmt: skip
COORDINATOR_CALLS = {
    "hello": ("volume", "node", "incarnation"), "reclaim": ("leases", "last"), "lookup": ("parent", "name"),
    "getattr": ("ino",), "setattr": ("ino", "mode", "uid", "gid", "size", "atime_ns", "mtime_ns", "op", "op_done"),
    "make": ("parent", "name", "mode", "uid", "gid", "rdev", "target", "op", "op_done"),
    "link": ("ino", "parent", "name", "op", "op_done"), "unlink": ("parent", "name", "directory", "op", "op_done"),
    "rename": ("parent", "name", "new_parent", "new_name", "flags", "op", "op_done"), "readlink": ("ino",),
    "readdir": ("ino", "cookie", "limit"), "getxattr": ("ino", "name"), "listxattr": ("ino",),
    "setxattr": ("ino", "name", "value", "flags", "op", "op_done"), "removexattr": ("ino", "name", "op", "op_done"),
    "acquire": ("ino", "kind", "block", "count"), "allocate": ("ino", "block", "count", "size", "mtime_ns", "op", "op_done"),
    "commit": ("ino", "size", "mtime_ns", "atime_ns", "op", "op_done"), "release": ("items",), "accessed": ("items",),
    # Without `wait`: a lock that waits takes as long as it likes.
    "lock": ("ino", "owner", "flock", "exclusive", "first", "last", "pid", "opened"),
    "unlock": ("ino", "owner", "flock", "exclusive", "first", "last", "handle"),
    "getlock": ("ino", "owner", "flock", "exclusive", "first", "last", "pid"), "lock_cancel": ("ino", "token"),
    "punch": ("ino", "block", "count", "op", "op_done"), "seek": ("ino", "block", "hole"),
    "slab_failed": ("slab", "epoch", "drives", "reason", "torn"), "slabs": ("ids", "open"), "fsync": (),
    "statfs": ("volume",), "volume_status": ("volume",), "job_control": ("volume", "action", "kind", "speed"),
    "volume_set": ("volume", "size", "copies", "min_copies"), "repair": ("volume",), "drive_members": ("volume", "drive"),
    "without_node": ("volume", "node"), "misplaced": ("volume", "level", "places"), "scrub": ("volume",), "check": ("volume", "start", "repair"), "lost": ("volume",),
}  # fmt: skip


class Attack:
    """Sends frames to one service and watches over it.

    greet(link): what a proper peer says first. alive(link): raises CsvfsError when the service does not answer.
    """

    def __init__(
        self,
        engine: Engine,
        address: Callable[[], Address],
        words: Words,
        calls: dict[str, tuple[str, ...]],
        greet: Callable[[Link, int], Awaitable[None]],
        alive: Callable[[Link], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._address = address
        self._words = words
        self._calls = calls
        self._greet = greet
        self._alive = alive
        self.sent = 0
        self.answered = 0
        self.closed = 0

    async def run(self, inputs: int) -> None:
        """Raises CsvfsError: the service is not well."""
        number = 0
        while self.sent < inputs:
            number += 1
            link = await connect(self._engine, self._address(), timeout_s=ANSWER_S)
            try:
                await self._one_connection(link, number, min(BATCH * 4, inputs - self.sent))
            except Disconnected:
                pass  # refused: counted below
            finally:
                self.closed += link.closed is not None
                link.close()
            if number % 8 == 1 or self.sent >= inputs:
                await self._look()

    async def _one_connection(self, link: Link, number: int, count: int) -> None:
        if number % 5:
            with trio.fail_after(ANSWER_S):
                await self._greet(link, number)
        while count > 0 and link.closed is None:
            waiting = min(BATCH, count)
            count -= waiting
            done = trio.Event()
            left = [waiting]

            def answer(frame: object, error: CsvfsError | None, left: list[int] = left, done: trio.Event = done) -> None:
                self.answered += not isinstance(error, Disconnected)
                left[0] -= 1
                if left[0] == 0:
                    done.set()

            for _ in range(waiting):
                self.sent += 1
                link.request(*self._words.frame(self._calls, rude=number % 4 == 0), answer)
            with trio.move_on_after(0.3):  # some wait for what never comes; they end with their connection
                await done.wait()

    async def _look(self) -> None:
        link = await connect(self._engine, self._address(), timeout_s=ANSWER_S)
        try:
            with trio.fail_after(ANSWER_S):
                await self._alive(link)
        finally:
            link.close()


async def attack_drive_server(path: Path, inputs: int, seed: int) -> Attack:
    async with trio.open_nursery() as nursery:
        cluster = BlockCluster(path, nursery)
        await cluster.start()
        server = cluster.servers[0]
        known = {
            "cluster": [CLUSTER], "volume": [VOLUME, None], "writer": ["mount/n1", "coordinator", "admin", "server/n1/7/0"],
            "incarnation": [1, 2], "drive": [server.drive_id], "slab": [SLAB, 8, 9], "epoch": [1, 2, 3], "term": [1, 2],
            "role": [1, 2, None], "items": [[[server.drive_id, SLAB, 2, 1]], [[0, SLAB, 1, 0, 4]], [[server.drive_id, 8, 3, 2]]],
            "alone": [[], [0]], "min_incarnation": [1], "chunks": [[], [0, 1], None], "since": [0, 1], "speed": [None, 2],
            "source": [{"address": "127.0.0.1", "port": cluster.servers[1].port, "drive": cluster.servers[1].drive_id}],
            "block": [0, 1, 1023], "count": [1, 16], "rate_mib_s": [0, 100], "blocks": [[0, 1]], "below": [1, 5],
            "even_if_lost": [False, True],
        }  # fmt: skip

        async def greet(link: Link, number: int) -> None:
            arguments = {"cluster": CLUSTER, "volume": VOLUME, "writer": f"mount/m{number}", "incarnation": number}
            await link.call("hello", arguments, timeout_s=ANSWER_S)

        async def alive(link: Link) -> None:
            await link.call("status", {}, timeout_s=ANSWER_S)

        def address() -> Address:
            return ("127.0.0.1", server.port)

        attack = Attack(cluster.engine, address, Words(seed, known), DRIVE_CALLS, greet, alive)
        await attack.run(inputs)
        nursery.cancel_scope.cancel()
    return attack


async def attack_coordinator(path: Path, inputs: int, seed: int) -> Attack:
    async with trio.open_nursery() as nursery:
        cluster = TestCluster(path, nursery)
        cluster.recall_timeout_ms = 500
        await cluster.start()
        host = await cluster.start_host("n1")
        await cluster.create_volume(3)
        await cluster.wait_serving()
        engine = Engine()
        nursery.start_soon(engine.run_forever)
        numbers = [1, 2, 3, 4]
        known = {
            "volume": [NAME], "node": ["n1", "n2"], "incarnation": [1000, 1 << 64, -1], "ino": numbers, "parent": [1, 1, 2, 3],
            "new_parent": [1, 2], "name": [b"a", b"b", b"c", b"user.x"], "new_name": [b"a", b"d"], "mode": [0o100644, 0o040755],
            "uid": [0, 1000], "gid": [0], "rdev": [0], "target": [b"", b"t"], "op": list(range(1, 60)), "op_done": [0, 1],
            "directory": [True, False], "flags": [0, 1, 2], "value": [b"v"], "kind": [1, 2, 3, None, "repair"], "block": [0, 1, 300],
            "count": [0, 1, 64], "size": [0, 4096, None], "mtime_ns": [0, 5, None], "atime_ns": [None, 5], "limit": [1, 100],
            "cookie": [0, 16], "leases": [[[2, 1, 0, 0]], []], "last": [True], "items": [[[2, 0]], []], "ids": [[], [1]],
            "slab": [1, 2], "epoch": [1, 2], "drives": [[]], "reason": ["x"], "torn": [None, [0]], "hole": [True, False],
            "open": [0, None], "action": ["pause", "resume", "speed"], "speed": ["low"], "copies": [3, 2], "min_copies": [1],
            "drive": [b"n1--------------"], "level": ["rack"], "places": [{"n1": {"rack": "a"}}],
        }  # fmt: skip

        async def greet(link: Link, number: int) -> None:
            try:
                hello = {"volume": NAME, "node": f"m{number % 3}", "incarnation": number}
                await link.call("hello", hello, timeout_s=ANSWER_S)
                await link.call("reclaim", {"leases": [], "last": True}, timeout_s=ANSWER_S)
            except CsvfsError:
                pass  # a frame before may have claimed more; then this one goes on as a stranger

        async def alive(link: Link) -> None:
            await link.call("volume_status", {"volume": NAME}, timeout_s=ANSWER_S)

        def address() -> Address:
            return ("127.0.0.1", host._port)

        attack = Attack(engine, address, Words(seed, known), COORDINATOR_CALLS, greet, alive)
        await attack.run(inputs)
        nursery.cancel_scope.cancel()
    return attack


SERVICES: dict[str, Callable[[Path, int, int], Awaitable[Attack]]] = {
    "drive-server": attack_drive_server,
    "coordinator": attack_coordinator,
}


def memory_mib() -> int:
    """The most that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def run_service(name: str, inputs: int, seed: int) -> tuple[Attack | None, list[str]]:
    """What was sent, and the findings."""
    unplanned = Unplanned()
    root = logging.getLogger()
    root.addHandler(unplanned)
    try:
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/var/tmp") as directory:
            attack = trio.run(SERVICES[name], Path(directory), inputs, seed)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return None, [*unplanned.findings, f"the service is not well: {error!r}"]
    finally:
        root.removeHandler(unplanned)
    return attack, unplanned.findings
