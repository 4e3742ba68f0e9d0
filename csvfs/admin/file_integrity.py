"""Integrity of a file: the questions to its volume's coordinator, step by step, and what the answers add up to.

Place      admin floor. The report, and adding answers to it, is pure; `examine` is the shell.
Steps      each call answers for a stretch of the file. One without an answer is asked again, of whoever coordinates the
           volume by then, for SILENT_S_MAX.
"""

import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from csvfs.admin.cluster_view import read_cluster_view
from csvfs.admin.peers import Peers
from csvfs.admin.volume_paths import find_in_volume
from csvfs.config import NodeConfig
from csvfs.errors import BadRequest, CsvfsError, ProtocolError
from csvfs.store.interface import ClusterStore
from csvfs.units import BLOCK_SIZE

CALL_TIMEOUT_S = 150.0  # 16 MiB of every copy, from slow drives
SILENT_S_MAX = 60.0
RETRY_S = 0.5
CHECKSUM = "CRC-32C"


@dataclass(slots=True)
class SlabCopies:
    """Of one slab in which the file lies: how many copies are in sync, are being brought in sync, gave an answer."""

    slab: int
    blocks: int
    in_sync: int
    joining: int
    serving: int
    why: list[str] = field(default_factory=list)  # of copies in sync that do not serve


@dataclass(slots=True)
class Unreadable:
    offset: int  # bytes
    size: int
    what: str  # bad: on all copies; lost: with its drives; waiting: for a drive that may come back


@dataclass(slots=True)
class VerifiedCopies:
    """What lies on one drive. Blocks of 4 KiB; found counts damaged table entries, too."""

    drive: str  # id in hex
    node: str
    verified: int = 0
    found: int = 0
    healed: int = 0
    left: int = 0  # no other copy could give them
    skipped: int = 0  # pieces that could not be verified
    why: str = ""


@dataclass(slots=True)
class Integrity:
    path: str
    volume: str
    ino: int
    size: int = 0  # bytes
    block_size: int = BLOCK_SIZE
    checksum: str = CHECKSUM
    allocated: int = 0  # blocks
    unwritten: int | None = 0  # of these; None: some copies could not be asked
    shared: int = 0
    copies_wanted: int = 0
    slabs: list[SlabCopies] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    verified: list[VerifiedCopies] | None = None  # None: that was not asked for
    verify_s: float = 0.0

    @property
    def is_readable(self) -> bool:
        return not self.unreadable

    @property
    def is_sound(self) -> bool:
        return self.is_readable and not any(copy.left or copy.skipped for copy in self.verified or ())

    def by_copies(self) -> dict[int, int]:
        """How many slabs have so many copies in sync that answer; most first."""
        counts: dict[int, int] = {}
        for slab in self.slabs:
            counts[slab.serving] = counts.get(slab.serving, 0) + 1
        return dict(sorted(counts.items(), reverse=True))


@dataclass(slots=True)
class Progress:
    """Of verifying; blocks of the file, each on all its copies."""

    done: int
    total: int
    took_s: float

    @property
    def rate(self) -> float:
        """Bytes of the file per second."""
        return self.done * BLOCK_SIZE / self.took_s if self.took_s else 0.0

    @property
    def eta_s(self) -> float | None:
        return (self.total - self.done) * BLOCK_SIZE / self.rate if self.rate else None


def add_look(report: Integrity, answer: dict[str, Any]) -> None:
    """Add an answer to `file_integrity`. Raises KeyError, TypeError, ValueError: it is none."""
    known = {slab.slab: slab for slab in report.slabs}
    report.size = int(answer["size"])
    report.allocated += int(answer["allocated"])
    report.shared += int(answer["shared"])
    for slab, blocks, unwritten, in_sync, joining, serving, why in answer["slabs"]:
        row = known.get(int(slab))
        if row is None:
            row = SlabCopies(int(slab), 0, 0, 0, 0)
            report.slabs.append(row)
        row.blocks += int(blocks)
        row.in_sync, row.joining, row.serving = int(in_sync), int(joining), int(serving)
        row.why = [str(text) for text in why]
        if unwritten is None or report.unwritten is None:
            report.unwritten = None
        else:
            report.unwritten += int(unwritten)
    for offset, size, what in answer["unreadable"]:
        _add_range(report.unreadable, int(offset), int(size), str(what))


