"""The beats of this node, and what is done about nodes whose beats do not come any more (cluster/beats.py).

Place      admin floor, tasks of `csvfs node run` under the node's lease, where the store is etcd.
Writer     of `beats/<node>`, under the lease. Deletes `alive/<other>` of nodes that are silent and ends their leases.
Limits     BEATS_MAX of our own under way: one that hangs at a member that is just dying does not hold up the next.
"""

import logging
from collections.abc import Callable

import trio

from csvfs.clock import monotonic_ns
from csvfs.cluster.beats import BEATS, Beats, BeatTimes
from csvfs.cluster.liveness import LivenessWriter
from csvfs.errors import NotFound, Unavailable
from csvfs.store.interface import ClusterStore, Compare, Delete, Put

logger = logging.getLogger(__name__)
BEATS_MAX = 8
LOOK_S = 0.1
RETRY_S = 0.2


class ServingTime:
    """Until when this node may serve: as its renewals of the lease allow, and as its beats do (B1)."""

    def __init__(self, page: LivenessWriter, *, has_beats: bool) -> None:
        self._page = page
        self._renewed_ns = 0
        self._beaten_ns = 0 if has_beats else (1 << 63) - 1

    def renewed(self, until_ns: int) -> None:
        self._renewed_ns = max(self._renewed_ns, until_ns)
        self._page.serve_until(min(self._renewed_ns, self._beaten_ns))

    def beaten(self, until_ns: int) -> None:
        self._beaten_ns = max(self._beaten_ns, until_ns)
        self._page.serve_until(min(self._renewed_ns, self._beaten_ns))


class NodeBeats:
    """Of one node under one lease."""

    def __init__(
        self,
        store: ClusterStore,
        node: str,
        lease: int,
        alive_revision: int,
        times: BeatTimes,
        serving: ServingTime,
        on_lost: Callable[[], None],
    ) -> None:
        """alive_revision: of `alive/<node>`, as this lease wrote it. on_lost: it is gone; the lease counts for nothing."""
        self._store = store
        self._node = node
        self._lease = lease
        self._alive = Compare(f"alive/{node}", alive_revision)
        self._times = times
        self._serving = serving
        self._on_lost = on_lost
        self._beats = Beats(times)
        self._under_way = 0

    # -- our own ---------------------------------------------------------------------------------

    async def beat_forever(self) -> None:
        """Until cancelled, or the lease is lost."""
        async with trio.open_nursery() as nursery:
            while True:
                if self._under_way < BEATS_MAX:
                    self._under_way += 1
                    nursery.start_soon(self._beat)
                await trio.sleep(self._times.interval_s)

    async def _beat(self) -> None:
        sent_ns = monotonic_ns()
        try:
            with trio.move_on_after(self._times.serve_s) as deadline:
                put = Put(BEATS + self._node, b"", self._lease)
                stands = (await self._store.transact([self._alive], [put], repeatable=True)).succeeded
        except NotFound:
            stands = False
        except Unavailable as error:
            logger.info("no beat: %s", error)
            return
        finally:
            self._under_way -= 1
        if deadline.cancelled_caught:
            logger.warning("the cluster store has not taken a beat for %.1f s", self._times.serve_s)
        elif stands:
            self._serving.beaten(sent_ns + int(self._times.serve_s * 1e9))
            self._beats.committed(trio.current_time())
        else:
            self._on_lost()

    # -- the others' -----------------------------------------------------------------------------

    async def watch_forever(self) -> None:
        """Until cancelled."""
        while True:
            try:
                async with self._store.watch(BEATS) as changes, trio.open_nursery() as nursery:
                    for item in await self._store.list(BEATS):
                        self._hear(item.key, item.revision)
                    nursery.start_soon(self._look_forever)
                    async for batch in changes:
                        for change in batch:
                            self._hear(change.key, change.revision if change.item else None)
            except* Unavailable as errors:
                logger.warning("beats of the other nodes: %s", errors.exceptions[0])
            await trio.sleep(RETRY_S)

    def _hear(self, key: str, revision: int | None) -> None:
        node = key.removeprefix(BEATS)
        if revision is None:
            self._beats.forget(node)
        elif node != self._node:
            self._beats.heard(node, revision, trio.current_time())

    async def _look_forever(self) -> None:
        while True:
            await trio.sleep(LOOK_S)
            for node, revision in self._beats.silent(trio.current_time()):
                try:
                    await self._count_as_gone(node, revision)
                except Unavailable as error:
                    logger.info("node %s is silent, and cannot be counted as gone: %s", node, error)

    async def _count_as_gone(self, node: str, revision: int) -> None:
        """B2. Raises Unavailable: nothing is known; looked at again."""
        alive = await self._store.get(f"alive/{node}")
        beat = await self._store.get(BEATS + node)
        if alive is None or beat is None:
            self._beats.forget(node)
            return
        if beat.revision != revision:
            self._beats.heard(node, beat.revision, trio.current_time())
            return
        compares = [Compare(beat.key, beat.revision), Compare(alive.key, alive.revision)]
        if not (await self._store.transact(compares, [Delete(alive.key), Delete(beat.key)])).succeeded:
            return  # it has beaten, or another node was quicker
        logger.warning("node %s has not been heard for %.1f s: it counts as gone", node, self._times.gone_s)
        self._beats.forget(node)
        await self._store.revoke_lease(alive.lease)  # what else it had written goes with it

