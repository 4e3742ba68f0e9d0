"""The drills: what each breaks, where its programs run, and what it promises them. Pure.

Place      admin floor, below drill.py and drill_faults.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from csvfs.errors import BadRequest

COORDINATOR, NODE, DRIVE, PARTITION = "coordinator", "node", "drive", "partition"
MOUNT, STORE, ROLLING, FREEZE = "mount", "store", "rolling", "freeze"

AT_VICTIM, ELSEWHERE = "at fault", "elsewhere"  # where a program runs


@dataclass(slots=True, frozen=True)
class Case:
    """One way in which a drill breaks something: `victim` is the node that it happens to."""

    drill: str
    name: str  # of the variant; empty: there is one only
    victim: str
    others: tuple[str, ...]  # nodes on which programs are promised to see no more than a pause
    at_victim: bool  # whether programs run on the victim too
    seconds: float = 0.0  # how long it lasts; 0: as long as drill_faults.py has it last

    @property
    def title(self) -> str:
        return f"{self.drill} {self.name}".strip()


@dataclass(slots=True, frozen=True)
class Drill:
    """`goal_ms`: how long programs may wait at most; None: as long as the fault lasts."""

    name: str
    what: str
    goal_ms: float | None
    variants: tuple[str, ...] = ("",)
    at_victim: bool = False
    needs_etcd: bool = False
    seconds: float = 0.0  # see Case


FREEZE_S = 10.0
STORE_ROLE = "store"  # only where the store is etcd
WHOLE_NODE = "everything"  # all processes of a node at once: nobody is left who could replace them
FROZEN = ("drives", "coordinator", "mount", "node", STORE_ROLE, WHOLE_NODE)

DRILLS = {
    drill.name: drill
    for drill in (
        Drill(COORDINATOR, "kill -9 of the coordinator process", 1000, at_victim=True),
        Drill(NODE, "a node loses its power, the coordinator's own every other time, and comes back", 5000),
        Drill(DRIVE, "kill -9 of a drive server", 1000, at_victim=True),
        Drill(PARTITION, "a node is cut off, the coordinator's own every other time, and comes back", None, at_victim=True),
        Drill(MOUNT, "kill -9 of a mount process", 1000, at_victim=True),
        Drill(
            STORE, "members of the cluster store (etcd) are killed: one, the leader, the majority", None,
            ("member", "leader", "majority"), at_victim=True, needs_etcd=True,
        ),
        Drill(ROLLING, "every node in turn is drained, stopped, started and taken back", None),
        Drill(
            FREEZE, "SIGSTOP of a process of each KIND, or of one, then SIGCONT", None, FROZEN, at_victim=True,
            seconds=FREEZE_S,
        ),
    )
}  # fmt: skip
ALL = (COORDINATOR, MOUNT, DRIVE, NODE, PARTITION, STORE, ROLLING, FREEZE)

ON_CLUSTER = {
    COORDINATOR: "the volume is moved to another node and back (csvfs volume move)",
    ROLLING: "every other node in turn is drained and taken back (csvfs node drain, resume); none is stopped",
}


def narrowed(drill: Drill, kind: str | None, seconds: float | None) -> Drill:
    """A drill of one kind of processes only, and for so long; None: as it is. Raises BadRequest: only freeze has kinds."""
    if drill.name != FREEZE:
        if kind is not None or seconds is not None:
            raise BadRequest(f"KIND and --seconds belong to drill {FREEZE}, not to {drill.name}")
        return drill
    if kind is None:
        return replace(drill, seconds=seconds or drill.seconds)
    return replace(drill, variants=(kind,), seconds=seconds or drill.seconds, needs_etcd=kind == STORE_ROLE)


def cases_of(
    drill: Drill, nodes: Sequence[str], coordinator: Callable[[], str], turn: int, *, has_etcd: bool
) -> list[Callable[[], Case]]:
    """The cases of repeat number `turn`, each to be asked for when it is its turn: the coordinator may have moved."""
    if drill.name == ROLLING:
        return [lambda node=node: _case(drill, "", node, nodes) for node in nodes]  # type: ignore[misc]
    variants = [name for name in drill.variants if has_etcd or drill.name != FREEZE or name != STORE_ROLE]
    cases: list[Callable[[], Case]] = []
    for number, variant in enumerate(variants):
        cases.append(lambda variant=variant, number=number: _case(  # type: ignore[misc]
            drill, variant, _victim(drill, variant, nodes, coordinator(), turn + number), nodes
        ))  # fmt: skip
    return cases


def _victim(drill: Drill, variant: str, nodes: Sequence[str], coordinator: str, turn: int) -> str:
    if drill.name == COORDINATOR or variant in (COORDINATOR, WHOLE_NODE):
        return coordinator
    if drill.name in (NODE, PARTITION):
        others = [node for node in nodes if node != coordinator]
        return coordinator if turn % 2 == 0 else others[turn // 2 % len(others)]
    return nodes[turn % len(nodes)]


def _case(drill: Drill, variant: str, victim: str, nodes: Sequence[str]) -> Case:
    others = tuple(node for node in nodes if node != victim)
    # While all of a node stands still its kernel shows what it has cached (ARCHITECTURE.md, "Limits of the design").
    at_victim = drill.at_victim and variant != WHOLE_NODE
    return Case(drill.name, variant, victim, others, at_victim, drill.seconds)
