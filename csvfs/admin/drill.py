"""A drill: programs at work, a fault, and the judgement of what the programs saw. `csvfs drill` runs it.

Place      admin floor, over drill_ground.py, drill_faults.py, drill_judge.py. Plain functions; they block.
A round    1. all is healthy; 2. programs begin, on the node that is to suffer too where the drill promises something
           there; 3. the fault; 4. all is healthy again by itself; 5. programs end; 6. another node reads everything back;
           7. the judge. What a round wrote is removed; the logs of one that does not hold are kept and named.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from csvfs.admin.drill_faults import inflict, inflict_on_cluster, undo
from csvfs.admin.drill_ground import ClusterGround, Ground, LabGround, Programs
from csvfs.admin.drill_history import Operation, count_acknowledged
from csvfs.admin.drill_judge import Verdict, judge
from csvfs.admin.drill_pauses import Pause, Timeline, pauses_of, timeline_of
from csvfs.admin.drill_plans import AT_VICTIM, ELSEWHERE, ON_CLUSTER, ROLLING, Case, Drill, cases_of
from csvfs.errors import BadRequest, CsvfsError

WARM_S = 2.0  # before the fault
SETTLE_S = 2.0  # behind it, before anybody asks how the cluster is: that costs the machine something
VIOLATIONS_SAID = 20
WORKER, WORKER_AT_VICTIM, WATCHER, WATCHER_AT_VICTIM = "other", "victim", "watch", "watch-victim"

Say = Callable[[str], None]


@dataclass(slots=True)
class Round:
    """What came of one case."""

    drill: str
    title: str
    victim: str
    held: bool = False
    failure: str = ""  # the round itself could not be finished
    violations: list[str] = field(default_factory=list)  # at most VIOLATIONS_SAID
    violation_count: int = 0
    pauses: dict[str, dict[str, Pause]] = field(default_factory=dict)  # ELSEWHERE, AT_VICTIM -> group -> pause
    operations: int = 0
    acknowledged: int = 0  # changes
    fsynced: int = 0  # of these, behind an fsync
    healthy_after_s: float = 0.0  # from the end of the fault
    timelines: dict[str, Timeline] = field(default_factory=dict)  # as the pauses, by where
    load: float = 0.0  # of the machine, behind the fault
    logs: str = ""  # kept, because it did not hold


def run_drill(
    ground: LabGround | ClusterGround, drill: Drill, repeat: int, say: Say, done: Callable[[Round], None]
) -> list[Round]:
    """Run one drill `repeat` times; `done` gets each round as soon as it is over.

    Raises   BadRequest: this drill cannot run here. KeyboardInterrupt: what was broken is mended first.
    """
    check_possible(ground, drill)
    rounds = []
    for turn in range(repeat):
        for make_case in _cases(ground, drill, turn):
            ground.wait_healthy()
            case = make_case()
            say(f"{case.title}, {turn + 1} of {repeat}: {case.victim}")
            with _mended(ground):
                rounds.append(run_case(ground, case))
            done(rounds[-1])
    return rounds


def check_possible(ground: Ground, drill: Drill) -> None:
    """Raises BadRequest."""
    if isinstance(ground, ClusterGround):
        if drill.name not in ON_CLUSTER:
            can = "; ".join(f"{name}: {what}" for name, what in ON_CLUSTER.items())
            raise BadRequest(f"drill {drill.name} needs a lab: csvfs has no command for it. On a cluster: {can}")
        if len(ground.all_nodes) < 2:
            raise BadRequest("this cluster has one node only: nothing could take over")
    elif isinstance(ground, LabGround) and drill.needs_etcd and not ground.has_etcd:
        raise BadRequest(
            f"drill {drill.name} does not apply: the embedded store of this lab is a file and has no members;"
            " csvfs lab up --store etcd"
        )


def _cases(ground: LabGround | ClusterGround, drill: Drill, turn: int) -> list[Callable[[], Case]]:
    if isinstance(ground, LabGround):
        return cases_of(drill, ground.nodes, ground.coordinator, turn, has_etcd=ground.has_etcd)
    others = [node for node in ground.all_nodes if node != ground.here]
    if drill.name == ROLLING:
        return [lambda node=node: Case(drill.name, "", node, (ground.here,), False) for node in others]  # type: ignore[misc]

    def move() -> Case:
        owner = ground.coordinator()
        targets = tuple(node for node in ground.all_nodes if node != owner)
        return Case(drill.name, "", owner, targets, False)

    return [move]


@contextlib.contextmanager
def _mended(ground: Ground) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if isinstance(ground, LabGround):
            undo(ground)
        raise


def run_case(ground: LabGround | ClusterGround, case: Case) -> Round:
    """One round. Raises CsvfsError only for what went wrong before the fault."""
    round_ = Round(case.drill, case.title, case.victim)
    places = _places(ground, case)
    programs = Programs(ground)
    marks: list[tuple[int, str]] = []
    try:
        _start(programs, places)
        time.sleep(WARM_S)
        try:
            _break(ground, case, lambda what: marks.append((time.monotonic_ns(), what)))
            broken_until = time.monotonic()
            time.sleep(SETTLE_S)
            round_.load = os.getloadavg()[0]
            ground.wait_healthy()
            round_.healthy_after_s = time.monotonic() - broken_until
        except CsvfsError as error:
            round_.failure = str(error)
            if isinstance(ground, LabGround):
                undo(ground)
        ended_ns = programs.stop()
        programs.read_back(_reader(ground, case), [name for name, (_, kind) in places.items() if kind == "work"])
        _sum_up(round_, case, programs.operations(), marks, ended_ns)
    except BaseException:
        programs.kill()
        programs.remove(_reader(ground, case))
        raise
    if round_.held:
        programs.remove(_reader(ground, case))
    else:
        round_.logs = str(programs.logs)
    return round_


def _places(ground: Ground, case: Case) -> dict[str, tuple[str, str]]:
    """Program -> its node, what it does."""
    if isinstance(ground, ClusterGround):
        return {WORKER: (ground.here, "work")}
    places = {WORKER: (case.others[0], "work")}
    if len(case.others) > 1:
        places[WATCHER] = (case.others[-1], "watch")
    if case.at_victim:
        places[WORKER_AT_VICTIM] = (case.victim, "work")
        places[WATCHER_AT_VICTIM] = (case.victim, "watch")
    return places


def _reader(ground: Ground, case: Case) -> str:
    return ground.here if isinstance(ground, ClusterGround) else case.others[-1]


def _start(programs: Programs, places: dict[str, tuple[str, str]]) -> None:
    for kind in ("work", "watch"):  # there must be something to watch
        names = [name for name, (_, does) in places.items() if does == kind]
        for name in names:
            programs.start(places[name][0], kind, name, *([WORKER] if kind == "watch" else []))
        programs.wait_ready(names)


def _break(ground: LabGround | ClusterGround, case: Case, mark: Callable[[str], None]) -> None:
    if isinstance(ground, LabGround):
        inflict(ground, case, mark)
    else:
        inflict_on_cluster(ground, case, mark)


def _sum_up(
    round_: Round, case: Case, operations: list[Operation], marks: list[tuple[int, str]], ended_ns: int
) -> None:
    at_victim = {WORKER_AT_VICTIM, WATCHER_AT_VICTIM}
    verdict: Verdict = judge(operations)
    round_.violation_count = len(verdict.violations)
    round_.violations = [str(violation) for violation in verdict.violations[:VIOLATIONS_SAID]]
    round_.operations = len(operations)
    round_.acknowledged, round_.fsynced = count_acknowledged(operations)
    if marks:
        groups = {ELSEWHERE: [o for o in operations if o.program not in at_victim]}
        if case.at_victim:
            groups[AT_VICTIM] = [o for o in operations if o.program in at_victim]
        round_.pauses = {where: pauses_of(of_them, marks[0][0], ended_ns) for where, of_them in groups.items()}
        round_.timelines = {where: timeline_of(of_them, marks, ended_ns) for where, of_them in groups.items()}
    round_.held = verdict.is_good and not round_.failure
