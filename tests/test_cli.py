"""The command line: what it does to the cluster store, and one clear line for everything that goes wrong."""

import json
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from click.testing import CliRunner, Result

from csvfs.admin import cli_volume, drive_ops, volume_ops
from csvfs.admin.cli import main
from csvfs.admin.cli_context import expected_failure
from csvfs.admin.volume_ops import wait_mounted
from csvfs.errors import Conflict, DriveRefused, NotFound, TimedOut
from csvfs.store.embedded import EmbeddedStore
from csvfs.store.interface import Change, ClusterStore
from csvfs.units import GIB, MIB
from csvfs.wire.control import pack_value, unpack_value

T = TypeVar("T")


class Cluster:
    """A node's configuration and cluster store in a folder, and the command run on that node."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.path = top / "store.db"
        self.config = top / "node.toml"
        self.config.write_text(
            f'node = "n1"\naddress = "127.0.0.1"\nstore = "embedded:{self.path}"\n'
            f'run_dir = "{top}/run"\ncluster_root = "{top}/clusterstorage"\n'
        )

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, arguments, env={"CSVFS_CONFIG": str(self.config)})

    def json(self, *arguments: str) -> Any:
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def fails(self, *arguments: str) -> str:
        """The one line of a command that must fail with exit status 1."""
        result = self.run(*arguments)
        assert result.exit_code == 1, result.output
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.output
        assert lines[0].startswith("csvfs: ")
        return lines[0].removeprefix("csvfs: ")

    def misused(self, *arguments: str) -> str:
        """What is said of wrong usage, with exit status 2."""
        result = self.run(*arguments)
        assert result.exit_code == 2, result.output
        return result.stderr

    def with_store(self, work: Callable[[ClusterStore], Awaitable[T]]) -> T:
        async def opened() -> T:
            store = EmbeddedStore(self.path)
            try:
                return await work(store)
            finally:
                await store.close()

        return trio.run(opened)

    def put(self, key: str, **value: Any) -> None:
        self.with_store(lambda store: store.put(key, pack_value(value)))

    def delete(self, key: str) -> None:
        self.with_store(lambda store: store.delete(key))

    def value(self, key: str) -> Any:
        item = self.with_store(lambda store: store.get(key))
        return None if item is None else unpack_value(item.value)

    def add_node(self, name: str, *, alive: bool = True, drives: int = 1, state: str = "ok") -> None:
        self.put(f"nodes/{name}", address="127.0.0.1")
        # n1 is where the commands run: up, but with no mounts to wait for unless a test wants them
        if alive:
            self.put(f"alive/{name}", incarnation=1, address="127.0.0.1", started=0)
        for index in range(drives):
            drive = (name.encode() + bytes([index + 1]) * 16)[:16]
            self.put(
                f"drives/{drive.hex()}",
                node=name,
                path=f"/{name}/{index}",
                size=GIB,
                kind="file",
                state=state,
                slots=15,
            )

    def add_volume(self, name: str, *, state: str = "online", **more: Any) -> None:
        self.put(
            f"volumes/{name}",
            id=bytes(16),
            name=name,
            resiliency="mirror",
            copies=3,
            size=0,
            state=state,
            created=0,
            **more,
        )


@pytest.fixture
def bare(tmp_path: Path) -> Cluster:
    """A configuration, and a store with nothing in it."""
    return Cluster(tmp_path)


@pytest.fixture
def cluster(bare: Cluster) -> Cluster:
    """A cluster with its pool, without nodes."""
    assert bare.run("cluster", "create", "lab").exit_code == 0
    assert bare.run("pool", "create", "--slab-size", "64M").exit_code == 0
    return bare


@pytest.fixture
def three_nodes(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    for name in ("n1", "n2", "n3"):
        cluster.add_node(name)

    async def mounted_at_once(path: Path, timeout_s: float) -> None:
        return

    monkeypatch.setattr(cli_volume.volume_ops, "wait_mounted", mounted_at_once)
    return cluster


class Coordinators:
    """The cluster's part: answers changes of volume keys as coordinators would, in a thread of its own."""

    def __init__(
        self, path: Path, react: Callable[[Change, dict[str, Any]], list[tuple[str, dict[str, Any] | None]]]
    ) -> None:
        self._path = path
        self._react = react
        self._ready = threading.Event()
        self._stop: trio.Event | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._thread = threading.Thread(target=lambda: trio.run(self._serve))

    async def _serve(self) -> None:
        self._stop, self._token = trio.Event(), trio.lowlevel.current_trio_token()
        store = EmbeddedStore(self._path)
        async with trio.open_nursery() as nursery, store.watch("volumes/") as batches:

            async def stop() -> None:
                assert self._stop is not None
                await self._stop.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(stop)
            self._ready.set()
            async for batch in batches:
                for change in batch:
                    if change.item is None:
                        continue
                    for key, value in self._react(change, unpack_value(change.item.value)):
                        await (store.delete(key) if value is None else store.put(key, pack_value(value)))
        await store.close()

    def __enter__(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def __exit__(self, *ignored: object) -> None:
        assert self._token is not None
        assert self._stop is not None
        self._token.run_sync_soon(self._stop.set)
        self._thread.join(10)


@pytest.fixture
def coordinators(three_nodes: Cluster) -> Iterator[None]:
    """Volumes being created come online, being deleted go, preferred ones move."""

    def react(change: Change, value: dict[str, Any]) -> list[tuple[str, dict[str, Any] | None]]:
        if value["state"] == "creating":
            return [(change.key, {**value, "state": "online"})]
        if value["state"] == "deleting":
            return [(change.key, None)]
        if value.get("preferred"):
            return [
                (f"owner/{value['name']}", {"node": value["preferred"], "address": "127.0.0.1", "port": 1})
            ]
        return []

    with Coordinators(three_nodes.path, react):
        yield


# ---------------------------------------------------------------- configuration and store


def test_help_names_every_noun_without_any_configuration(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--help"], env={"CSVFS_CONFIG": str(tmp_path / "absent")})
    assert result.exit_code == 0
    for noun in ("cluster", "node", "drive", "pool", "volume", "status", "lab"):
        assert noun in result.output


def test_a_missing_configuration_says_how_to_name_one(bare: Cluster) -> None:
    bare.config.unlink()
    assert "CSVFS_CONFIG" in bare.fails("node", "list")


def test_a_damaged_configuration_is_one_line(bare: Cluster) -> None:
    bare.config.write_text("node = [")
    assert "is not TOML" in bare.fails("status")


def test_a_store_of_an_unknown_kind_is_one_line(bare: Cluster) -> None:
    bare.config.write_text('node = "n1"\naddress = "127.0.0.1"\nstore = "consul://x"\n')
    assert "consul" in bare.fails("status")


def test_a_store_that_cannot_be_reached_is_one_line(bare: Cluster) -> None:
    gate = bare.top / "gate"
    gate.touch()
    bare.config.write_text(
        f'node = "n1"\naddress = "127.0.0.1"\nstore = "embedded:{bare.path}?gate={gate}"\n'
    )
    for command in (("status",), ("node", "list"), ("volume", "create", "Volume1"), ("pool", "create")):
        assert bare.fails(*command)


def test_a_store_file_that_is_no_store_is_one_line(bare: Cluster) -> None:
    bare.path.write_bytes(b"no database, but long enough to look like something" * 100)
    assert "store.db" in bare.fails("volume", "list")


def test_a_damaged_key_is_named(cluster: Cluster) -> None:
    cluster.put("volumes/Volume1", resiliency=7)
    assert "volumes/Volume1" in cluster.fails("volume", "list")


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("volume", "nonsense"), ("volume", "create"), ("drive", "add")]
)
def test_wrong_usage_has_exit_status_2(bare: Cluster, arguments: tuple[str, ...]) -> None:
    assert "Usage:" in bare.misused(*arguments)


