"""Locks of one file: what excludes what, what a change of a range leaves, and who waits for whom in a circle.

Place      coordinator floor. Pure.
Kinds      POSIX locks (fcntl: ranges of bytes) and flock locks (whole files) of one file do not know each other.
Owner      who holds a lock: a session and a number of that node's kernel, a process for POSIX locks, an open file for
           flock and OFD locks. What it holds never stands in its own way.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

LOCK_END = (1 << 63) - 1  # the last byte that there can be: "to the end, wherever that is"

OwnerKey = tuple[int, bool, int]  # session, flock, owner


@dataclass(slots=True, frozen=True)
class FileLock:
    """Bytes first to last. `handle`: of the open file it was taken through. `pid`: for F_GETLK on its node."""

    session: int
    flock: bool
    owner: int
    first: int
    last: int
    exclusive: bool
    pid: int
    handle: int

    @property
    def key(self) -> OwnerKey:
        return self.session, self.flock, self.owner


def conflicts(held: Iterable[FileLock], wanted: FileLock) -> list[FileLock]:
    """What of others stands in the way."""
    return [
        lock
        for lock in held
        if lock.flock == wanted.flock
        and lock.first <= wanted.last
        and wanted.first <= lock.last
        and (lock.exclusive or wanted.exclusive)
        and lock.key != wanted.key
    ]


def without(own: Iterable[FileLock], first: int, last: int) -> list[FileLock]:
    """Locks of one owner after these bytes were unlocked, in order."""
    left: list[FileLock] = []
    for lock in own:
        if lock.first < first:
            left.append(replace(lock, last=min(lock.last, first - 1)))
        if lock.last > last:
            left.append(replace(lock, first=max(lock.first, last + 1)))
    return sorted(left, key=lambda lock: lock.first)


def with_lock(own: Iterable[FileLock], wanted: FileLock) -> list[FileLock]:
    """Locks of one owner after it got another: that replaces what it had there; like neighbours become one."""
    merged: list[FileLock] = []
    for lock in sorted([*without(own, wanted.first, wanted.last), wanted], key=lambda lock: lock.first):
        if merged and merged[-1].last + 1 == lock.first and merged[-1].exclusive == lock.exclusive:
            merged[-1] = replace(lock, first=merged[-1].first)
        else:
            merged.append(lock)
    return merged


def is_deadlock(wanting: OwnerKey, blockers: list[OwnerKey], blockers_of: Callable[[OwnerKey], list[OwnerKey]]) -> bool:
    """Whether somebody whom `wanting` would wait for waits for it. blockers_of: of an owner that waits; else empty."""
    seen: set[OwnerKey] = set()
    due = list(blockers)
    while due:
        owner = due.pop()
        if owner == wanting:
            return True
        if owner not in seen:
            seen.add(owner)
            due.extend(blockers_of(owner))
    return False
