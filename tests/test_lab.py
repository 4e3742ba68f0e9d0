"""The lab: nodes that are apart, that die when killed, and of which nothing is left in the end."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from csvfs.admin import lab
from csvfs.admin.lab_files import lab_files
from csvfs.admin.lab_processes import lab_processes, node_pid
from csvfs.admin.mount_points import mounted_paths
from csvfs.errors import BadRequest, Conflict, Corrupt, NotFound, NotPermitted, NotSupported, Unavailable
from csvfs.units import MIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for

PYTHON = sys.executable


@pytest.fixture(scope="module")
def cluster() -> Iterator[LabCluster]:
    """Two nodes without a pool, shared by the tests that leave it as they found it."""
    with running_lab(nodes=2, with_pool=False) as cluster:
        yield cluster


@pytest.fixture
def directory() -> Iterator[Path]:
    parent = Path(tempfile.mkdtemp(prefix="lab-", dir="/var/tmp"))
    yield parent / "lab"
    with contextlib.suppress(Exception):
        lab.lab_down(parent / "lab", say=lambda line: None)
    parent.rmdir()


def up(directory: Path, nodes: int = 1) -> None:
    lab.lab_up(directory, nodes=nodes, drives=1, drive_size=64 * MIB, with_pool=False, say=lambda line: None)


def down(directory: Path) -> None:
    lab.lab_down(directory, say=lambda line: None)


def assert_nothing_left(directory: Path) -> None:
    assert not directory.exists()
    assert [path for path in mounted_paths() if path.startswith(os.fsencode(directory))] == []
    assert processes_naming(directory) == []


def processes_naming(directory: Path) -> list[str]:
    """Independently of the lab's own search: whoever has the directory on its command line or in its
    environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if os.fsencode(directory) in text:
                    found.append(entry.name)
    return found


def is_running(pid: int) -> bool:
    """A zombie, dead and not fetched by its parent, does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# A lab that runs


@needs_lab
@pytest.mark.lab
def test_each_node_has_its_own_address_cluster_root_and_configuration(cluster: LabCluster) -> None:
    for index in (1, 2):
        addresses = cluster.run(f"n{index}", "ip", "-brief", "-4", "address", "show", "dev", "eth0").decode()
        assert f"10.77.0.{index}/24" in addresses
        config = cluster.run(f"n{index}", "sh", "-c", "cat $CSVFS_CONFIG").decode()
        assert f'node = "n{index}"' in config
    devices = [cluster.run(node, "stat", "-c", "%d", "/clusterstorage") for node in ("n1", "n2")]
    assert devices[0] != devices[1]
    assert int(devices[0]) != os.stat("/clusterstorage").st_dev
    refused = "touch /clusterstorage/beside 2>&1; true"  # no volume is mounted: it would fill the node's disk
    assert b"Read-only" in cluster.run("n1", "sh", "-c", refused)
    assert cluster.states() == {"n1": "up", "n2": "up"}


@needs_lab
@pytest.mark.lab
def test_exec_passes_input_output_and_status_through(cluster: LabCluster) -> None:
    program = """