# ---------------------------------------------------------------- cluster and pool


def test_a_cluster_is_created_once(bare: Cluster) -> None:
    assert "csvfs pool create" in bare.run("cluster", "create", "lab").output
    assert bare.value("cluster")["name"] == "lab"
    assert "already holds the cluster 'lab'" in bare.fails("cluster", "create", "other")
    assert bare.value("cluster")["name"] == "lab"


@pytest.mark.parametrize("name", ["", "-x", "_x", "a b", "a/b", "ä", "x" * 33, "a\n"])
def test_a_cluster_of_an_impossible_name_is_refused(bare: Cluster, name: str) -> None:
    assert "use 1 to 32 letters" in bare.fails("cluster", "create", "--", name)


def test_a_pool_needs_a_cluster_first(bare: Cluster) -> None:
    assert "csvfs cluster create" in bare.fails("pool", "create")


def test_a_pool_is_created_once(cluster: Cluster) -> None:
    assert cluster.value("pool")["slab_size"] == 64 * MIB
    assert "already has its pool 'pool'" in cluster.fails("pool", "create")


@pytest.mark.parametrize("size", ["1M", "3M", "48M", "512M", "0", "67108865"])
def test_slabs_of_an_impossible_size_are_refused(bare: Cluster, size: str) -> None:
    bare.run("cluster", "create", "lab")
    assert "power of two" in bare.fails("pool", "create", "--slab-size", size)