def _add_range(rows: list[Unreadable], offset: int, size: int, what: str) -> None:
    if rows and rows[-1].offset + rows[-1].size == offset and rows[-1].what == what:
        rows[-1].size += size
    else:
        rows.append(Unreadable(offset, size, what))


def add_verified(report: Integrity, answer: dict[str, Any]) -> int:
    """Add an answer to `file_verify`; how many blocks of the file it was about. Raises as add_look."""
    report.verified = report.verified or []
    known = {(row.drive, row.node): row for row in report.verified}
    for drive, node, verified, found, healed, left, skipped, why in answer["copies"]:
        key = (bytes(drive).hex(), str(node))
        row = known.get(key)
        if row is None:
            row = VerifiedCopies(*key)
            report.verified.append(row)
        row.verified += int(verified)
        row.found += int(found)
        row.healed += int(healed)
        row.left += int(left)
        row.skipped += int(skipped)
        row.why = str(why) or row.why
    return int(answer["blocks"])


async def examine(
    config: NodeConfig,
    store: ClusterStore,
    peers: Peers,
    text: str,
    *,
    verify: bool,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Integrity:
    """The integrity of the file at a path. verify: read every copy of every block first, and heal what is bad.

    Raises  BadRequest: no regular file of a volume. NotFound, Unavailable: no answer. ProtocolError. Cancel safe.
    """
    found = await find_in_volume(config, text)
    if not stat.S_ISREG(found.status.st_mode):
        raise BadRequest(f"{found.path} is no regular file: only these have blocks with checksums")
    steps = _Steps(store, peers, found.volume, found.status.st_ino)
    report = await steps.look(str(found.path))
    if not verify:
        return report
    total, began = report.allocated, trio.current_time()
    tally = Integrity(report.path, report.volume, report.ino, verified=[])
    done = 0
    async for answer in steps.ask("file_verify"):
        done += steps.checked(add_verified, tally, answer)
        on_progress(Progress(done, max(done, total), trio.current_time() - began))
    report = await steps.look(str(found.path))  # what is lost is known now
    report.verified, report.verify_s = tally.verified, trio.current_time() - began
    return report


class _Steps:
    def __init__(self, store: ClusterStore, peers: Peers, volume: str, ino: int) -> None:
        self._store = store
        self._peers = peers
        self._volume = volume
        self._ino = ino

    async def look(self, path: str) -> Integrity:
        view = await read_cluster_view(self._store)
        report = Integrity(path, self._volume, self._ino)
        report.copies_wanted = view.volume(self._volume).number("copies")
        async for answer in self.ask("file_integrity"):
            self.checked(add_look, report, answer)
        return report

    def checked(self, add: Callable[[Integrity, dict[str, Any]], Any], report: Integrity, answer: dict[str, Any]) -> Any:
        try:
            return add(report, answer)
        except (KeyError, TypeError, ValueError) as error:
            raise self._nonsense(error) from None

    def _nonsense(self, error: Exception) -> ProtocolError:
        return ProtocolError(f"the coordinator of {self._volume} answers with nonsense: {error!r}"[:300])

    async def ask(self, name: str):  # type: ignore[no-untyped-def]  # an async generator of answers
        """All answers, of one stretch each. Raises what does not pass by itself within SILENT_S_MAX."""
        block: int | None = 0
        while block is not None:
            answer = await self._ask_once(name, block)
            yield answer
            following = answer.get("next")
            if following is not None and not (isinstance(following, int) and following > block):
                raise self._nonsense(ValueError("it does not get on"))
            block = following

    async def _ask_once(self, name: str, block: int) -> dict[str, Any]:
        silent_since = trio.current_time()
        while True:
            try:
                view = await read_cluster_view(self._store)
                answer = await self._peers.coordinator_slowly(
                    view, self._volume, name, CALL_TIMEOUT_S, ino=self._ino, block=block
                )
            except CsvfsError as error:
                if not error.retryable or trio.current_time() > silent_since + SILENT_S_MAX:
                    raise
                await trio.sleep(RETRY_S)
                continue
            if not isinstance(answer, dict):
                raise self._nonsense(TypeError(type(answer).__name__))
            return answer
