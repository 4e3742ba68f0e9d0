"""The commands for drives that go and for jobs: what they change, and one clear line where they cannot."""

from pathlib import Path

import pytest

from csvfs.admin.cli_job import make_progress, note_text, show_jobs
from csvfs.admin.status import JobStatus
from csvfs.units import MIB
from tests.test_cli import Cluster

JOB = JobStatus("v", "rebuild of drive aabbccdd on n3", done=64 * MIB, total=256 * MIB, rate=float(16 * MIB))


@pytest.fixture
def pool(tmp_path: Path) -> Cluster:
    """Three nodes with a drive each, none of which answers."""
    cluster = Cluster(tmp_path)
    assert cluster.run("cluster", "create", "lab").exit_code == 0
    assert cluster.run("pool", "create").exit_code == 0
    for name in ("n1", "n2", "n3"):
        cluster.add_node(name)
    return cluster


def drive_of(cluster: Cluster, node: str) -> str:
    return str(next(row["id"] for row in cluster.json("drive", "list") if row["node"] == node))


def test_a_drive_is_retired_and_used_again_by_command(pool: Cluster) -> None:
    drive = drive_of(pool, "n2")
    assert "retired and being emptied" in pool.run("drive", "retire", drive[:8]).stdout
    assert pool.value(f"drives/{drive}")["usage"] == "retired"
    assert next(row["usage"] for row in pool.json("drive", "list") if row["id"] == drive) == "retired"
    assert pool.json("drive", "retire", "--undo", "/n2/0")["usage"] == "auto"
    assert next(row["usage"] for row in pool.json("drive", "list") if row["id"] == drive) == "auto"


def test_volumes_are_not_created_on_drives_that_are_retired(pool: Cluster) -> None:
    pool.run("drive", "retire", "/n2/0")
    assert "needs 3 nodes with drives, there are 2" in pool.fails("volume", "create", "v")


def test_drives_that_are_not_there_are_one_line(pool: Cluster) -> None:
    for verb in ("retire", "remove", "reset"):
        assert "no drive 'nonsense' in the pool; see csvfs drive list" in pool.fails(
            "drive", verb, "nonsense"
        )


def test_an_unused_drive_of_a_node_that_is_gone_is_removed_at_once(pool: Cluster) -> None:
    assert "is out of the pool" in pool.run("drive", "remove", "--yes", "/n2/0").stdout
    assert [row["node"] for row in pool.json("drive", "list")] == ["n1", "n3"]


def test_a_drive_is_not_removed_without_being_asked_twice(pool: Cluster) -> None:
    assert pool.run("drive", "remove", "/n2/0").exit_code == 1
    assert "usage" not in pool.value(f"drives/{drive_of(pool, 'n2')}")


def test_a_drive_is_not_removed_while_a_volume_cannot_be_asked_what_it_keeps_there(pool: Cluster) -> None:
    pool.add_volume("v")
    assert "volumes v have no coordinator at the moment" in pool.fails("drive", "remove", "--yes", "/n2/0")
    assert "usage" not in pool.value(f"drives/{drive_of(pool, 'n2')}")


def test_a_drive_is_reset_on_its_own_node_only(pool: Cluster) -> None:
    assert "attached to node n2: run this command there" in pool.fails("drive", "reset", "/n2/0")


def test_no_jobs_are_said_to_be_none(pool: Cluster) -> None:
    assert pool.json("job", "list") == []
    assert "no jobs" in pool.run("job", "list").stdout
    assert "no jobs are left" in pool.run("job", "watch").stdout
    assert "no volume 'other'" in pool.fails("job", "list", "--volume", "other")


def test_jobs_of_a_volume_without_coordinator_cannot_be_paused_and_that_is_one_line(pool: Cluster) -> None:
    pool.add_volume("v")
    assert "v has no coordinator at the moment" in pool.fails("job", "pause", "v")
    assert "no volume 'other'" in pool.fails("job", "resume", "other", "repair")
    assert "Invalid value" in pool.misused("job", "pause", "v", "lunch")
    assert "Invalid value" in pool.misused("job", "speed", "warp")
    assert "v has no coordinator" in pool.fails("pool", "optimize")


def test_a_job_that_is_watched_has_a_bar_until_it_is_over() -> None:
    shown, bars = make_progress(), {}
    show_jobs(shown, bars, [JOB])
    (task,) = shown.tasks
    assert (task.completed, task.total, task.percentage) == (64 * MIB, 256 * MIB, 25)
    assert task.fields["note"] == "16.0 MiB/s, 12 s left"
    show_jobs(shown, bars, [])
    assert shown.tasks == [] and bars == {}
    assert note_text(JobStatus("v", "x", waiting_for="a drive")) == "waiting for a drive"
