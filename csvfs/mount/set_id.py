"""Set-uid and set-gid bits that have to go before a program writes to a file.

Place      mount floor; between channel.py and the file table.
Why        For buffered writes the kernel clears them itself, by a SETATTR before. For direct ones it only says in
           the WRITE that its caller may not keep them (FUSE_WRITE_KILL_SUIDGID): the bits vouch for content that
           somebody else is about to change. The mount is nosuid, but files are copied elsewhere with their modes.
Cost       of a write: one look at the mode that is known under the write lease. Files with such bits are rare.
"""

import stat
from collections.abc import Awaitable, Callable
from typing import Protocol

from csvfs.mount.file_state import MODE
from csvfs.mount.leases import Coordinator, Leases


class AttributeNotifier(Protocol):
    def invalidate_attr(self, ino: int) -> bool: ...


def mode_after_write(mode: int) -> int:
    """As Linux does for callers without CAP_FSETID: set-uid goes, and set-gid where it means running as the group."""
    kept = mode & ~stat.S_ISUID
    return kept & ~stat.S_ISGID if mode & stat.S_IXGRP else kept


class SetId:
    def __init__(
        self,
        leases: Leases,
        coordinator: Coordinator,
        notifier: AttributeNotifier,
        getattr: Callable[[int], Awaitable[list]],
    ) -> None:
        self._leases = leases
        self._coordinator = coordinator
        self._notifier = notifier
        self._getattr = getattr

    def is_due(self, ino: int) -> bool:
        """Whether `clear` has to come before a write; also where the mode is not known."""
        state = self._leases.states.get(ino)
        if state is None or state.attr is None or state.stale:
            return True
        mode: int = state.attr[MODE]
        return mode & (stat.S_ISUID | stat.S_ISGID) != 0 and mode_after_write(mode) != mode

    async def clear(self, ino: int) -> None:
        """Returns when the bits are gone at the coordinator. Raises, Cancel: as a call to it."""
        mode: int = (await self._getattr(ino))[MODE]
        wanted = mode_after_write(mode)
        if wanted == mode:
            return
        asked = self._leases.stamp()
        reply = await self._coordinator.call("setattr", {"ino": ino, "mode": stat.S_IMODE(wanted)})
        self._leases.granted(ino, reply["lease"], reply["attr"], asked, True)
        self._notifier.invalidate_attr(ino)
