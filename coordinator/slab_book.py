"""Slab books: where descriptors of slabs are committed. One for data slabs, one for metadata slabs.

Place      coordinator floor; below slab_changes.py, which is the same for both.

Invariants
  I1  A descriptor changes only by `change`: a transition of block/slab_state.py applied to the committed one,
      in one transaction, durable when the call returns.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Protocol

import trio

from coordinator.metadata import Metadata
from csvfs.errors import Conflict, Corrupt, CsvfsError, NotCoordinator, NotFound, ProtocolError
from csvfs.ids import SlabId, Term
from csvfs.store.interface import ClusterStore, Compare, Item, Put
from csvfs.wire.block_messages import SlabDescriptor
from csvfs.wire.control import pack_value, unpack_value

Transition = Callable[[SlabDescriptor], SlabDescriptor]  # returning its argument changes nothing
Outcome = dict[SlabId, SlabDescriptor | CsvfsError]
CAS_TRIES_MAX = 20


class SlabBook(Protocol):
    """Committed descriptors of one kind of slab."""

    def current(self, slab: SlabId) -> SlabDescriptor:
        """Raises NotFound."""
        ...

    def all(self) -> Iterator[SlabDescriptor]:
        """By number. The book may change while it is read."""
        ...

    async def change(self, slabs: Iterable[SlabId], transition: Transition) -> Outcome:
        """Apply `transition` to each slab, all in one transaction; those for which it raises stay as they
        are.

        Returns  per slab its committed descriptor, or what the transition raised.
        Raises   what ends the coordinator; then nothing is known.
        """
        ...

    async def wait_durable(self) -> None:
        """Until what `current` said before the call cannot un-happen any more, not even by a power cut of all nodes.

        Raises   what a flush raises: nothing is known.
        """
        ...


class DataBook:
    """Data slabs: rows of the volume's metadata database."""

    def __init__(
        self,
        metadata: Metadata,
        run: Callable[[Callable[[], Outcome]], Awaitable[Outcome]],
        wait_durable: Callable[[], Awaitable[None]],
    ) -> None:
        """`run` executes a change in a batch and returns when it is durable."""
        self._metadata = metadata
        self._run = run
        self._wait_durable = wait_durable

    def current(self, slab: SlabId) -> SlabDescriptor:
        return self._metadata.slab(slab)

    def all(self) -> Iterator[SlabDescriptor]:
        return self._metadata.slabs()

    async def wait_durable(self) -> None:
        await self._wait_durable()

    async def change(self, slabs: Iterable[SlabId], transition: Transition) -> Outcome:
        wanted = list(slabs)

        def apply() -> Outcome:
            outcome: Outcome = {}
            for slab in wanted:
                try:
                    known = self._metadata.slab(slab)
                    changed = transition(known)
                    if changed is not known:
                        self._metadata.set_slab(changed)
                    outcome[slab] = changed
                except CsvfsError as error:
                    outcome[slab] = error
            return outcome

        return await self._run(apply)


