"""`csvfs node run`: its lease, its children and their burial. The children are small scripts, without
csvfs."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio

from csvfs.admin.child import bound_log
from csvfs.admin.cluster_root import ClusterRoot
from csvfs.admin.mount_points import mounted_paths
from csvfs.admin.node_lease import next_incarnation
from csvfs.cluster.liveness import Liveness
from csvfs.cluster.membership import item_map
from csvfs.store.interface import ClusterStore
from csvfs.store.opening import open_store
from csvfs.wire.control import pack_value

# Each child says who it is in a file, and waits. `dies`: it ends at once instead.
CHILD = """
import os, sys, time
role = os.environ["CSVFS_ROLE"]
with open(sys.argv[1] + "/" + role + "." + os.environ["CSVFS_INCARNATION"] + ".new", "w") as file:
    file.write(str(os.getpid()) + " " + os.environ["CSVFS_NODE_LEASE"])
os.rename(file.name, file.name[:-4])
print("hello from", role)
if not os.path.exists(sys.argv[1] + "/dies"):
    time.sleep(1000)
"""
RUNNER = """
import sys, logging, trio
from pathlib import Path
from csvfs.admin.node_run import Commands, run_node
from csvfs.config import load_config
logging.basicConfig(level=logging.INFO)
command = (sys.executable, "-S", "-c", sys.argv[1], sys.argv[2])
trio.run(run_node, load_config(), Commands(command, command, command))
"""


class Node:
    """A running `node run` whose files are below `directory`."""

    def __init__(self, directory: Path, *, lease_ms: int, margin_ms: int) -> None:
        self.directory = directory
        self.seen = directory / "seen"
        self.seen.mkdir()
        self.config = directory / "node.toml"
        self.url = f"embedded:{directory}/store.db"
        self.config.write_text(
            f'node = "n1"\naddress = "127.0.0.1"\nstore = "{self.url}?gate={directory}/gate"\n'
            f'run_dir = "{directory}/run"\ncluster_root = "{directory}/root"\nrack = "r1"\n'
            f"[options]\nnode_lease_ms = {lease_ms}\nheartbeat_ms = 100\nmargin_ms = {margin_ms}\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        argv = [sys.executable, "-c", RUNNER, CHILD, str(self.seen)]
        with (self.directory / "node.log").open("ab") as log:
            environment = os.environ | {"CSVFS_CONFIG": str(self.config)}
            self.process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)

    def pids(self, role: str) -> dict[int, int]:
        """incarnation -> pid of all children of `role` there ever were."""
        files = self.seen.glob(f"{role}.*[0-9]")
        return {int(file.name.split(".")[1]): int(file.read_text().split()[0]) for file in files}

    def last_pid(self, role: str) -> int:
        pids = self.pids(role)
        return pids[max(pids)] if pids else 0

    def end(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)


async def until(condition: Callable[[], object], within_s: float = 60) -> None:
    with trio.fail_after(within_s):
        while not condition():
            await trio.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Its lease outlives whatever a busy machine keeps it from renewing it."""
    with running_node(tmp_path_factory, lease_ms=20_000, margin_ms=200) as node:
        yield node


@pytest.fixture
def hasty_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """It stops serving 1.5 s before its lease ends."""
    with running_node(tmp_path_factory, lease_ms=2_000, margin_ms=1_500) as node:
        yield node


@contextlib.contextmanager
def running_node(factory: pytest.TempPathFactory, *, lease_ms: int, margin_ms: int) -> Iterator[Node]:
    node = Node(factory.mktemp("n"), lease_ms=lease_ms, margin_ms=margin_ms)
    node.start()
    yield node
    with contextlib.suppress(ProcessLookupError):
        node.end(signal.SIGKILL)
    subprocess.run(["umount", "-l", str(node.directory / "root")], check=False, capture_output=True)


@pytest.fixture
async def store(node: Node) -> AsyncIterator[ClusterStore]:
    store = open_store(node.url)
    yield store
    await store.close()


@pytest.fixture
async def hasty_store(hasty_node: Node) -> AsyncIterator[ClusterStore]:
    store = open_store(hasty_node.url)
    yield store
    await store.close()


async def lease_of(store: ClusterStore) -> int:
    with trio.fail_after(60):
        while not (item := await store.get("alive/n1")):
            await trio.sleep(0.01)
    return item.lease


async def test_a_node_registers_starts_its_children_and_may_serve(node: Node, store: ClusterStore) -> None:
    lease = await lease_of(store)
    await until(lambda: node.last_pid("drives") and node.last_pid("coordinator"))
    alive, registered = item_map(await store.get("alive/n1")), item_map(await store.get("nodes/n1"))
    assert alive["address"] == "127.0.0.1" and registered["address"] == "127.0.0.1"
    assert registered["place"] == {"rack": "r1"}
    page = Liveness(node.directory / "run/liveness", alive["incarnation"])
    assert page.may_serve() and page.remaining_ms <= 19_800
    assert next(node.seen.glob("drives.*")).read_text().split()[1] == str(lease)
    log = node.directory / "run/logs/drives.log"
    await until(lambda: log.read_text() == "hello from drives\n")