def test_a_size_that_is_none_is_wrong_usage(cluster: Cluster) -> None:
    assert "write it like 4G" in cluster.misused("pool", "create", "--slab-size", "large")
    assert "write it like 4G" in cluster.misused("volume", "create", "V", "--size", "large")


def test_pool_status_without_a_pool_says_how_to_make_one(bare: Cluster) -> None:
    assert "csvfs pool create" in bare.fails("pool", "status")


def test_pool_status_says_which_drives_could_not_be_asked(three_nodes: Cluster) -> None:
    result = three_nodes.run("pool", "status")
    assert result.exit_code == 0
    assert "n1, n2, n3" in result.stderr
    assert three_nodes.json("pool", "status")["pool"]["nodes_unknown"] == ["n1", "n2", "n3"]


# ---------------------------------------------------------------- nodes and drives


def test_nodes_are_listed_with_their_state(three_nodes: Cluster) -> None:
    three_nodes.delete("alive/n3")
    rows = three_nodes.json("node", "list")
    assert [(row["name"], row["state"], row["drives"]) for row in rows] == [
        ("n1", "up", 1),
        ("n2", "up", 1),
        ("n3", "down", 1),
    ]
    assert "down" in three_nodes.run("node", "list").stdout


def test_empty_listings_say_what_to_do_first_and_are_empty_as_json(cluster: Cluster) -> None:
    for noun, advice in (
        ("node", "csvfs node run"),
        ("drive", "csvfs drive add"),
        ("volume", "csvfs volume create"),
    ):
        assert advice in cluster.run(noun, "list").stdout
        assert cluster.json(noun, "list") == []


def test_drives_are_listed_even_when_no_server_answers(three_nodes: Cluster) -> None:
    rows = three_nodes.json("drive", "list")
    assert [(row["node"], row["free"]) for row in rows] == [("n1", None), ("n2", None), ("n3", None)]
    assert "unknown" in three_nodes.run("drive", "list").stdout


