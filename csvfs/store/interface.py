"""The cluster store: the small consistent map of who is in the cluster and who owns what.

Place      store floor. One interface, back ends behind it (embedded.py, etcd.py), one conformance suite
           (tests/test_store_conformance.py) for all.
Model      etcd's: keys are text, values bytes; every committed transaction raises `revision` by one; a key has
           the revision of its last change (0: the key does not exist); leases delete their keys when they end.
"""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True, frozen=True)
class Item:
    key: str
    value: bytes
    revision: int  # of its last change
    lease: int  # 0: none


@dataclass(slots=True, frozen=True)
class Compare:
    """Holds iff `key` was last changed at `revision`; 0: iff the key does not exist."""

    key: str
    revision: int


@dataclass(slots=True, frozen=True)
class Put:
    key: str
    value: bytes
    lease: int = 0


@dataclass(slots=True, frozen=True)
class Delete:
    key: str


@dataclass(slots=True, frozen=True)
class TransactionResult:
    succeeded: bool
    revision: int  # of the store after it


@dataclass(slots=True, frozen=True)
class Change:
    """`item` None: the key was deleted."""

    key: str
    item: Item | None
    revision: int


class ClusterStore(Protocol):
    """All methods raise Unavailable when the store cannot be reached or has no majority.

    A transaction that was answered happened once or not at all, as its answer says, whatever got lost on the way.
    One that raised Unavailable may have been committed, or may still be within seconds: who goes on from it reads
    first, and recognises what it has written.

    Cancel  safe at any await; a cancelled transaction may or may not have been committed.
    """

    async def get(self, key: str) -> Item | None: ...

    async def transact(
        self, compares: list[Compare], changes: list[Put | Delete], *, repeatable: bool = False
    ) -> TransactionResult:
        """Apply all changes at once iff all compares hold; else nothing.

        repeatable   Doing it several times does no harm and holds as long as the compares do. So where an answer is
                     lost it is asked again, at once, and several may be under way: then it may be done more than once,
                     or again after it was answered.
        """
        ...

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Unconditional; returns the new revision."""
        ...

    async def delete(self, key: str) -> None: ...

    async def grant_lease(self, ttl_ms: int) -> int:
        """A new lease; ends `ttl_ms` after its grant or last keep_alive, or later: etcd counts whole seconds."""
        ...

    async def keep_alive(self, lease: int) -> None:
        """Raises NotFound when the lease has ended: its keys are gone."""
        ...

    async def revoke_lease(self, lease: int) -> None:
        """End it now, deleting its keys. Unknown leases are no error."""
        ...

    def watch(self, prefix: str) -> AbstractAsyncContextManager[AsyncIterator[list[Change]]]:
        """Changes to keys under `prefix`, from the entry of the context on, in order, none left out.

        A batch may join several transactions and may drop all but the last change of one key. When the
        store cannot be reached the iterator waits, and goes on afterwards with what changed meanwhile.
        """
        ...

    async def close(self) -> None: ...

    # Last, because in the lines below it `list` is this method and no type any more.
    async def list(self, prefix: str) -> list[Item]:
        """Items whose key starts with `prefix`, by key."""
        ...
