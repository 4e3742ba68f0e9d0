"""The commands that change volumes in use: what they ask the coordinator for, and what they say."""

from pathlib import Path
from typing import Any

import pytest

from csvfs.errors import NoSpace, Unavailable
from csvfs.units import GIB, MIB
from tests.test_cli import Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    cluster = Cluster(tmp_path)
    assert cluster.run("cluster", "create", "lab").exit_code == 0
    assert cluster.run("pool", "create").exit_code == 0
    cluster.add_volume("v")
    return cluster


class Coordinator:
    """Answers `volume_set` as one that agrees to everything, or with `error`."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.answer: Any = {
            "size": 0, "copies": 3, "min_copies": 1, "used": 5 * GIB, "to_copy": 0, "to_drop": 0
        }  # fmt: skip

    async def call(self, view: Any, volume: str, name: str, timeout_s: float, **args: Any) -> Any:
        assert (volume, name) == ("v", "volume_set")
        self.asked.append(args)
        if self.error is not None:
            raise self.error
        return {**self.answer, **args} if isinstance(self.answer, dict) else self.answer


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    coordinator = Coordinator()

    async def slowly(self: object, *args: Any, **more: Any) -> Any:
        return await coordinator.call(*args, **more)

    monkeypatch.setattr("csvfs.admin.peers.Peers.coordinator_slowly", slowly)
    return coordinator


def test_a_volume_is_resized_by_its_coordinator(cluster: Cluster, coordinator: Coordinator) -> None:
    assert "volume v is 20.0 GiB now, 5.0 GiB are used" in cluster.run("volume", "resize", "v", "--size", "20G").stdout
    assert "volume v is as large as the pool now" in cluster.run("volume", "resize", "v", "--size", "0").stdout
    assert coordinator.asked == [{"size": 20 * GIB}, {"size": 0}]
    assert cluster.json("volume", "resize", "v", "--size", "64M")["size"] == 64 * MIB
    assert "--size" in cluster.misused("volume", "resize", "v")
    assert "is not a size" in cluster.misused("volume", "resize", "v", "--size", "much")


def test_a_refusal_is_one_line_with_the_numbers_of_the_coordinator(
    cluster: Cluster, coordinator: Coordinator
) -> None:
    coordinator.error = NoSpace("volume v cannot be made 1.0 GiB: its files use 5.0 GiB")
    assert cluster.fails("volume", "resize", "v", "--size", "1G") == str(coordinator.error)
    coordinator.error = Unavailable("it is busy")
    assert cluster.fails("volume", "set", "v", "--copies", "2") == "it is busy"


def test_copies_are_changed_and_the_work_that_follows_is_said(
    cluster: Cluster, coordinator: Coordinator
) -> None:
    coordinator.answer["to_copy"] = 640 * MIB
    said = cluster.run("volume", "set", "v", "--copies", "3").stdout
    assert said == "volume v: 3 copies, writes want 1 in sync; 640.0 MiB to be copied: csvfs job watch --volume v\n"
    coordinator.answer |= {"to_copy": 0, "to_drop": 64 * MIB}
    said = cluster.run("volume", "set", "v", "--copies", "2", "--min-copies", "2").stdout
    assert "2 copies, writes want 2 in sync; 64.0 MiB to be given back" in said
    assert coordinator.asked == [{"copies": 3}, {"copies": 2, "min_copies": 2}]
    assert cluster.json("volume", "set", "v", "--min-copies", "2")["min_copies"] == 2
    assert "say what to change" in cluster.misused("volume", "set", "v")
    assert "Invalid value" in cluster.misused("volume", "set", "v", "--copies", "4")
    assert "Invalid value" in cluster.misused("volume", "set", "v", "--min-copies", "0")


def test_an_answer_that_is_none_is_one_line(cluster: Cluster, coordinator: Coordinator) -> None:
    for nonsense in (None, [1], {"size": "large"}):
        coordinator.answer = nonsense
        assert "answers volume_set with" in cluster.fails("volume", "set", "v", "--copies", "2")


def test_only_a_volume_that_is_online_and_coordinated_is_changed(cluster: Cluster) -> None:
    cluster.add_volume("new", state="creating")
    assert "new is creating: only one that is online" in cluster.fails("volume", "resize", "new", "--size", "1G")
    assert "no volume 'w'" in cluster.fails("volume", "set", "w", "--copies", "2")
    assert "v has no coordinator at the moment" in cluster.fails("volume", "set", "v", "--copies", "2")


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the coordinator says of the volume's mounts."""
    rows: list[dict[str, Any]] = []

    async def call(self: object, view: object, volume: str, name: str, **args: Any) -> Any:
        return {"sessions": rows, "files": 2, "files_free": 1}

    monkeypatch.setattr("csvfs.admin.peers.Peers.coordinator", call)
    return rows


def test_a_volume_with_open_files_is_not_deleted_unless_forced(
    cluster: Cluster, sessions: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csvfs.admin.cli_volume.DELETE_TIMEOUT_S", 0.01)
    sessions += [{"node": "n2", "open_files": 3, "connected": True}, {"node": "n1", "open_files": 0}]
    said = cluster.fails("volume", "delete", "v", "--yes")
    assert said.startswith("volume v is in use, files are open: 3 on n2; stop the programs")
    sessions[0]["open_files"] = None
    assert "not known yet whether files of volume v are open on n2" in cluster.fails("volume", "delete", "v", "--yes")
    assert cluster.value("volumes/v")["state"] == "online"
    assert "still being deleted" in cluster.fails("volume", "delete", "v", "--yes", "--force")
    assert cluster.value("volumes/v")["state"] == "deleting"


def test_a_volume_that_nobody_uses_or_can_tell_of_is_deleted(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csvfs.admin.cli_volume.DELETE_TIMEOUT_S", 0.01)
    assert "still being deleted" in cluster.fails("volume", "delete", "v", "--yes")


def test_repair_says_what_there_is_to_do_or_that_there_is_nothing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer: dict[str, Any] = {"health": "Healthy", "jobs": []}

    async def call(self: object, view: object, volume: str, name: str, timeout_s: float) -> Any:
        return answer if name == "repair" else None

    monkeypatch.setattr("csvfs.admin.peers.Peers.coordinator_slowly", call)
    assert cluster.run("volume", "repair", "v").stdout == "volume v is Healthy: nothing is to be repaired\n"
    row = {"kind": "repair", "what": "rebuild of drive ab on n1", "done": 0, "total": GIB, "waiting_for": "a drive"}
    answer |= {"health": "Degraded", "jobs": [row]}
    assert "v: rebuild of drive ab on n1, 0 % of 1.0 GiB, waiting for a drive" in cluster.run("volume", "repair", "v").stdout
    assert cluster.json("volume", "repair", "v")["jobs"][0]["waiting_for"] == "a drive"
    assert "no volume 'w'" in cluster.fails("volume", "repair", "w")


def test_a_preferred_node_is_said_shown_and_forgotten(cluster: Cluster) -> None:
    cluster.add_node("n2")
    said = cluster.run("volume", "set", "v", "--preferred", "n2").stdout
    assert said == "volume v is coordinated by n2 whenever it is up\n"
    assert "(preferred: n2)" in cluster.run("volume", "status", "v").stdout
    assert cluster.json("volume", "set", "v", "--preferred", "none") == {"name": "v", "preferred": None}
    assert cluster.json("volume", "status", "v")["volume"]["preferred"] == ""
    assert "no node 'n9'" in cluster.fails("volume", "set", "v", "--preferred", "n9")
    assert "--preferred alone" in cluster.misused("volume", "set", "v", "--preferred", "n2", "--copies", "2")