@pytest.fixture
def formatted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths that were formatted; checking refuses what is called `mounted`."""
    paths: list[str] = []

    class Layout:
        slot_count = 15

    class Formatted:
        layout = Layout

    def check(path: str, *, pool_id: bytes, cluster_id: bytes, slab_size: int) -> None:
        assert len(pool_id) == len(cluster_id) == 16
        assert slab_size == 64 * MIB
        if path.endswith("mounted"):
            raise DriveRefused(f"{path} is mounted: unmount it first")

    def make(path: str, **options: Any) -> Formatted:
        paths.append(path)
        return Formatted()

    monkeypatch.setattr(drive_ops, "check_drive", check)
    monkeypatch.setattr(drive_ops, "format_drive", make)
    return paths


def make_files(top: Path, *names: str) -> list[str]:
    for name in names:
        with (top / name).open("wb") as file:
            file.truncate(GIB)
    return [str(top / name) for name in names]


def test_drives_are_formatted_and_made_known(cluster: Cluster, formatted: list[str]) -> None:
    paths = make_files(cluster.top, "a", "b")
    result = cluster.run("drive", "add", *paths)
    assert result.exit_code == 0, result.output
    assert formatted == paths
    rows = cluster.json("drive", "list")
    assert [(row["node"], row["path"]) for row in rows] == [("n1", path) for path in paths]
    value = cluster.value(f"drives/{rows[0]['id']}")
    assert (value["size"], value["backing"], value["state"], value["slots"]) == (GIB, "file", "ok", 15)
    assert value["kind"] in ("", "nvme", "ssd", "hdd")


def test_one_refused_drive_leaves_all_unwritten(cluster: Cluster, formatted: list[str]) -> None:
    paths = make_files(cluster.top, "a", "mounted", "c")
    assert "is mounted: unmount it first" in cluster.fails("drive", "add", *paths)
    assert formatted == []
    assert cluster.json("drive", "list") == []


def test_a_dry_run_writes_nothing(cluster: Cluster, formatted: list[str]) -> None:
    (path,) = make_files(cluster.top, "a")
    shown = cluster.run("drive", "add", "--kind", "ssd", "--dry-run", path).stdout
    assert f"would add {path}: file, ssd, 1.0 GiB" in shown
    assert formatted == []
    assert cluster.json("drive", "list") == []


def test_one_drive_given_twice_by_two_names_is_refused(cluster: Cluster, formatted: list[str]) -> None:
    (path,) = make_files(cluster.top, "a")
    (cluster.top / "link").symlink_to(path)
    assert "is given twice" in cluster.fails("drive", "add", path, str(cluster.top / "link"))
    assert formatted == []


def test_a_path_that_is_no_text_is_refused(cluster: Cluster, formatted: list[str]) -> None:
    path = os.fsdecode(os.fsencode(cluster.top) + b"/\xff")
    with open(path, "wb") as file:
        file.truncate(GIB)
    assert "is not UTF-8" in cluster.fails("drive", "add", path)
    assert formatted == []


def test_what_cannot_be_a_drive_is_refused(cluster: Cluster, formatted: list[str]) -> None:
    assert "no such file" in cluster.fails("drive", "add", str(cluster.top / "absent"))
    assert "neither a file nor a block device" in cluster.fails("drive", "add", str(cluster.top))
    assert "neither a file nor a block device" in cluster.fails("drive", "add", "/dev/null")


def test_drives_need_a_pool_first(bare: Cluster, formatted: list[str]) -> None:
    paths = make_files(bare.top, "a")
    assert "csvfs cluster create" in bare.fails("drive", "add", *paths)
    bare.run("cluster", "create", "lab")
    assert "csvfs pool create" in bare.fails("drive", "add", *paths)
    assert formatted == []


# ---------------------------------------------------------------- creating volumes


def test_a_volume_is_created_and_waited_for(three_nodes: Cluster, coordinators: None) -> None:
    result = three_nodes.run(
        "volume", "create", "Volume1", "--resiliency", "mirror", "--copies", "3", "--size", "2G"
    )
    assert result.exit_code == 0, result.output
    assert (
        result.stdout == f"volume Volume1 (mirror x3) is online at {three_nodes.top}/clusterstorage/Volume1\n"
    )
    value = three_nodes.value("volumes/Volume1")
    assert (value["resiliency"], value["copies"], value["size"]) == ("mirror", 3, 2 * GIB)
    assert len(value["id"]) == 16
    assert "already a volume Volume1" in three_nodes.fails("volume", "create", "Volume1")


def test_a_mirror_has_three_copies_unless_told_otherwise(three_nodes: Cluster, coordinators: None) -> None:
    assert three_nodes.json("volume", "create", "Volume1")["copies"] == 3
    assert three_nodes.json("volume", "create", "Volume2", "--copies", "2")["copies"] == 2
    assert three_nodes.json("volume", "create", "Volume3", "--resiliency", "simple")["copies"] == 1


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        (0, (), "a 3-way mirror needs 3 nodes with drives, there are none: csvfs drive add PATH..."),
        (
            1,
            (),
            "a 3-way mirror needs 3 nodes with drives, there is 1: add a node or use --resiliency simple",
        ),
        (2, (), "a 3-way mirror needs 3 nodes with drives, there are 2: add a node or use --copies 2"),
        (
            1,
            ("--copies", "2"),
            "a 2-way mirror needs 2 nodes with drives, there is 1: add a node or use --resiliency simple",
        ),
        (
            0,
            ("--resiliency", "simple"),
            "a simple volume needs 1 node with drives, there are none: csvfs drive add PATH...",
        ),
    ],
)
def test_too_few_nodes_with_drives_say_how_many_are_needed_and_what_would_do(
    cluster: Cluster, nodes: int, options: tuple[str, ...], message: str
) -> None:
    for index in range(nodes):
        cluster.add_node(f"n{index + 1}")
    cluster.add_node("empty", drives=0)
    assert cluster.fails("volume", "create", "Volume1", *options) == message
    assert cluster.value("volumes/Volume1") is None


def test_nodes_that_are_down_or_have_only_bad_drives_do_not_count(cluster: Cluster) -> None:
    cluster.add_node("n1")
    cluster.add_node("n2", alive=False)
    cluster.add_node("n3", state="failed")
    message = cluster.fails("volume", "create", "Volume1")
    assert "there is 1 (down: n2)" in message


def test_two_nodes_in_one_rack_are_one_fault_domain(three_nodes: Cluster) -> None:
    for node in ("n2", "n3"):
        three_nodes.put(f"nodes/{node}", address="127.0.0.1", place={"rack": "b"})
    message = three_nodes.fails("volume", "create", "Volume1", "--fault-domain", "rack")
    assert message.startswith("a 3-way mirror needs 3 racks with drives, there are 2 (n1, rack b): add a node")
    assert "use --copies 2 or use --fault-domain chassis" in message


@pytest.mark.parametrize("name", ["", "-x", "_x", "a b", "a/b", "..", "ä", "x" * 33])
def test_a_volume_of_an_impossible_name_is_refused(three_nodes: Cluster, name: str) -> None:
    assert "use 1 to 32 letters" in three_nodes.fails("volume", "create", "--", name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--copies", "1"), "2 or 3 copies, not 1"),
        (("--copies", "4"), "2 or 3 copies, not 4"),
        (("--resiliency", "simple", "--copies", "2"), "a simple volume has one copy"),
        (("--size", "63M"), "too small: at least 64.0 MiB"),
        (("--size", "99999999T"), "larger than any pool"),
    ],
)
def test_impossible_volumes_are_refused(three_nodes: Cluster, options: tuple[str, ...], message: str) -> None:
    assert message in three_nodes.fails("volume", "create", "Volume1", *options)
    assert three_nodes.value("volumes/Volume1") is None


def test_a_volume_needs_a_pool_first(bare: Cluster) -> None:
    bare.run("cluster", "create", "lab")
    assert "csvfs pool create" in bare.fails("volume", "create", "Volume1")


def test_the_reason_why_a_volume_could_not_be_created_is_shown(three_nodes: Cluster) -> None:
    def react(change: Change, value: dict[str, Any]) -> list[tuple[str, dict[str, Any] | None]]:
        if value["state"] == "creating" and "error" not in value:
            return [(change.key, {**value, "error": "no drive of n2 has a free slot"})]
        return []

    with Coordinators(three_nodes.path, react):
        message = three_nodes.fails("volume", "create", "Volume1")
    assert "no drive of n2 has a free slot" in message
    assert "csvfs volume delete Volume1 --yes" in message


def test_a_volume_that_does_not_come_online_times_out_with_a_next_step(three_nodes: Cluster) -> None:
    message = three_nodes.fails("volume", "create", "Volume1", "--timeout", "1")
    assert "not online after 1 s" in message
    assert "csvfs status" in message


def test_a_volume_still_being_deleted_cannot_be_created_again(three_nodes: Cluster) -> None:
    three_nodes.add_volume("Volume1", state="deleting")
    assert "still being deleted" in three_nodes.fails("volume", "create", "Volume1")


# ---------------------------------------------------------------- volumes that are there


def test_an_unknown_volume_is_answered_with_those_that_there_are(three_nodes: Cluster) -> None:
    three_nodes.add_volume("Volume1")
    for command in (("status", "X"), ("delete", "X"), ("delete", "X", "--yes"), ("move", "X", "n1")):
        assert "no volume 'X'; there are: Volume1" in three_nodes.fails("volume", *command)


def test_volume_status_says_why_its_health_is_unknown(three_nodes: Cluster) -> None:
    three_nodes.add_volume("Volume1")
    result = three_nodes.run("volume", "status", "Volume1")
    assert result.exit_code == 0
    assert "Unknown" in result.stdout
    assert "no coordinator at the moment" in result.stdout
    assert three_nodes.json("volume", "status", "Volume1")["volume"]["health"] == "Unknown"
    assert [row["name"] for row in three_nodes.json("volume", "list")] == ["Volume1"]


def test_a_volume_is_moved_to_a_node(three_nodes: Cluster, coordinators: None) -> None:
    three_nodes.add_volume("Volume1")
    assert (
        three_nodes.run("volume", "move", "Volume1", "n2").stdout == "volume Volume1 is coordinated by n2\n"
    )
    assert three_nodes.value("volumes/Volume1")["preferred"] == "n2"


def test_a_volume_is_moved_only_to_a_node_that_is_up(three_nodes: Cluster) -> None:
    three_nodes.add_volume("Volume1")
    three_nodes.delete("alive/n3")
    assert "n3 is down" in three_nodes.fails("volume", "move", "Volume1", "n3")
    assert "no node 'n9'; there are: n1, n2, n3" in three_nodes.fails("volume", "move", "Volume1", "n9")
    assert three_nodes.value("volumes/Volume1").get("preferred") is None


def test_a_volume_that_is_not_online_is_not_moved(three_nodes: Cluster) -> None:
    three_nodes.add_volume("Volume1", state="creating")
    assert "Volume1 is creating" in three_nodes.fails("volume", "move", "Volume1", "n2")


@pytest.fixture
def files_in_volume(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the coordinator answers to `statfs`: set [0]."""
    answer: list[Any] = [{"files": 100, "files_free": 99}]

    async def coordinator(self: object, view: object, volume: str, name: str, **args: Any) -> Any:
        if name == "volume_status":
            return {"sessions": []}  # nobody uses it
        assert name == "statfs"
        return answer[0]

    monkeypatch.setattr("csvfs.admin.peers.Peers.coordinator", coordinator)
    return answer