class MetadataBook:
    """Metadata slabs: one key of the cluster store, changed by compare-and-swap under this coordinator's
    term."""

    def __init__(self, store: ClusterStore, volume_name: str, term: Term) -> None:
        self.store = store
        self._key = f"meta/{volume_name}"
        self._term_key = f"term/{volume_name}"
        self._term = term
        self._descriptors: dict[SlabId, SlabDescriptor] = {}
        self._changing = trio.Lock()  # a read that was overtaken by a change would look like a step back

    @property
    def slabs(self) -> list[SlabId]:
        """In the order of their blocks in the metadata's address space."""
        return list(self._descriptors)

    def current(self, slab: SlabId) -> SlabDescriptor:
        descriptor = self._descriptors.get(slab)
        if descriptor is None:
            raise NotFound(f"metadata slab {slab} does not exist")
        return descriptor

    def all(self) -> Iterator[SlabDescriptor]:
        return iter(list(self._descriptors.values()))

    async def wait_durable(self) -> None:
        """`current` knows only what was committed."""

    async def load(self) -> None:
        """Read the key. Raises NotFound, Corrupt, NotCoordinator (the term is over), Unavailable."""
        async with self._changing:
            await self._read()

    async def change(self, slabs: Iterable[SlabId], transition: Transition) -> Outcome:
        async with self._changing:
            return await self._change(list(slabs), transition)

    async def _change(self, wanted: list[SlabId], transition: Transition) -> Outcome:
        for _ in range(CAS_TRIES_MAX):
            term_item, item = await self._read()
            descriptors = dict(self._descriptors)
            outcome: Outcome = {}
            for slab in wanted:
                try:
                    outcome[slab] = descriptors[slab] = transition(self.current(slab))
                except CsvfsError as error:
                    outcome[slab] = error
            if descriptors == self._descriptors or await self._swap(term_item, item, descriptors):
                return outcome
        raise Conflict(f"{self._key} changed {CAS_TRIES_MAX} times while it was being changed here")

    async def add(self, descriptor: SlabDescriptor) -> None:
        """A further metadata slab, whose copies exist on its drives."""
        async with self._changing:
            await self._add(descriptor)

    async def _add(self, descriptor: SlabDescriptor) -> None:
        for _ in range(CAS_TRIES_MAX):
            term_item, item = await self._read()
            if descriptor.slab in self._descriptors:
                return  # an earlier try was committed, and its answer lost
            if await self._swap(term_item, item, {**self._descriptors, descriptor.slab: descriptor}):
                return
        raise Conflict(f"{self._key} changed {CAS_TRIES_MAX} times while a slab was being added")

    async def _read(self) -> tuple[Item, Item]:
        term_item, item = await self.store.get(self._term_key), await self.store.get(self._key)
        if term_item is None or _term_of(term_item) != self._term:
            raise NotCoordinator(
                f"term {self._term} of {self._key} is over: another node coordinates the volume"
            )
        if item is None:
            raise NotFound(f"cluster store key {self._key} does not exist: the volume has no metadata")
        descriptors = parse_descriptors(item)
        for slab, known in self._descriptors.items():
            if slab not in descriptors or descriptors[slab].epoch < known.epoch:
                raise Corrupt(
                    f"cluster store key {self._key} went back in time; was the store restored from a backup?"
                )
        self._descriptors = descriptors
        return term_item, item

    async def _swap(self, term_item: Item, item: Item, descriptors: dict[SlabId, SlabDescriptor]) -> bool:
        compares = [
            Compare(self._term_key, term_item.revision),  # I1: a deposed coordinator changes nothing
            Compare(self._key, item.revision),
        ]
        value = pack_descriptors(descriptors.values())
        if not (await self.store.transact(compares, [Put(self._key, value)])).succeeded:
            return False
        self._descriptors = descriptors
        return True


def pack_descriptors(descriptors: Iterable[SlabDescriptor]) -> bytes:
    """The value of a `meta/<name>` key."""
    return pack_value({"slabs": [descriptor.to_wire() for descriptor in descriptors]})


def parse_descriptors(item: Item) -> dict[SlabId, SlabDescriptor]:
    """Raises Corrupt."""
    try:
        value = unpack_value(item.value)
        parsed = [SlabDescriptor.from_wire(row) for row in value["slabs"]]
    except (ProtocolError, KeyError, TypeError) as error:
        raise Corrupt(
            f"cluster store key {item.key} is damaged: {error}; restore the cluster store"
        ) from None
    if not parsed or len({descriptor.slab for descriptor in parsed}) != len(parsed):
        raise Corrupt(f"cluster store key {item.key} lists {len(parsed)} slabs, none or some twice")
    return {descriptor.slab: descriptor for descriptor in parsed}


def _term_of(item: Item) -> int:
    try:
        return int(unpack_value(item.value)["term"])
    except (ProtocolError, KeyError, TypeError, ValueError):
        raise Corrupt(f"cluster store key {item.key} is damaged; restore the cluster store") from None
