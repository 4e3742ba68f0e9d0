"""Volume settings: size, copies and min_copies of a volume in use, as the cluster store has them.

Place      coordinator floor, over store/ and cluster/membership.py; below volume_control.py (which says what may be
           asked for) and service.py (which lets it take effect).
Truth      the key `volumes/<name>`. It is read once the volume was taken over, changed by compare-and-swap under
           the coordinator's term, and followed by watch. A view that is older than what is known here says nothing.

Invariants
  V1   From the moment a smaller size is decided until it is known whether the store has it, nothing is granted
       beyond it (`size_bound`): so whoever reads it in the store finds no more than that in use.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from csvfs.cluster.membership import View
from csvfs.errors import Conflict, Corrupt, CsvfsError, NotCoordinator, NotFound, Unavailable
from csvfs.ids import Term, VolumeId
from csvfs.store.interface import ClusterStore, Compare, Item, Put
from csvfs.wire.control import pack_value, unpack_value

log = logging.getLogger(__name__)

COPIES_MAX = 3
CAS_TRIES_MAX = 10
LOOK_S = 2.0  # a look without occasion


@dataclass(slots=True, frozen=True)
class Settings:
    """What may be changed while the volume is in use. `size`: bytes; 0: as large as the pool."""

    size: int
    copies: int
    min_copies: int

    @staticmethod
    def from_value(value: dict[str, Any]) -> "Settings":
        """Raises Corrupt."""
        size, copies, least = value.get("size") or 0, value.get("copies"), value.get("min_copies")
        if not isinstance(size, int) or size < 0:
            raise Corrupt(f"size {size!r} of a volume is no number of bytes")
        if not isinstance(copies, int) or not 1 <= copies <= COPIES_MAX:
            raise Corrupt(f"{copies!r} copies of a volume: from 1 to {COPIES_MAX}")
        return Settings(size, copies, max(1, least) if isinstance(least, int) else 1)  # as mounts take it

    def to_value(self) -> dict[str, Any]:
        resiliency = "simple" if self.copies == 1 else "mirror"
        numbers = {"size": self.size, "copies": self.copies, "min_copies": self.min_copies}
        return {**numbers, "resiliency": resiliency}

    def differing_from(self, known: "Settings") -> dict[str, Any]:
        """The fields of the store's value that change."""
        before = known.to_value()
        return {name: value for name, value in self.to_value().items() if value != before[name]}


class VolumeSettings:
    """`facts` is what is committed, as far as it is known here. Call `load` first."""

    def __init__(self, store: ClusterStore, name: str, volume: VolumeId, term: Term, view: View) -> None:
        self._store = store
        self.name = name
        self._volume = volume
        self._term = term
        self._view = view
        self._changing = trio.Lock()
        self._revision = 0  # of the store, at which `facts` were the truth
        self._size_asked = 0  # a smaller size that may be in the store already; 0: none
        self.facts = Settings(0, 1, 1)
        self.on_change: Callable[[], None] = lambda: None

    @property
    def size_bound(self) -> int:
        """Bytes that files may have in all; 0: as much as the pool gives (V1)."""
        return min((size for size in (self.facts.size, self._size_asked) if size), default=0)

    async def load(self) -> None:
        """Read the store. Raises Unavailable, NotFound (it was deleted), Corrupt."""
        async with self._changing:
            item = await self._item()
            self._learn(Settings.from_value(unpack_value(item.value)), item.revision)

    async def change(self, change: Callable[[Settings], Settings]) -> Settings:
        """Replace what is in the store by what `change` makes of it; again, if it was changed meanwhile.

        Raises  what `change` raises. NotCoordinator: the term is over. Conflict: it is being deleted, or changed all
                the time. Unavailable: it may have been done; `follow_forever` finds out.
        """
        async with self._changing:
            asked_before = self._size_asked  # of a change that may have been done: only `load` ends that
            try:
                return await self._change(change)
            except Unavailable:
                raise  # whether it was done is not known: V1 holds on
            except CsvfsError:
                self._size_asked = asked_before
                self.on_change()
                raise

    async def _change(self, change: Callable[[Settings], Settings]) -> Settings:
        term_key = f"term/{self.name}"
        for _ in range(CAS_TRIES_MAX):
            term, item = await self._store.get(term_key), await self._item()
            if term is None or unpack_value(term.value).get("term") != self._term:
                raise NotCoordinator(f"term {self._term} of volume {self.name} is over")
            value = unpack_value(item.value)
            if value.get("state") != "online":
                raise Conflict(f"volume {self.name} is {value.get('state')}: nothing of it can be changed")
            known = Settings.from_value(value)
            settings = change(known)
            compares = [Compare(term_key, term.revision), Compare(item.key, item.revision)]
            put = Put(item.key, pack_value({**value, **settings.differing_from(known)}), item.lease)
            result = await self._store.transact(compares, [put])
            if result.succeeded:
                self._learn(settings, result.revision)
                return settings
        raise Conflict(f"volume {self.name} is being changed by others all the time: try again")

    def bound_size(self, size: int) -> None:
        """Grant nothing beyond `size` bytes from now on (V1); to be called by the `change` that asks for it."""
        self._size_asked = min(size, self._size_asked or size)
        self.on_change()

    def _learn(self, settings: Settings, revision: int) -> None:
        self.facts, self._revision, self._size_asked = settings, revision, 0
        self.on_change()

    async def _item(self) -> Item:
        item = await self._store.get(f"volumes/{self.name}")
        if item is None or unpack_value(item.value).get("id") != self._volume:
            raise NotFound(f"volume {self.name} was deleted")
        return item

    async def follow_forever(self) -> None:
        """Take over what somebody else writes into the store."""
        while True:
            try:
                if self._size_asked and not self._changing.locked():
                    await self.load()
                self._look()
            except CsvfsError as error:
                log.warning("volume %s: what its key says is not known: %s", self.name, error)
            with trio.move_on_after(LOOK_S):
                await self._view.wait_changed()

    def _look(self) -> None:
        value = self._view.volumes.get(self.name)
        if value is None or value.get("id") != self._volume or self._view.revision < self._revision:
            return
        if self._changing.locked():
            return  # it will know better
        settings = Settings.from_value(value)
        if settings != self.facts:
            log.info("volume %s: %s", self.name, settings)
            self.facts = settings
            self.on_change()