def test_an_empty_volume_is_deleted(
    three_nodes: Cluster, coordinators: None, files_in_volume: list[Any]
) -> None:
    three_nodes.add_volume("Volume1")
    assert three_nodes.run("volume", "delete", "Volume1").stdout == "volume Volume1 is deleted\n"
    assert three_nodes.value("volumes/Volume1") is None


def test_a_volume_that_is_not_empty_is_deleted_only_with_yes(
    three_nodes: Cluster, coordinators: None, files_in_volume: list[Any]
) -> None:
    three_nodes.add_volume("Volume1")
    files_in_volume[0] = {"files": 100, "files_free": 92}
    assert "holds 7 files and directories: use --yes" in three_nodes.fails("volume", "delete", "Volume1")
    assert three_nodes.value("volumes/Volume1")["state"] == "online"
    assert three_nodes.run("volume", "delete", "Volume1", "--yes").exit_code == 0
    assert three_nodes.value("volumes/Volume1") is None


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {},
        {"files": "many", "files_free": None},
        {"files": 9, "files_free": 9},
        {"files": 1, "files_free": 9},
    ],
)
def test_a_volume_whose_emptiness_nobody_can_tell_is_not_deleted(
    three_nodes: Cluster, files_in_volume: list[Any], answer: Any
) -> None:
    three_nodes.add_volume("Volume1")
    files_in_volume[0] = answer
    assert "cannot find out whether volume Volume1 is empty" in three_nodes.fails(
        "volume", "delete", "Volume1"
    )
    assert three_nodes.value("volumes/Volume1")["state"] == "online"


