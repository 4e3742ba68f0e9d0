"""What drills do to a lab, step by step; each step is marked with its time.

Place      admin floor, over lab.py; drill.py calls `inflict` from a plain thread.
"""

import os
import signal
import time
from collections.abc import Callable

import trio

from csvfs.admin import drill_plans as plans
from csvfs.admin import lab
from csvfs.admin.drill_ground import ClusterGround, LabGround
from csvfs.admin.drill_plans import Case
from csvfs.admin.lab_files import PORT_BASE
from csvfs.admin.lab_network import run_in_netns
from csvfs.admin.lab_processes import ROLE_NODE, Process, lab_processes, node_pid
from csvfs.admin.lab_store import member_hosts
from csvfs.config import STORE_PORT
from csvfs.errors import CsvfsError, NotFound, TimedOut
from csvfs.store.etcd_client import EtcdClient
from csvfs.store.etcd_http import Endpoint
from csvfs.store.etcd_place import EtcdPlace

POWER_OFF_S = 8.0  # longer than a node's lease and all that follows from its end
PARTITION_S = 10.0
WAKE_APART_S = 0.1
NO_MAJORITY_S = 6.0  # longer than a node's lease
STOP_WITHIN_S = 60.0
DRAIN_TIMEOUT_S = 180.0

Mark = Callable[[str], None]


def inflict(ground: LabGround, case: Case, mark: Mark) -> None:
    """Do what the case says; returns when everything runs again, as far as it can be told at once. Raises CsvfsError."""
    steps: dict[str, Callable[[LabGround, Case, Mark], None]] = {
        plans.COORDINATOR: _kill("coordinator"),
        plans.DRIVE: _kill("drives"),
        plans.MOUNT: _kill("mount"),
        plans.NODE: _power_off,
        plans.PARTITION: _partition,
        plans.STORE: _kill_store,
        plans.ROLLING: _maintain,
        plans.FREEZE: _freeze,
    }
    steps[case.drill](ground, case, mark)


def undo(ground: LabGround) -> None:
    """After an interruption: nothing stays frozen, cut off, drained or down."""
    lab.lab_heal(ground.directory)
    for process in lab_processes(ground.files, ground.files.nodes()):
        _signal(process.pid, signal.SIGCONT)
    for node in ground.nodes:
        lab.lab_start(ground.directory, node)
    for node in ground.nodes:
        ground.csvfs(node, "node", "resume", node)


def _kill(role: str) -> Callable[[LabGround, Case, Mark], None]:
    def kill(ground: LabGround, case: Case, mark: Mark) -> None:
        mark(f"{role} of {case.victim} killed")
        lab.lab_kill(ground.directory, case.victim, role)

    return kill


def _power_off(ground: LabGround, case: Case, mark: Mark) -> None:
    mark(f"{case.victim} without power")
    lab.lab_kill(ground.directory, case.victim)
    time.sleep(POWER_OFF_S)
    mark(f"{case.victim} started")
    lab.lab_start(ground.directory, case.victim)


def _partition(ground: LabGround, case: Case, mark: Mark) -> None:
    mark(f"{case.victim} cut off")
    lab.lab_partition(ground.directory, case.victim)
    time.sleep(PARTITION_S)
    mark("healed")
    lab.lab_heal(ground.directory)


def _maintain(ground: LabGround, case: Case, mark: Mark) -> None:
    mark(f"{case.victim} drained")
    ground.csvfs(case.others[0], "node", "drain", case.victim, timeout_s=DRAIN_TIMEOUT_S)
    mark(f"{case.victim} stopped")
    _stop_node(ground, case.victim)
    mark(f"{case.victim} started")
    lab.lab_start(ground.directory, case.victim)
    mark(f"{case.victim} taken back")
    ground.csvfs(case.others[0], "node", "resume", case.victim)