import sys
from pathlib import Path
from csvfs.admin.lab import lab_exec
sys.exit(lab_exec(Path(sys.argv[1]), "n1", ["sh", "-c", sys.argv[2]]))
"""

    def execute(script: str) -> subprocess.CompletedProcess[bytes]:
        argv = [PYTHON, "-c", program, str(cluster.directory), script]
        return subprocess.run(argv, input=b"in\0put", capture_output=True)

    result = execute("cat; echo error >&2; exit 7")
    assert (result.returncode, result.stdout, result.stderr) == (7, b"in\0put", b"error\n")
    assert execute("kill -9 $$").returncode == 137


@needs_lab
@pytest.mark.lab
def test_exec_has_our_programs_first_on_the_path_and_stays_in_the_directory(cluster: LabCluster) -> None:
    path = cluster.run("n1", "sh", "-c", "echo $PATH").decode()
    assert path.startswith(os.path.dirname(PYTHON) + ":")
    assert cluster.run("n1", "pwd").decode().strip() == os.getcwd()
    assert cluster.run("n1", "true", check=False) == b""
    assert lab.lab_exec(cluster.directory, "n1", ["no-such-command"]) == 127


@needs_lab
@pytest.mark.lab
def test_nodes_reach_each_other_until_one_is_partitioned_and_again_when_healed(cluster: LabCluster) -> None:
    ping = [PYTHON, "-c", REACH]
    assert cluster.run("n1", *ping, "10.77.0.2", "patiently") == b"reached\n"
    cluster.partition("n2")
    assert cluster.run("n1", *ping, "10.77.0.2") == b"cut off\n"
    assert cluster.run("n2", *ping, "10.77.0.1") == b"cut off\n"
    assert cluster.states()["n2"] == "partitioned"
    wait_for(lambda: cluster.store(lambda store: store.get("alive/n2")) is None)
    wait_for(lambda: cluster.store(lambda store: store.get("alive/n1")) is not None)
    cluster.heal()
    assert cluster.run("n1", *ping, "10.77.0.2", "patiently") == b"reached\n"
    wait_for(lambda: cluster.states() == {"n1": "up", "n2": "up"})


# A port nobody listens on: a refusal proves that the packets went there and back.
REACH = """
import socket, sys
probe = socket.socket()
probe.settimeout(0.3)
for attempt in range(200):
    try:
        probe.connect((sys.argv[1], 9))
    except ConnectionRefusedError:
        print("reached"); break
    except OSError:
        if attempt >= 2 and len(sys.argv) < 3: print("cut off"); break
        probe.close(); probe = socket.socket(); probe.settimeout(0.3)
