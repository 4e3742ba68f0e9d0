"""File locks for a volume in memory: the coordinator's rules, of one node."""

from dataclasses import dataclass, field
from typing import Any

from coordinator.lock_ranges import FileLock, conflicts, with_lock, without
from csvfs.errors import TooManyLocks


@dataclass
class MemoryLocks:
    """`call_...` of MemoryVolume. A lock that is not free is not waited for: who waits is told ENOLCK."""

    held: dict[int, list[FileLock]] = field(default_factory=dict)

    def _split(self, ino: int, wanted: FileLock) -> tuple[list[FileLock], list[FileLock]]:
        held = self.held.get(ino, [])
        return [lock for lock in held if lock.key == wanted.key], [lock for lock in held if lock.key != wanted.key]

    def call_lock(self, ino: int, wait: bool, token: int = 0, **args: Any) -> dict[str, Any]:
        wanted = _wanted(**args)
        own, others = self._split(ino, wanted)
        if conflicts(others, wanted):
            if wait:
                raise TooManyLocks("nobody waits for locks in memory")
            return {"granted": False}
        self.held[ino] = others + with_lock(own, wanted)
        return {"granted": True}

    def call_unlock(self, ino: int, handle: int | None = None, **args: Any) -> dict[str, Any]:
        if handle is not None:
            self.held[ino] = [lock for lock in self.held.get(ino, []) if lock.handle != handle]
            return {}
        like = _wanted(**args)
        own, others = self._split(ino, like)
        self.held[ino] = others + without(own, like.first, like.last)
        return {}

    def call_getlock(self, ino: int, **args: Any) -> dict[str, Any]:
        found = conflicts(self.held.get(ino, []), _wanted(**args))
        return {"lock": [found[0].exclusive, found[0].first, found[0].last, found[0].pid] if found else None}


def _wanted(
    owner: int, first: int, last: int, flock: bool = False, exclusive: bool = False, pid: int = 0, opened: int = 0
) -> FileLock:
    return FileLock(1, flock, owner, first, last, exclusive, pid, opened)
