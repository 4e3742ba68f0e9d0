"""What a coordinator tells drive servers: PROTOCOL.md, "Calls to a drive server", as methods.

Place      coordinator floor, over block/server_links.py.
Links      `links` are those of the writer `coordinator` with the term as incarnation: registering a higher
           term fences them, so no call of a deposed coordinator can arrive late. `pull_links` carry the calls
           that take long; those bear the term themselves.
Errors     Fenced means that another coordinator has taken the volume: it goes up and ends the service.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from coordinator.at_once import ask_all
from csvfs.block.pace import SPEED_DEFAULT
from csvfs.block.placement import DriveSpace
from csvfs.errors import CsvfsError, DriveFailed, Fenced, ProtocolError, Unavailable, UnflushedLost
from csvfs.ids import DriveId, Epoch, Incarnation, NodeName, SlabId, Term, VolumeId, id_bytes
from csvfs.wire.block_messages import ROLE_IN_SYNC, Member, SlabDescriptor

CALL_TIMEOUT_S = 5.0
PULL_TIMEOUT_S = 600.0  # 256 MiB at 1 MiB/s, twice over; links to servers that are gone break before
INSTALL_ITEMS_MAX = 4_096  # per call: one message of about 200 KiB

Failures = dict[tuple[SlabId, DriveId], CsvfsError]


class ServerView(Protocol):
    """Of ServerLinks.connected: what we need of an open link."""

    incarnation: Incarnation

    def drive_index(self, drive: DriveId) -> int: ...


class Links(Protocol):
    """Of ServerLinks: what we need, and what tests replace."""

    async def connected(self, node: NodeName) -> Any: ...
    async def serving(self, node: NodeName, drive: DriveId) -> Any: ...
    async def call(self, node: NodeName, name: str, args: dict[str, Any], *, timeout_s: float) -> Any: ...
    def drop(self, node: NodeName, reason: str) -> None: ...


@dataclass(slots=True, frozen=True)
class Copy:
    """One row of `list_slabs`."""

    volume: VolumeId
    slab: SlabId
    epoch: Epoch
    in_service: bool
    contents_lost: bool = False  # its drive lost power, or a flush: see Drive.contents_lost


class DriveControl:
    """Calls to the drive servers of one volume under one term.

    source_of   where a node's drive server listens, as (address, port); None: nowhere now.
    """

    def __init__(
        self,
        links: Links,
        pull_links: Links,
        term: Term,
        source_of: Callable[[NodeName], tuple[str, int] | None],
    ) -> None:
        self.links = links
        self.term = term
        self._pull_links = pull_links
        self._source_of = source_of
        self.speed: Callable[[], int] = lambda: SPEED_DEFAULT  # index into block/pace.py, SPEEDS

    # -- epochs ----------------------------------------------------------------------------------

    async def install(self, descriptors: Iterable[SlabDescriptor], accepted: Mapping[SlabId, int]) -> Failures:
        """Install each descriptor's epoch on its in-sync and joining members.

        accepted the opening of the drive of a slab's only in-sync copy, since which what it had not flushed is known to be
                 lost: the descriptor says so.
        Returns  the (slab, drive) pairs where it did not succeed. Raises Fenced.
        """
        by_node: dict[NodeName, list[list[Any]]] = {}
        alone: set[SlabId] = set()  # of the only in-sync copies: these go on even if their server started anew
        for descriptor in descriptors:
            if len(descriptor.in_sync) == 1:
                alone.add(descriptor.slab)
            for member in descriptor.writable:
                item = [member.drive, descriptor.slab, descriptor.epoch, member.role]
                by_node.setdefault(member.node, []).append(item)
        failures: Failures = {}
        fenced: list[Fenced] = []
        async with trio.open_nursery() as nursery:
            for node, items in by_node.items():
                nursery.start_soon(self._install_on_node, node, items, alone, accepted, failures, fenced)
        if fenced:
            raise fenced[0]
        return failures

    async def _install_on_node(
        self,
        node: NodeName,
        items: list[list[Any]],
        alone: set[SlabId],
        accepted: Mapping[SlabId, int],
        failures: Failures,
        fenced: list[Fenced],
    ) -> None:
        for start in range(0, len(items), INSTALL_ITEMS_MAX):
            part = items[start : start + INSTALL_ITEMS_MAX]
            args = {
                "term": self.term, "items": part,
                "alone": [number for number, item in enumerate(part) if item[1] in alone],
                "accepted": [[number, accepted[item[1]]] for number, item in enumerate(part) if item[1] in accepted],
            }  # fmt: skip
            try:
                answer = await self.call(node, "install", args)
                for drive, slab, reason in answer["refused"]:
                    failures[SlabId(slab), DriveId(drive)] = DriveFailed(str(reason))
                for drive, slab, reason, opens in answer["lost"]:
                    failures[SlabId(slab), DriveId(drive)] = lost = UnflushedLost(str(reason))
                    lost.opens = int(opens)
            except Fenced as error:
                fenced.append(error)
                return
            except CsvfsError as error:
                for drive, slab, _, _ in items[start:]:
                    failures[slab, drive] = error
                return
            except (KeyError, TypeError, ValueError) as error:
                nonsense = ProtocolError(f"node {node} answered install with nonsense: {error!r}")
                failures.update({(slab, drive): nonsense for drive, slab, _, _ in part})

    async def create_slab(
        self, slab: SlabId, epoch: Epoch, node: NodeName, drive: DriveId, role: int = ROLE_IN_SYNC
    ) -> None:
        """A copy that is there stays as it is. Raises NoSpace, DriveFailed, Unavailable, Fenced."""
        args = {"drive": drive, "slab": slab, "epoch": epoch, "term": self.term, "role": role}
        await self.call(node, "create_slab", args)

    async def delete_slab(self, slab: SlabId, node: NodeName, drive: DriveId) -> None:
        await self.call(node, "delete_slab", {"drive": drive, "slab": slab, "term": self.term})

    # -- fences ----------------------------------------------------------------------------------

    async def register_term(self, node: NodeName) -> None:
        """From its answer on the node takes nothing of lower terms (I6). Raises Fenced: a higher one is
        there."""
        await self.call(node, "register_term", {"term": self.term})

    async def fence(self, node: NodeName, writer: str, min_incarnation: Incarnation) -> None:
        await self.call(node, "fence", {"writer": writer, "min_incarnation": min_incarnation})

    async def settle_writer_on(self, nodes: Iterable[NodeName], writer: str, min_incarnation: Incarnation) -> None:
        """An evicted writer is over: what it marked and was not made equal is nobody's. Raises the first error."""
        args = {"writer": writer, "min_incarnation": min_incarnation}
        await ask_all(nodes, lambda node: self.call(node, "settle", args))

    async def active_on(
        self, nodes: Iterable[NodeName], writer: str | None
    ) -> list[tuple[DriveId, SlabId, list[int]]]:
        """Chunks with writes of `writer` (None: anybody) not known to be complete on all members. Raises the first error."""
        answers = await ask_all(nodes, lambda node: self._active(node, writer))
        return [row for rows in answers.values() for row in rows]

    async def _active(self, node: NodeName, writer: str | None) -> list[tuple[DriveId, SlabId, list[int]]]:
        rows = await self.call(node, "active", {"writer": writer})
        try:
            return [(DriveId(id_bytes(drive)), SlabId(int(slab)), list(chunks)) for drive, slab, chunks in rows]
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"node {node} answered active with nonsense: {error!r}") from None

    # -- content ---------------------------------------------------------------------------------

    async def stamp(self, member: Member, slab: SlabId, epoch: Epoch, chunks: list[int]) -> None:
        args = {"drive": member.drive, "slab": slab, "epoch": epoch, "chunks": chunks}
        await self.call(member.node, "stamp", args)

    async def equal(self, member: Member, slab: SlabId, epoch: Epoch, chunks: list[int]) -> None:
        """Chunks were made the same on all members."""
        args = {"drive": member.drive, "slab": slab, "epoch": epoch, "chunks": chunks}
        await self.call(member.node, "equal", args)

    async def pull(
        self, target: Member, source: Member, descriptor: SlabDescriptor, chunks: list[int] | None
    ) -> int:
        """Have `target` copy from `source` what it misses, or just `chunks`; returns the bytes copied.

        Raises  Corrupt: a block has rotted on the source, and the target does not have it either.
        """
        return (await self._pull(target, source, descriptor, chunks, even_if_lost=False))[0]

    async def pull_what_is_left(
        self, target: Member, source: Member, descriptor: SlabDescriptor
    ) -> tuple[int, list[int]]:
        """As `pull`, over blocks that neither of them has: these are bad on the target as well, and returned."""
        return await self._pull(target, source, descriptor, None, even_if_lost=True)

    async def _pull(
        self,
        target: Member,
        source: Member,
        descriptor: SlabDescriptor,
        chunks: list[int] | None,
        *,
        even_if_lost: bool,
    ) -> tuple[int, list[int]]:
        where = self._source_of(source.node)
        if where is None:
            raise Unavailable(
                f"node {source.node} runs no drive server now; slab {descriptor.slab} waits for it"
            )
        args = {
            "drive": target.drive,
            "slab": descriptor.slab,
            "epoch": descriptor.epoch,
            "source": {"address": where[0], "port": where[1], "drive": source.drive, "node": source.node},
            "since": target.since,
            "chunks": chunks,
            "term": self.term,
            "speed": self.speed(),
            "even_if_lost": even_if_lost,
        }
        answer = await self._pull_links.call(target.node, "pull", args, timeout_s=PULL_TIMEOUT_S)
        try:
            return int(answer["bytes"]), [int(block) for block in answer["lost"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"node {target.node} answered pull with nonsense: {error!r}") from None

    async def trim(
        self, member: Member, descriptor: SlabDescriptor, ranges: Iterable[tuple[int, int]]
    ) -> None:
        """Make (block, count) ranges never-written on one member.

        After an error the link is dropped: whatever of the trim is still under way dies with it, because a
        later link of the same writer closes the earlier one first. So no trim lands after its blocks were
        freed.
        """
        try:
            server = await self.links.serving(member.node, member.drive)
            index = server.drive_index(member.drive)
            items = [[index, descriptor.slab, descriptor.epoch, block, count] for block, count in ranges]
            await self.call(member.node, "trim", {"items": items})
        except CsvfsError as error:
            self.links.drop(member.node, f"a trim failed: {error}")
            raise

    async def scrub(
        self, member: Member, slab: SlabId, block: int, count: int, rate_mib_s: int
    ) -> tuple[list[int], int]:
        """Verify a range of a member's copy: (bad blocks, what was put right there already).

        Raises  Corrupt: the copy as a whole is damaged. DriveFailed, Unavailable, Fenced.
        """
        args = {"drive": member.drive, "slab": slab, "block": block, "count": count, "rate_mib_s": rate_mib_s}
        answer = await self._pull_links.call(member.node, "scrub", args, timeout_s=PULL_TIMEOUT_S)
        try:
            return [int(number) for number in answer["bad"]], int(answer["repaired"])
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"node {member.node} answered scrub with nonsense: {error!r}") from None

    async def unwritten(self, member: Member, slab: SlabId, ranges: list[tuple[int, int]]) -> int:
        """How many blocks of these (block, count) a member's copy has no content of: they read as zeros.

        Raises  Unavailable: the copy is not in service. DriveFailed, Corrupt, Fenced.
        """
        args = {"drive": member.drive, "slab": slab, "ranges": ranges}
        answer = await self._pull_links.call(member.node, "unwritten", args, timeout_s=CALL_TIMEOUT_S)
        if not isinstance(answer, int) or not 0 <= answer <= sum(count for _, count in ranges):
            raise ProtocolError(f"node {member.node} answered unwritten with nonsense: {answer!r}"[:200])
        return answer

    async def scrub_tables(self, node: NodeName, drive: DriveId) -> int:
        """Put right superblocks and slot table of a drive; how much was wrong."""
        answer = await self._pull_links.call(node, "scrub_tables", {"drive": drive}, timeout_s=PULL_TIMEOUT_S)
        return int(answer["repaired"]) if isinstance(answer, dict) and "repaired" in answer else 0

    async def heal_from(
        self, target: Member, source: Member, descriptor: SlabDescriptor, blocks: list[int]
    ) -> tuple[int, list[int]]:
        """Have `target` rewrite bad blocks from `source`: (how many were, those that `source` has bad too)."""
        where = self._source_of(source.node)
        if where is None:
            raise Unavailable(f"node {source.node} runs no drive server now")
        args = {
            "drive": target.drive, "slab": descriptor.slab, "epoch": descriptor.epoch, "term": self.term,
            "source": {"address": where[0], "port": where[1], "drive": source.drive, "node": source.node},
            "blocks": blocks,
        }  # fmt: skip
        answer = await self._pull_links.call(target.node, "heal_from", args, timeout_s=PULL_TIMEOUT_S)
        try:
            return int(answer["healed"]), [int(block) for block in answer["left"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"node {target.node} answered heal_from with nonsense: {error!r}") from None

    # -- questions -------------------------------------------------------------------------------

    async def copies(self, node: NodeName, drive: DriveId) -> list[Copy]:
        """All slab copies on a drive, of all volumes."""
        rows = await self.call(node, "list_slabs", {"drive": drive})
        try:
            return [
                Copy(
                    VolumeId(id_bytes(row[0])),
                    SlabId(int(row[1])),
                    Epoch(int(row[2])),
                    bool(row[4]),
                    bool(row[5]),
                )
                for row in rows
            ]
        except (IndexError, TypeError, ValueError) as error:
            raise ProtocolError(f"node {node} answered list_slabs with nonsense: {error!r}") from None

    async def spaces(self, node: NodeName) -> list[DriveSpace]:
        """The node's drives in order, with their free slots."""
        answer = await self.call(node, "status", {})
        try:
            return [
                DriveSpace(DriveId(id_bytes(row["id"])), node, int(row["free_slots"]), int(row["slots"]))
                for row in answer["drives"]
                if row["state"] == "ok" and not row.get("failure")
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"node {node} answered status with nonsense: {error!r}") from None

    async def incarnation(self, node: NodeName) -> Incarnation:
        """Of the node's drive server, which we then have a link to. Raises Unavailable."""
        server: ServerView = await self.links.connected(node)
        return server.incarnation

    async def call(self, node: NodeName, name: str, args: dict[str, Any]) -> Any:
        return await self.links.call(node, name, args, timeout_s=CALL_TIMEOUT_S)