"""


@needs_lab
@pytest.mark.lab
def test_a_killed_node_has_no_process_left_and_comes_back(cluster: LabCluster) -> None:
    stray = cluster.run("n2", "sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!").decode()
    before = cluster.store(lambda store: store.get("alive/n2"))
    cluster.kill("n2")
    assert not is_running(int(stray))
    assert cluster.states() == {"n1": "up", "n2": "down"}
    assert cluster.pids("n2") == {}
    with pytest.raises(Unavailable, match="lab start n2"):
        cluster.run("n2", "true")
    cluster.start("n2")
    assert cluster.states() == {"n1": "up", "n2": "up"}
    after = cluster.store(lambda store: store.get("alive/n2"))
    assert before is not None and after is not None and before.lease != after.lease


@needs_lab
@pytest.mark.lab
def test_kill_minus_9_of_node_run_takes_its_children_along(cluster: LabCluster) -> None:
    pid = node_pid(cluster.files, cluster.node("n2"))
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: cluster.pids("n2") == {})
    cluster.start("n2")


@needs_lab
@pytest.mark.lab
def test_what_does_not_exist_is_refused_by_name(cluster: LabCluster) -> None:
    with pytest.raises(NotFound, match="n1 to n2"):
        cluster.kill("n9")
    with pytest.raises(BadRequest, match="drives, coordinator, mount, store"):
        cluster.kill("n1", "engine")
    with pytest.raises(Conflict, match="2 nodes"):
        lab.lab_up(cluster.directory, nodes=3, with_pool=False)


# Coming and going


@needs_lab
@pytest.mark.lab
def test_two_labs_run_side_by_side_and_end_apart(cluster: LabCluster, directory: Path) -> None:
    up(directory)
    other = LabCluster(directory)
    assert "10.77.0.1" in other.run("n1", "ip", "address").decode()
    devices = [lab.run("n1", "stat", "-c", "%d", "/clusterstorage") for lab in (cluster, other)]
    assert devices[0] != devices[1]
    assert cluster.store(lambda store: store.get("cluster")) != other.store(
        lambda store: store.get("cluster")
    )
    down(directory)
    assert_nothing_left(directory)
    assert cluster.states() == {"n1": "up", "n2": "up"}
    cluster.run("n1", "ls", "/clusterstorage")


@needs_lab
@pytest.mark.lab
def test_down_leaves_nothing_also_with_commands_running_and_node_run_killed(directory: Path) -> None:
    namespaces = set(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else set()
    up(directory, nodes=2)
    running = LabCluster(directory)
    running.run("n1", "sh", "-c", "env -i setsid sleep 1000 >/dev/null 2>&1 &")
    pid = node_pid(running.files, running.node("n2"))
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    down(directory)
    assert_nothing_left(directory)
    assert (set(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else set()) == namespaces
    down(directory)


@needs_lab
@pytest.mark.lab
def test_up_on_a_running_lab_changes_nothing_and_starts_what_is_missing(directory: Path) -> None:
    up(directory, nodes=2)
    running = LabCluster(directory)
    pid, cluster_item = (
        node_pid(running.files, running.node("n1")),
        running.store(lambda store: store.get("cluster")),
    )
    running.kill("n2")
    up(directory, nodes=2)
    assert node_pid(running.files, running.node("n1")) == pid
    assert running.store(lambda store: store.get("cluster")) == cluster_item
    assert running.states() == {"n1": "up", "n2": "up"}


@needs_lab
@pytest.mark.lab
def test_up_killed_half_way_can_be_finished_or_taken_down(directory: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.test_lab import up; up(Path(sys.argv[1]), nodes=2)"
    )
    for wait_path in ("lab.json", "netns", "nodes/n1/run/logs/node.log"):
        process = subprocess.Popen([PYTHON, "-c", script, str(directory)])
        wait_for(lambda path=directory / wait_path: path.exists())  # type: ignore[misc]
        process.kill()
        process.wait()
    up(directory, nodes=2)
    assert LabCluster(directory).states() == {"n1": "up", "n2": "up"}
    (directory / "lab.json").write_text("{ruined")
    with pytest.raises(Corrupt, match="lab down"):
        lab.lab_status(directory)
    down(directory)
    assert_nothing_left(directory)


@needs_lab
@pytest.mark.lab
def test_down_finds_processes_of_a_lab_whose_files_are_gone(directory: Path) -> None:
    up(directory)
    (directory / "lab.json").unlink()
    (directory / "nodes/n1/node.toml").unlink()
    down(directory)
    assert_nothing_left(directory)
    assert lab_processes(lab_files(directory), []) == []


# No lab


@needs_lab
@pytest.mark.lab
def test_down_never_removes_what_is_no_lab(directory: Path) -> None:
    directory.mkdir()
    (directory / "precious").touch()
    with pytest.raises(BadRequest, match="holds no lab"):
        down(directory)
    with pytest.raises(BadRequest, match="holds no lab"):
        up(directory)
    assert (directory / "precious").exists()
    (directory / "precious").unlink()
    with pytest.raises(BadRequest):
        down(Path("/"))


def test_impossible_labs_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="embedded, etcd"):
        lab.lab_up(tmp_path, store="zookeeper")
    with pytest.raises(BadRequest, match="nodes"):
        lab.lab_up(tmp_path, nodes=17)
    with pytest.raises(BadRequest, match="spaces"):
        lab.lab_up(Path("/var/tmp/a b"))
    with pytest.raises(BadRequest, match="shorter"):
        lab.lab_up(Path("/var/tmp") / ("x" * 90))
    with pytest.raises(NotFound, match="lab up"):
        lab.lab_status(Path("/var/tmp/csvfs-there-is-no-lab"))


def test_without_root_fuse_or_namespaces_the_lab_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotPermitted, match="as root"):
        lab.lab_up(Path("/var/tmp/csvfs-never-made"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NotSupported):
        lab.lab_up(Path("/var/tmp/csvfs-never-made"))
    assert not Path("/var/tmp/csvfs-never-made").exists()
