"""What tools/bench_scale measured, and how it is shown. Pure.

Place      tests, under scale.py.
Growth     how long the last tenth of a step's operations took, by the first tenth: 1 where the cost of one does not grow
           with how many there are. Steps of little time say little.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from csvfs.units import MIB


@dataclass(slots=True, frozen=True)
class Usage:
    """Of one process. Bytes resident now, and at most since the step began; seconds of processor time since then."""

    node: str
    role: str
    resident: int
    peak: int
    cpu_s: float


@dataclass(slots=True)
class Step:
    """One step: `count` operations of `what` on `node`, with `entries` files or extents there."""

    ground: str  # directory, tree, sparse file
    entries: int
    what: str
    node: str
    count: int
    seconds: float
    tenths: list[float] = field(default_factory=list)
    usage: list[Usage] = field(default_factory=list)
    metadata: int = 0  # bytes of the volume's metadata slabs
    load: float = 0.0
    note: str = ""

    @property
    def micros(self) -> float:
        """Of one operation."""
        return self.seconds / max(self.count, 1) * 1e6

    @property
    def growth(self) -> float | None:
        """None: nothing to compare."""
        return self.tenths[-1] / self.tenths[0] if self.tenths and self.tenths[0] > 0 else None

    def peak(self, role: str) -> int:
        """The largest process of a role."""
        return max((row.peak for row in self.usage if row.role == role), default=0)

    def cpu_micros(self, role: str | None = None) -> float:
        """Processor time of one operation, of all processes of a role, or of all of csvfs. It does not depend on who else
        wants the machine."""
        return sum(row.cpu_s for row in self.usage if role in (None, row.role)) / max(self.count, 1) * 1e6

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"micros": self.micros, "cpu_micros": self.cpu_micros(), "growth": self.growth}


def rows_of(steps: list[Step]) -> list[tuple[Any, ...]]:
    """For a table, a row per step."""
    return [
        (
            f"{step.entries:,}", step.what, step.node, f"{step.count:,}", f"{step.seconds:.1f} s",
            f"{step.micros:,.0f}", f"{step.cpu_micros():,.0f}", "-" if step.growth is None else f"{step.growth:.2f}",
            *(f"{step.peak(role) / MIB:.0f}" for role in ("mount", "coordinator", "drives")),
        )
        for step in steps
    ]  # fmt: skip


HEAD = (
    ">ENTRIES", "STEP", "NODE", ">COUNT", ">TIME", ">US", ">CPU US", ">GROWTH", ">MOUNT MiB", ">COORD MiB", ">DRIVES MiB",
)  # fmt: skip


def summary_of(steps: list[Step]) -> list[tuple[str, ...]]:
    """Microseconds of an operation, and of processor time, by how many there are: (what, for each number of entries ...),
    head first."""
    sizes = sorted({step.entries for step in steps})
    kinds = list(dict.fromkeys((step.ground, step.what) for step in steps))
    rows = [("", *(f"{size:,}" for size in sizes))]
    for ground, what in kinds:
        found = {s.entries: f"{s.micros:,.0f} ({s.cpu_micros():,.0f})" for s in steps if (s.ground, s.what) == (ground, what)}
        rows.append((f"{ground}: {what}", *(found.get(size, "-") for size in sizes)))
    return rows


def progress(row: dict[str, Any], elapsed_s: float) -> str:
    """What a step says of itself once a second."""
    done, of = row["done"], row["of"]
    rate = done / max(elapsed_s, 0.001)
    eta = f"{(of - done) / rate:.0f} s" if rate > 0 else "?"
    return f"{done:,} of {of:,}, {rate:,.0f}/s, {eta} left"