def test_a_volume_without_coordinator_is_not_deleted_without_yes(three_nodes: Cluster) -> None:
    three_nodes.add_volume("Volume1")
    assert "no coordinator at the moment" in three_nodes.fails("volume", "delete", "Volume1")
    assert three_nodes.value("volumes/Volume1")["state"] == "online"


async def test_a_volume_created_anew_under_the_name_is_not_deleted_in_its_place(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path / "store.db")
    await store.put("volumes/V", pack_value({"id": b"new".ljust(16), "name": "V", "state": "online"}))
    with pytest.raises(Conflict, match="nothing was done"):
        await volume_ops.mark_deleting(store, "V", b"old".ljust(16))
    await store.close()


async def test_a_change_lost_to_somebody_else_is_decided_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading and writing another changes the key: the change is made on top of his."""
    store = EmbeddedStore(tmp_path / "store.db")
    await store.put("volumes/V", pack_value({"name": "V", "state": "online"}))
    calls = 0
    transact = store.transact

    async def raced(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            await store.put("volumes/V", pack_value({"name": "V", "state": "online", "preferred": "n2"}))
        return await transact(*args)

    monkeypatch.setattr(store, "transact", raced)
    await volume_ops.change_volume(store, "V", lambda volume: volume.packed_with(size=5))
    item = await store.get("volumes/V")
    assert item is not None
    assert unpack_value(item.value) == {"name": "V", "state": "online", "preferred": "n2", "size": 5}
    await store.close()


# ---------------------------------------------------------------- waiting and failing


async def test_a_mount_that_does_not_come_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(TimedOut, match="not mounted at"):
        await wait_mounted(tmp_path, 0.01)


def test_errors_of_a_nursery_are_one_line_unless_one_of_them_is_a_bug() -> None:
    expected = ExceptionGroup("x", [NotFound("no pool"), ExceptionGroup("y", [TimedOut("late")])])
    assert expected_failure(expected) == "no pool"
    assert expected_failure(ExceptionGroup("x", [NotFound("no pool"), KeyError("bug")])) is None
    assert expected_failure(FileNotFoundError(2, "No such file", "/x")) == "/x: No such file"


# ---------------------------------------------------------------- the lab


@pytest.fixture
def lab_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls that reach lab.py, which is tested by itself."""
    calls: list[tuple[Any, ...]] = []

    def record(name: str, result: Any = None) -> None:
        def call(*args: Any, **options: Any) -> Any:
            calls.append((name, *args, *([options] if options else [])))
            return result

        monkeypatch.setattr(f"csvfs.admin.cli_lab.lab.{name}", call)

    nodes = [
        {"name": "n1", "address": "10.77.0.1", "state": "up", "cut_from": ["n2"], "processes": {"node": [7], "mount": [8, 9]}},
        {"name": "n2", "address": "10.77.0.2", "state": "partitioned", "cut_from": [], "processes": {}},
    ]
    for name in ("lab_up", "lab_kill", "lab_start", "lab_partition", "lab_heal", "lab_down"):
        record(name)
    record("lab_exec", 3)
    record("lab_status", {"directory": "/lab", "store": "embedded", "nodes": nodes})
    return calls