async def test_a_child_that_dies_is_started_again_at_once_with_a_higher_incarnation(
    node: Node, store: ClusterStore
) -> None:
    await until(lambda: node.last_pid("drives") and node.last_pid("coordinator"))
    (first,) = node.pids("coordinator")
    drives = node.last_pid("drives")
    os.kill(node.last_pid("coordinator"), signal.SIGKILL)
    await until(lambda: len(node.pids("coordinator")) >= 2)
    assert max(node.pids("coordinator")) > first
    assert node.last_pid("drives") == drives and is_running(drives)


async def test_what_a_dead_child_owned_is_given_up_at_once(node: Node, store: ClusterStore) -> None:
    await until(lambda: node.last_pid("drives") and node.last_pid("coordinator"))
    lease = await lease_of(store)
    (host,), (server,) = node.pids("coordinator"), node.pids("drives")
    mine = {"node": "n1", "incarnation": host}
    await store.put("owner/a", pack_value(mine), lease)
    await store.put("owner/b", pack_value({"node": "n2", "incarnation": host}))
    await store.put("coordinators/n1", pack_value({"incarnation": host}), lease)
    await store.put("servers/n1", pack_value({"incarnation": server}), lease)
    os.kill(node.last_pid("coordinator"), signal.SIGKILL)
    os.kill(node.last_pid("drives"), signal.SIGKILL)
    with trio.fail_after(60):
        while [i.key for p in ("owner/", "coordinators/", "servers/") for i in await store.list(p)] != [
            "owner/b"
        ]:
            await trio.sleep(0.01)
    assert await lease_of(store) == lease


async def test_what_a_coordinator_host_owned_that_stands_still_is_given_up_and_it_never_wakes_up(
    node: Node, store: ClusterStore
) -> None:
    await until(lambda: node.last_pid("coordinator"))
    lease, pid = await lease_of(store), node.last_pid("coordinator")
    (host,) = node.pids("coordinator")
    await store.put("owner/a", pack_value({"node": "n1", "incarnation": host}), lease)
    os.kill(pid, signal.SIGSTOP)
    with trio.fail_after(60):
        while await store.get("owner/a"):
            await trio.sleep(0.01)
    assert not is_running(pid)
    await until(lambda: len(node.pids("coordinator")) == 2)
    assert await lease_of(store) == lease


async def test_each_online_volume_is_mounted_and_a_deleted_one_is_not(
    node: Node, store: ClusterStore
) -> None:
    await store.put("volumes/Volume1", pack_value({"id": bytes(16), "state": "online"}))
    await store.put("volumes/New", pack_value({"id": bytes(16), "state": "creating"}))
    await store.put("volumes/..", pack_value({"id": bytes(16), "state": "online"}))
    await until(lambda: node.last_pid("mount"))
    pid = node.last_pid("mount")
    assert [path.name for path in (node.directory / "root").iterdir()] == ["Volume1"]
    await store.put("volumes/Volume1", pack_value({"id": b"\1" * 16, "state": "online"}))
    await until(lambda: len(node.pids("mount")) == 2)
    assert not is_running(pid)
    await store.delete("volumes/Volume1")
    await until(lambda: not (node.directory / "root/Volume1").exists())
    assert not is_running(node.last_pid("mount"))


async def test_killing_node_run_kills_all_its_children(node: Node) -> None:
    await until(lambda: node.last_pid("drives") and node.last_pid("coordinator"))
    node.end(signal.SIGKILL)
    await until(
        lambda: not is_running(node.last_pid("drives")) and not is_running(node.last_pid("coordinator"))
    )


async def test_after_kill_minus_9_a_new_node_run_does_not_wait_for_the_old_lease(
    node: Node, store: ClusterStore
) -> None:
    await until(lambda: node.last_pid("drives"))
    lease = await lease_of(store)
    await store.put("servers/n1", b"", lease)
    node.end(signal.SIGKILL)
    node.start()
    await until(lambda: len(node.pids("drives")) >= 2)
    assert await lease_of(store) != lease
    assert await store.get("servers/n1") is None


async def test_sigterm_stops_in_order_and_leaves_no_key_and_no_process(
    node: Node, store: ClusterStore
) -> None:
    await store.put("volumes/Volume1", pack_value({"id": bytes(16), "state": "online"}))
    await until(lambda: node.last_pid("mount") and node.last_pid("drives") and node.last_pid("coordinator"))
    assert node.end(signal.SIGTERM) == 0
    assert await store.list("alive/") == []
    assert not any(is_running(node.last_pid(role)) for role in ("drives", "coordinator", "mount"))
    assert not Liveness(node.directory / "run/liveness").may_serve()


