"""Job record: what a volume's storage jobs must remember beyond a coordinator's life (`jobs/<volume>`).

Place      coordinator floor, over store/. What there is to do follows from the slabs; here stands only what
           does not: what is paused, how fast, how large each job was when it began, how long drives have been
           away, and over which drives the volume has been balanced.
Writer     the volume's coordinator alone, under its term.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from csvfs.block.pace import SPEED_DEFAULT, SPEEDS
from csvfs.errors import BadRequest, Conflict, NotCoordinator
from csvfs.ids import DriveId, Term
from csvfs.store.interface import ClusterStore, Compare, Put
from csvfs.wire.control import pack_value, unpack_value

KINDS = ("repair", "evacuate", "rebalance", "copies", "scrub")
CAS_TRIES_MAX = 10


@dataclass(slots=True, frozen=True)
class JobFacts:
    """The record. `totals`: bytes, by job. `balanced`: None: never looked at yet."""

    paused: frozenset[str] = frozenset()
    speed: int | None = None  # index into SPEEDS; None: as the node's options say
    totals: dict[str, int] = field(default_factory=dict)
    away_ms: dict[DriveId, int] = field(default_factory=dict)
    balanced: frozenset[DriveId] | None = None

    def to_value(self) -> dict[str, Any]:
        return {
            "paused": sorted(self.paused),
            "speed": None if self.speed is None else SPEEDS[self.speed],
            "totals": self.totals,
            "away_ms": {drive.hex(): away_ms for drive, away_ms in self.away_ms.items()},
            "balanced": None if self.balanced is None else sorted(self.balanced),
        }

    @staticmethod
    def from_value(value: Any) -> "JobFacts":
        """Whatever is malformed is as good as absent: nothing here is needed to keep data."""
        value = value if isinstance(value, dict) else {}
        balanced = value.get("balanced")
        speed = value.get("speed")
        return JobFacts(
            frozenset(kind for kind in _list(value.get("paused")) if kind in KINDS),
            SPEEDS.index(speed) if speed in SPEEDS else None,
            {str(k): v for k, v in _items(value.get("totals")) if isinstance(v, int)},
            {DriveId(bytes.fromhex(k)): v for k, v in _items(value.get("away_ms")) if _is_drive_and_ms(k, v)},
            None
            if balanced is None
            else frozenset(DriveId(d) for d in _list(balanced) if isinstance(d, bytes)),
        )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    return value.items() if isinstance(value, dict) else ()


def _is_drive_and_ms(key: Any, value: Any) -> bool:
    try:
        return len(bytes.fromhex(key)) == 16 and isinstance(value, int) and value >= 0
    except (TypeError, ValueError):
        return False


class JobRecord:
    """`facts` is what is committed. Changes by compare-and-swap under the coordinator's term."""

    def __init__(
        self, store: ClusterStore, volume_name: str, term: Term, speed_default: int = SPEED_DEFAULT
    ) -> None:
        self._store = store
        self._volume = volume_name
        self._term = term
        self._speed_default = speed_default
        self._changing = trio.Lock()
        self.facts = JobFacts()
        self.on_change: Callable[[], None] = lambda: None

    @property
    def speed(self) -> int:
        """Index into SPEEDS."""
        return self._speed_default if self.facts.speed is None else self.facts.speed

    def is_paused(self, kind: str) -> bool:
        return kind in self.facts.paused

    async def load(self) -> None:
        """Raises Unavailable."""
        item = await self._store.get(f"jobs/{self._volume}")
        self.facts = JobFacts.from_value(None if item is None else unpack_value(item.value))

    async def change(self, change: Callable[[JobFacts], JobFacts]) -> None:
        """Raises Unavailable, NotCoordinator (the term is over), Conflict. Cancel: it may have been done."""
        key, term_key = f"jobs/{self._volume}", f"term/{self._volume}"
        async with self._changing:
            for _ in range(CAS_TRIES_MAX):
                term, item = await self._store.get(term_key), await self._store.get(key)
                if term is None or unpack_value(term.value).get("term") != self._term:
                    raise NotCoordinator(f"term {self._term} of volume {self._volume} is over")
                known = JobFacts.from_value(None if item is None else unpack_value(item.value))
                facts = change(known)
                compares = [Compare(term_key, term.revision), Compare(key, item.revision if item else 0)]
                put = Put(key, pack_value(facts.to_value()))
                if facts == known or (await self._store.transact(compares, [put])).succeeded:
                    self.facts = facts
                    self.on_change()
                    return
        raise Conflict(f"{key} changed {CAS_TRIES_MAX} times while it was being changed here")

    async def control(self, action: str, kind: str | None, speed: str | None) -> dict[str, Any]:
        """The call `job_control`. Raises BadRequest, and as `change`."""
        if action in ("pause", "resume"):
            kinds = _kinds(kind)
            if action == "pause":
                await self.change(lambda facts: replace(facts, paused=facts.paused | kinds))
            else:
                await self.change(lambda facts: replace(facts, paused=facts.paused - kinds))
        elif action == "speed":
            if speed not in SPEEDS:
                raise BadRequest(f"{speed!r} is no speed; there are: {', '.join(SPEEDS)}")
            index = SPEEDS.index(speed)
            await self.change(lambda facts: replace(facts, speed=index))
        elif action == "optimize":
            await self.change(lambda facts: replace(facts, balanced=frozenset()))
        else:
            raise BadRequest(f"{action!r} cannot be done with jobs; use pause, resume, speed or optimize")
        return {"paused": sorted(self.facts.paused), "speed": SPEEDS[self.speed]}


def _kinds(kind: str | None) -> frozenset[str]:
    if kind is not None and kind not in KINDS:
        raise BadRequest(f"{kind!r} is no kind of job; there are: {', '.join(KINDS)}")
    return frozenset(KINDS if kind is None else (kind,))