LAB = Path("/lab")
UP = {"nodes": 3, "drives": 3, "drive_size": 4 * GIB, "store": "embedded", "tls": True}


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (("up", "--dir", "/lab"), ("lab_up", LAB, UP)),
        (
            ("up", "--dir", "/lab", "--nodes", "5", "--drives", "1", "--drive-size", "1G"),
            ("lab_up", LAB, {**UP, "nodes": 5, "drives": 1, "drive_size": GIB}),
        ),
        (("up", "--dir", "/lab", "--no-tls"), ("lab_up", LAB, {**UP, "tls": False})),
        (("kill", "n1", "--dir", "/lab"), ("lab_kill", LAB, "n1", "all")),
        (("kill", "--dir", "/lab", "n1", "--role", "drives"), ("lab_kill", LAB, "n1", "drives")),
        (("start", "n1", "--dir", "/lab"), ("lab_start", LAB, "n1")),
        (("partition", "n1", "--dir", "/lab"), ("lab_partition", LAB, "n1", None, {"one_way": False})),
        (("partition", "n1", "n2", "--one-way", "--dir", "/lab"), ("lab_partition", LAB, "n1", "n2", {"one_way": True})),
        (("heal", "--dir", "/lab"), ("lab_heal", LAB)),
        (("down", "--dir", "/lab"), ("lab_down", LAB)),
    ],
)
def test_lab_commands_reach_the_lab(
    bare: Cluster, lab_calls: list[tuple[Any, ...]], arguments: tuple[str, ...], call: tuple[Any, ...]
) -> None:
    assert bare.run("lab", *arguments).exit_code == 0
    assert lab_calls == [call]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--dir", "/lab", "n1", "--", "ls", "-l", "--dir", "x", "--"),
        ("n1", "--dir", "/lab", "--", "ls", "-l", "--dir", "x", "--"),
    ],
)
def test_lab_exec_passes_on_everything_behind_the_dashes_and_the_exit_status(
    bare: Cluster, lab_calls: list[tuple[Any, ...]], arguments: tuple[str, ...]
) -> None:
    assert bare.run("lab", "exec", *arguments).exit_code == 3
    assert lab_calls == [("lab_exec", LAB, "n1", ["ls", "-l", "--dir", "x", "--"])]