async def test_i5_a_lost_lease_kills_the_children_before_new_ones_start(
    node: Node, store: ClusterStore
) -> None:
    await until(lambda: node.last_pid("drives"))
    lease, first = await lease_of(store), node.last_pid("drives")
    page = Liveness(node.directory / "run/liveness")
    await store.revoke_lease(lease)
    await until(lambda: len(node.pids("drives")) >= 2)
    assert not is_running(first)
    assert not page.may_serve()
    assert await lease_of(store) != lease


async def test_i5_a_node_cut_off_stops_serving_before_its_lease_ends_and_comes_back(
    hasty_node: Node, hasty_store: ClusterStore
) -> None:
    node, store = hasty_node, hasty_store
    await until(lambda: node.last_pid("drives"))
    await lease_of(store)
    page = Liveness(node.directory / "run/liveness")
    (node.directory / "gate").touch()
    await until(lambda: not page.may_serve())
    assert await store.get("alive/n1") is not None
    with trio.fail_after(60):
        while await store.get("alive/n1"):
            await trio.sleep(0.01)
    (node.directory / "gate").unlink()
    await lease_of(store)
    await until(lambda: len(node.pids("drives")) >= 2)


async def test_children_that_die_at_once_are_started_ever_more_slowly(
    node: Node, store: ClusterStore
) -> None:
    (node.seen / "dies").touch()
    await until(lambda: node.last_pid("drives"))
    with contextlib.suppress(ProcessLookupError):
        os.kill(node.last_pid("drives"), signal.SIGKILL)
    await until(lambda: len(node.pids("drives")) >= 4)
    log = (node.directory / "node.log").read_text()
    waits = [line.rsplit(" ", 2)[1] for line in log.splitlines() if "drives" in line and "again in" in line]
    assert waits[:3] == ["0", "100", "200"]


async def test_a_second_node_run_on_one_run_dir_is_refused(node: Node, store: ClusterStore) -> None:
    await lease_of(store)
    argv = [sys.executable, "-m", "csvfs.admin.node_run"]
    environment = os.environ | {"CSVFS_CONFIG": str(node.config)}
    second = await trio.run_process(argv, env=environment, capture_stderr=True, check=False)
    assert second.returncode == 1 and b"another `csvfs node run`" in second.stderr
    assert second.stderr.count(b"\n") == 1


async def test_incarnations_never_repeat(tmp_path: Path) -> None:
    store = open_store(f"embedded:{tmp_path}/store.db")
    numbers = []

    async def count() -> None:
        for _ in range(5):
            numbers.append(await next_incarnation(store, "n1"))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(count)
    assert sorted(numbers) == list(range(1, 16))
    await store.close()


def test_a_long_log_is_rolled_over_and_its_end_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_bytes(b"old " * 100 + b"new end")
    bound_log(log, 100)
    assert log.stat().st_size == 0
    assert (tmp_path / "a.log.1").read_bytes().endswith(b"new end")
    bound_log(tmp_path / "absent.log", 100)


def test_mount_points_with_odd_names_are_read_right() -> None:
    line = rb"36 35 98:0 / /clusterstorage/My\040Volume\134 rw,noatime master:1 - fuse csvfs rw"
    assert mounted_paths(line + b"\n") == [b"/clusterstorage/My Volume\\"]


def test_a_mount_point_without_its_mount_takes_no_files(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    root = ClusterRoot(tmp_path / "clusterstorage")
    root.open()
    try:
        point = root.make_point("Volume1")
        with pytest.raises(OSError, match="Read-only"):
            (point / "file").write_bytes(b"lost under the mount that comes back")
        again = ClusterRoot(root.path)
        again.open()  # as after a kill of node run: taken over, not stacked
        assert again.make_point("Volume1") == point
        again.remove_point("Volume1")
        assert os.listdir(root.path) == []
    finally:
        root.close()
    assert mounted_paths().count(os.fsencode(root.path)) == 0


@pytest.mark.parametrize("said", [{"rack": "r2"}, {}])
async def test_a_place_in_the_cluster_store_outlives_a_start_with_another_in_the_configuration(
    node: Node, store: ClusterStore, said: dict[str, str]
) -> None:
    lease = await lease_of(store)
    await store.put("nodes/n1", pack_value({"address": "10.0.0.9", "place": said}))
    node.end(signal.SIGTERM)
    node.start()
    with trio.fail_after(60):
        while await lease_of(store) == lease:
            await trio.sleep(0.01)
    assert item_map(await store.get("nodes/n1")) == {"address": "127.0.0.1", "place": said}
