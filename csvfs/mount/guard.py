"""The guard: whether this mount may answer from what it holds, asked before every answer (I5).

Place      mount floor. Two conditions, both by monotonic clock:
Node       the node's lease (cluster/liveness.py). Once it has run out, others may take our leases: the lapse stays until
           `restored`. To this process the lease only comes back if it never ended in the cluster store: after one that
           ended there is another page, and another process. So nobody has counted this node as gone, or evicted us for
           that, and leases stay. They must: writes under way go on when their slab can be reached again, and whoever got
           the lease of such a file meanwhile would read what was there before them.
Contact    the coordinator answered something that was sent less than `contact_s_max` ago. It evicts sessions
           that it has not heard of for longer, and then our own drives would still read well but stale. A
           process that was stopped for a while wakes up without contact. Contact regained means not evicted
           (an evicted session gets Fenced), so serving just goes on.
"""

from collections.abc import Callable

import trio

from csvfs.clock import MonotonicNs, monotonic_ns
from csvfs.errors import LeaseLost

CONTACT_S_MAX = 4.0  # below Options.recall_timeout_ms (5 s) and eviction's CONTACT_S_MAX
POLL_S = 0.02


class Guard:
    """`serving` is on the hot path: well below 1 us."""

    def __init__(
        self,
        may_serve: Callable[[], bool],
        *,
        contact_s_max: float = CONTACT_S_MAX,
        clock: MonotonicNs = monotonic_ns,
    ) -> None:
        self._may_serve = may_serve
        self._clock = clock
        self._contact_ns_max = int(contact_s_max * 1e9)
        self._contact_until_ns = 0
        self._closed = False
        self.lapsed = False

    def close(self) -> None:
        """This mount was evicted: it serves no more, whatever is heard."""
        self.lapsed = self._closed = True

    def contact(self, sent_ns: int) -> None:
        """The coordinator answered what was sent at `sent_ns`."""
        self._contact_until_ns = max(self._contact_until_ns, sent_ns + self._contact_ns_max)

    def serving(self) -> bool:
        """Whether an answer given now, without another await, is covered."""
        if self.lapsed:
            return False
        if not self._may_serve():
            self.lapsed = True
            return False
        return self._clock() < self._contact_until_ns

    def may_restore(self) -> bool:
        """After a lapse: whether the node's lease is there again."""
        return self.lapsed and not self._closed and self._may_serve()

    def restored(self) -> None:
        """Nothing that was learned before the lapse is on its way to the kernel's caches any more."""
        self.lapsed = False

    async def wait_serving(self, timeout_s: float) -> None:
        """Returns when `serving`. Raises LeaseLost after `timeout_s`."""
        with trio.move_on_after(timeout_s):
            while not self.serving():
                await trio.sleep(POLL_S)
            return
        raise LeaseLost(
            f"this node could not serve for {timeout_s:g} s: see `csvfs status` for its lease and coordinator"
        )