def _stop_node(ground: LabGround, name: str) -> None:
    """As `systemctl stop` does, and wait for the end."""
    node = ground.files.node_named(name)
    pid = node_pid(ground.files, node)
    if pid is None:
        raise NotFound(f"node {name} runs no `csvfs node run` that could be stopped")
    _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_WITHIN_S
    while node_pid(ground.files, node) is not None:
        if time.monotonic() > deadline:
            raise TimedOut(f"node {name} does not stop within {STOP_WITHIN_S:.0f} s; see {node.log}")
        time.sleep(0.05)


def _freeze(ground: LabGround, case: Case, mark: Mark) -> None:
    kinds = list(plans.FROZEN[:-1]) if case.name == plans.WHOLE_NODE else [case.name]
    # The parent first, so that it replaces nobody. It goes on last: what wakes up before believes that it still has
    # all that it had.
    kinds.sort(key=lambda kind: kind != ROLE_NODE)
    pids = [process.pid for kind in kinds for process in _processes(ground, case.victim, kind)]
    if not pids:
        raise NotFound(f"node {case.victim} runs no {case.name} that could be frozen")
    mark(f"{case.name} of {case.victim} frozen")
    try:
        for pid in pids:
            _signal(pid, signal.SIGSTOP)
        time.sleep(case.seconds)
    finally:
        mark("goes on")
        for pid in reversed(pids):
            _signal(pid, signal.SIGCONT)
            time.sleep(WAKE_APART_S)


def _processes(ground: LabGround, node: str, role: str) -> list[Process]:
    found = lab_processes(ground.files, ground.files.nodes())
    return [process for process in found if process.node == node and process.role == role]


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # killed meanwhile, by whom it kept waiting


# The cluster store


def _kill_store(ground: LabGround, case: Case, mark: Mark) -> None:
    leader = store_leader(ground)
    members = [node.name for node in member_hosts(ground.files.nodes())]
    others = [name for name in members if name != leader]
    if case.name == "leader":
        victims = [leader]
    elif case.name == "member":
        victims = others[:1]
    else:
        victims = members[: len(members) // 2 + 1]
    if case.name != "majority":
        mark(f"store member of {victims[0]} killed")
        lab.lab_kill(ground.directory, victims[0], plans.STORE_ROLE)
        return
    # Their parents would start them again at once: frozen first, they are away for long enough to be missed.
    frozen = [process.pid for name in victims for process in _processes(ground, name, plans.STORE_ROLE)]
    mark(f"store without {' and '.join(victims)}")
    try:
        for pid in frozen:
            _signal(pid, signal.SIGSTOP)
        time.sleep(NO_MAJORITY_S)
    finally:
        mark("killed; others in their places")
        for pid in frozen:
            _signal(pid, signal.SIGKILL)


def store_leader(ground: LabGround) -> str:
    """The node whose etcd member leads. Raises NotFound: there is none just now."""
    place = EtcdPlace(ground.files.store.parent)

    async def leads(address: str) -> bool:
        client = EtcdClient(place, [Endpoint(address, PORT_BASE + STORE_PORT)])
        try:
            answer = await client.call(lambda c: c.post("/v3/maintenance/status", {}), deadline_s=2)
        finally:
            client.close()
        return bool(answer.get("leader")) and answer["leader"] == answer["header"]["member_id"]

    for node in member_hosts(ground.files.nodes()):
        try:
            if run_in_netns(ground.files.netns, lambda address=node.address: trio.run(leads, address)):  # type: ignore[misc]
                return node.name
        except CsvfsError:
            continue  # this one does not answer; another may lead
    raise NotFound("the cluster store has no leader now; see csvfs lab status")


# A cluster of real machines: what its own commands can do


def inflict_on_cluster(ground: ClusterGround, case: Case, mark: Mark) -> None:
    """Raises CsvfsError: one of the commands did not succeed."""
    if case.drill == plans.COORDINATOR:
        for node in (case.others[0], case.victim):
            mark(f"moved to {node}")
            ground.csvfs(ground.here, "volume", "move", ground.volume, node)
        return
    mark(f"{case.victim} drained")
    try:
        ground.csvfs(ground.here, "node", "drain", case.victim, timeout_s=DRAIN_TIMEOUT_S)
    finally:
        mark(f"{case.victim} taken back")
        ground.csvfs(ground.here, "node", "resume", case.victim)