def test_lab_status_names_processes(bare: Cluster, lab_calls: list[tuple[Any, ...]]) -> None:
    text = bare.run("lab", "status").stdout
    assert "mount 8 9, node 7" in text
    assert "partitioned" in text and "up, cut from n2" in text
    assert bare.json("lab", "status")["nodes"][0]["processes"] == {"node": [7], "mount": [8, 9]}


@pytest.mark.parametrize(
    "arguments",
    [
        ("up", "--nodes", "0"),
        ("up", "--nodes", "17"),
        ("up", "--drives", "0"),
        ("up", "--drive-size", "x"),
        ("up", "--store", "sqlite"),
        ("kill", "n1", "--role", "cleaner"),
        ("exec", "n1"),
        ("exec",),
        ("start",),
    ],
)
def test_impossible_labs_are_wrong_usage(
    bare: Cluster, lab_calls: list[tuple[Any, ...]], arguments: tuple[str, ...]
) -> None:
    assert bare.misused("lab", *arguments)
    assert lab_calls == []


def test_lab_drives_that_hold_no_slab_are_refused(bare: Cluster, lab_calls: list[tuple[Any, ...]]) -> None:
    assert "too small: at least 128.0 MiB" in bare.fails("lab", "up", "--drive-size", "1M")
    assert lab_calls == []


@pytest.mark.parametrize("verb", [("status",), ("exec", "n1", "--", "true"), ("kill", "n1"), ("heal",)])
def test_a_lab_that_is_not_there_is_one_line(bare: Cluster, verb: tuple[str, ...]) -> None:
    assert bare.fails("lab", verb[0], "--dir", str(LAB / "absent"), *verb[1:])
