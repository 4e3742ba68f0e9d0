"""Certificates that are not taken any more: the keys `revoked/<serial hex>`, and who follows them.

Place      store floor. Written by admin/node_evict.py; every process that takes or makes connections follows them.
"""

import logging
from collections.abc import Callable

import trio

from csvfs.errors import Unavailable
from csvfs.store.interface import ClusterStore

log = logging.getLogger(__name__)

REVOKED = "revoked/"
RETRY_S = 1.0


def revoked_key(serial: int) -> str:
    return f"{REVOKED}{serial:x}"


async def revoked_serials(store: ClusterStore) -> list[int]:
    """Of certificates that are not taken any more. A key that is no number is left out: it revokes nothing."""
    names = [item.key.removeprefix(REVOKED) for item in await store.list(REVOKED)]
    return [int(name, 16) for name in names if name and all(letter in "0123456789abcdef" for letter in name)]


async def follow_revoked_forever(
    store: ClusterStore,
    tell: Callable[[list[int]], object],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Call `tell` with all serial numbers, now and after every change, until cancelled. Started after the first time.

    While the store cannot be reached, what was told last stays: nobody is let in again by an outage.
    """
    started = False
    while True:
        try:
            async with store.watch(REVOKED) as changes:
                tell(await revoked_serials(store))
                if not started:
                    started = True
                    task_status.started()
                async for _ in changes:
                    tell(await revoked_serials(store))
        except Unavailable as error:
            log.warning("whose certificates are revoked cannot be read: %s", error)
            await trio.sleep(RETRY_S)
