"""The metadata check of a volume in use: each kind of damage is found and mended, and a healthy busy volume shows none."""

import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator import metadata_check
from coordinator.consistency import check as check_all
from coordinator.metadata import Metadata
from coordinator.metadata_check import Finding, MetadataCheck
from coordinator.metadata_repair import MetadataRepair
from coordinator.namespace import RENAME_EXCHANGE
from csvfs.errors import CsvfsError
from tests.metadata_members import TestVolume
from tests.test_service import cluster_of

FILE, DIRECTORY, SYMLINK = 0o100644, 0o040755, 0o120777
INO = 0


@pytest.fixture
def volume() -> TestVolume:
    """/d with f (and its second name g), /d/below with deep, /l a symlink, /x with attributes, /big with blocks."""
    volume = TestVolume(data_slabs=2)
    with volume.batch() as metadata:
        directory = make(metadata, 1, b"d", DIRECTORY)
        file = make(metadata, directory, b"f")
        metadata.link(file, directory, b"g", 2)
        below = make(metadata, directory, b"below", DIRECTORY)
        make(metadata, below, b"deep")
        metadata.make(1, b"l", SYMLINK, 0, 0, 0, b"target", 1)
        metadata.setxattr(make(metadata, 1, b"x"), b"user.a", b"1", 0, 3)
        metadata.allocate(make(metadata, 1, b"big"), 0, 40, 40 * 4096, 0, 4)
    return volume


def make(metadata: Metadata, parent: int, name: bytes, mode: int = FILE) -> int:
    return metadata.make(parent, name, mode, 0, 0, 0, b"", 1)[INO]


def found_in(metadata: Metadata, step: Callable[[int], None] = lambda number: None) -> MetadataCheck:
    """A whole check; `step` is what others do after each of its steps."""
    run = MetadataCheck(metadata)
    for number, _ in enumerate(run.steps()):
        step(number)
    return run


def mend(volume: TestVolume) -> list[tuple[Finding, str]]:
    """As check_desk.py does."""
    done = []
    for _ in range(4):
        findings = found_in(volume.metadata).findings
        repair = MetadataRepair(volume.metadata)
        before = len(done)
        for finding in findings:
            if repair.can(finding):
                repair.inodes_of(finding)
                with volume.batch():
                    said = repair.mend(finding, 99)
                if said:
                    done.append((finding, said))
        if len(done) == before:
            break
    trims = volume.metadata.take_trims(100, volume.metadata.trim_mark())
    volume.metadata.trims_done(trims)
    with volume.batch():
        pass
    return done


def damage(volume: TestVolume, *statements: str) -> None:
    with volume.batch() as metadata:
        for statement in statements:
            metadata.database.run(statement)
    volume.metadata = volume.reopened()  # nothing of it is in memory


DAMAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "a link count": ("links", ("UPDATE inodes SET nlink = 3 WHERE ino = 3",)),
    "the link count of a directory": ("links", ("UPDATE inodes SET nlink = 9 WHERE ino = 2",)),
    "a name that is gone": ("links", ("DELETE FROM entries WHERE name = CAST('g' AS BLOB)",)),
    "the only name": ("nameless", ("DELETE FROM entries WHERE name = CAST('deep' AS BLOB)",)),
    "the name of a directory": ("nameless", ("DELETE FROM entries WHERE name = CAST('d' AS BLOB)",)),
    "an inode that is gone": (
        "entry", ("DELETE FROM inodes WHERE ino = 5", "UPDATE counters SET files = files - 1")),
    "a directory that is gone": (
        "entry", ("DELETE FROM inodes WHERE ino = 4", "UPDATE counters SET files = files - 1")),
    "an entry in the wrong place": ("entry", ("UPDATE entries SET cookie = cookie + 1024 WHERE name = CAST('f' AS BLOB)",)),
    "a name twice": (
        "entry", ("INSERT INTO entries SELECT parent, cookie + 1, name, ino FROM entries WHERE name = CAST('f' AS BLOB)",)),
    "a `..`": ("dotdot", ("UPDATE inodes SET parent = 1 WHERE ino = 4",)),
    "a directory with two names": (
        "names", ("UPDATE entries SET ino = 4 WHERE name = CAST('big' AS BLOB)",)),
    "a circle of directories": (
        "detached", ("UPDATE entries SET parent = 4 WHERE parent = 1 AND ino = 2", "UPDATE inodes SET parent = 4 WHERE ino = 2",
                     "UPDATE inodes SET nlink = nlink - 1 WHERE ino = 1", "UPDATE inodes SET nlink = 3 WHERE ino = 4")),
    "an orphan that is not listed": (
        "orphan", ("DELETE FROM entries WHERE name = CAST('deep' AS BLOB)", "UPDATE inodes SET nlink = 0 WHERE ino = 5")),
    "an orphan with a name": ("orphan", ("INSERT INTO orphans(ino) VALUES(3)",)),
    "an orphan that does not exist": ("rows", ("INSERT INTO orphans(ino) VALUES(777)",)),
    "attributes of nobody": ("rows", ("INSERT INTO xattrs VALUES(777, CAST('user.a' AS BLOB), CAST('1' AS BLOB))",)),
    "a target of nobody": ("rows", ("INSERT INTO symlinks VALUES(777, CAST('x' AS BLOB))",)),
    "a target of a file": ("target", ("INSERT INTO symlinks VALUES(3, CAST('x' AS BLOB))",)),
    "locks of nobody": ("rows", ("INSERT INTO locks VALUES(777, 1, 0, 1, 0, 9, 1, 1, 1)",)),
    "locks of a session that is over": ("locks", ("INSERT INTO locks VALUES(3, 77, 0, 1, 0, 9, 1, 1, 1)",)),
    "a count of attributes": ("xattrs", ("UPDATE inodes SET xattrs = 0 WHERE xattrs = 1",)),
    "a count of blocks": ("blocks", ("UPDATE inodes SET blocks = 7 WHERE blocks = 40",)),
    "blocks of a file without any": ("blocks", ("UPDATE inodes SET blocks = 7 WHERE ino = 3",)),
    "blocks that leaked": (
        "slab", ("UPDATE slabs SET bitmap = CAST(x'ff' || substr(bitmap, 2) AS BLOB), free = free - 8 WHERE id = 2",
                 "UPDATE counters SET free_blocks = free_blocks - 8")),
    "blocks that count as free": ("slab", (
        "UPDATE slabs SET bitmap = CAST(x'00' || substr(bitmap, 2) AS BLOB), free = free + 8 WHERE id = 1",
        "UPDATE counters SET free_blocks = free_blocks + 8")),
    "a count of free blocks": ("slab", ("UPDATE slabs SET free = free - 5 WHERE id = 1",)),
    "extents of nobody": (
        "extents", ("UPDATE extents SET ino = 777 WHERE ino = 8", "UPDATE inodes SET blocks = 0 WHERE ino = 8")),
    "the number of files": ("counters", ("UPDATE counters SET files = files + 4",)),
    "the number of blocks": ("counters", ("UPDATE counters SET used_blocks = used_blocks + 4",)),
    "a number that would be used twice": ("counters", ("UPDATE counters SET next_ino = 3",)),
}  # fmt: skip


def test_a_healthy_volume_shows_nothing(volume: TestVolume) -> None:
    run = found_in(volume.metadata)
    assert (run.findings, run.unchecked, run.skipped) == ([], 0, [])
    assert mend(volume) == []


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_found_and_mended(volume: TestVolume, what: str) -> None:
    kind, statements = DAMAGES[what]
    damage(volume, *statements)
    kinds = [finding.kind for finding in found_in(volume.metadata).findings]
    assert kind in kinds, kinds
    done = mend(volume)
    assert kind in [finding.kind for finding, _ in done]
    assert found_in(volume.metadata).findings == []
    assert check_all(volume.metadata) == []
    assert check_all(volume.reopened()) == []


def test_what_has_lost_its_name_is_found_in_lost_and_found(volume: TestVolume) -> None:
    damage(volume, *DAMAGES["the name of a directory"][1])
    mend(volume)
    home = volume.metadata.lookup(1, b"lost+found")
    assert home is not None and stat.S_IMODE(home[1]) == 0o700
    found = volume.metadata.lookup(home[INO], b"#2")
    assert found is not None
    assert sorted(name for _, name, _ in volume.metadata.readdir(found[INO], 0, 10)[0]) == [b"below", b"f", b"g"]


@pytest.mark.parametrize(
    ("kind", "statement"),
    [
        ("shared", "UPDATE extents SET slab_block = slab_block - 3 WHERE ino = 9"),
        ("extent", "UPDATE extents SET slab = 99 WHERE ino = 9"),
        ("extent", "UPDATE extents SET slab_block = 1000000 WHERE ino = 9"),
        ("target", "DELETE FROM symlinks"),
        ("no file", "UPDATE extents SET ino = 2 WHERE ino = 9"),
    ],
)
def test_what_cannot_be_mended_is_said_and_left(volume: TestVolume, kind: str, statement: str) -> None:
    with volume.batch() as metadata:
        other = make(metadata, 1, b"other")
        assert other == 9
        metadata.allocate(other, 0, 8, 8 * 4096, 0, 4)
    damage(volume, statement)
    before = volume.metadata.database.rows("SELECT * FROM extents")
    assert kind in [finding.kind for finding in found_in(volume.metadata).findings]
    mend(volume)
    assert kind in [finding.kind for finding in found_in(volume.metadata).findings]
    assert volume.metadata.database.rows("SELECT * FROM extents") == before


class Busy:
    """Programs: they make, link, rename, exchange, remove, write and truncate, in batches, at random."""

    def __init__(self, volume: TestVolume, seed: int) -> None:
        self.volume = volume
        self.pick = random.Random(seed)
        self.directories = [1]

    def batch(self, number: int = 0) -> None:
        for trim in self.volume.metadata.take_trims(50, self.volume.metadata.trim_mark()):
            self.volume.metadata.trims_done([trim])
        with self.volume.batch() as metadata:
            for _ in range(self.pick.randrange(6)):
                self._one(metadata)

    def _one(self, metadata: Metadata) -> None:
        pick, now = self.pick, 5
        directory, other = pick.choice(self.directories), pick.choice(self.directories)
        name, new_name = b"%d" % pick.randrange(30), b"%d" % pick.randrange(30)
        try:
            what = pick.randrange(8)
            if what == 0 and len(self.directories) < 8:
                self.directories.append(make(metadata, directory, b"d%d" % pick.randrange(10), DIRECTORY))
            elif what <= 2:
                ino = make(metadata, directory, name)
                metadata.allocate(ino, 0, pick.randrange(1, 20), 0, 0, now)
            elif what == 3:
                attr = metadata.lookup(directory, name)
                if attr is not None:
                    metadata.link(attr[INO], other, new_name, now)
            elif what == 4:
                metadata.rename(directory, b"d%d" % pick.randrange(10), other, b"d%d" % pick.randrange(10), 0, now)
            elif what == 5:
                ino, replaced, links = metadata.rename(directory, name, other, new_name, pick.choice((0, RENAME_EXCHANGE)), now)
                if replaced and not links:
                    metadata.drop_orphan(replaced)
            elif what == 6:
                ino, links = metadata.unlink(directory, name, False, now)
                if not links:
                    metadata.drop_orphan(ino)
            else:
                attr = metadata.lookup(directory, name)
                if attr is not None and attr[2]:
                    metadata.setattr(attr[INO], size=4096 * pick.randrange(4), now_ns=now)
        except CsvfsError:
            pass  # a program asked for what cannot be


@pytest.mark.parametrize("seed", range(10))
def test_no_false_alarm_while_programs_are_at_work(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Steps and windows as small as can be, so that everything changes in the middle of everything."""
    monkeypatch.setattr(metadata_check, "ROWS_PER_STEP", 8)
    monkeypatch.setattr(metadata_check, "WINDOW_INODES", 80)
    monkeypatch.setattr(metadata_check, "WINDOW_SLABS", 2)
    volume = TestVolume(slabs=8, data_slabs=3)
    busy = Busy(volume, seed)
    for _ in range(60):
        busy.batch()
    checked = 0
    for _ in range(2):
        run = found_in(volume.metadata, busy.batch)
        assert run.findings == []
        checked += run.rows
    assert checked > 400
    assert check_all(volume.metadata) == []


@pytest.mark.parametrize("what", ["a link count", "the only name", "a circle of directories", "a count of attributes"])
def test_damage_is_found_while_programs_are_at_work(volume: TestVolume, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(metadata_check, "ROWS_PER_STEP", 3)
    kind, statements = DAMAGES[what]
    damage(volume, *statements)
    busy = Busy(volume, 7)
    assert kind in [finding.kind for finding in found_in(volume.metadata, busy.batch).findings]


def test_a_volume_of_several_windows_is_checked_as_one(volume: TestVolume, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata_check, "ROWS_PER_STEP", 2)
    monkeypatch.setattr(metadata_check, "WINDOW_INODES", 3)
    monkeypatch.setattr(metadata_check, "WINDOW_SLABS", 1)
    assert found_in(volume.metadata).findings == []
    damage(volume, "UPDATE inodes SET nlink = 5 WHERE ino IN (3, 5)", "UPDATE slabs SET free = 1 WHERE id = 2")
    assert [finding.kind for finding in found_in(volume.metadata).findings].count("links") == 2
    assert "slab" in [finding.kind for finding in found_in(volume.metadata).findings]


# -- at a coordinator


async def checked(cluster: Any, *, repair: bool) -> dict[str, Any]:
    desk = (await cluster.wait_serving()).check_desk
    desk.ask(True, repair)
    await cluster.wait(lambda: desk.ask(False, False)["state"] != "running")
    answer: dict[str, Any] = desk.ask(False, False)
    return answer


async def test_a_coordinator_mends_what_was_damaged_and_mounts_see_it(tmp_path: Path) -> None:
    async with cluster_of(tmp_path) as cluster:
        mount = await cluster.mount("n1")
        ino = await mount.make(b"file")
        await mount.call("readdir", ino=1, cookie=0, limit=10)
        service = await cluster.wait_serving()
        assert (await checked(cluster, repair=False))["found"] == 0
        database = service.dispatch._metadata.database
        await service.batches.run(lambda: database.run("DELETE FROM entries WHERE ino = ?", (ino,)))
        answer = await checked(cluster, repair=False)
        assert (answer["state"], answer["found"], answer["mended"]) == ("done", 1, [])
        mount.recalls.clear()
        answer = await checked(cluster, repair=True)
        assert answer["found"] == 0
        assert [kind for kind, _, _ in answer["mended"]] == ["nameless"]
        assert {recall["ino"] for recall in mount.recalls} >= {1, ino}
        home = (await mount.call("lookup", parent=1, name=b"lost+found"))["attr"]
        assert (await mount.call("lookup", parent=home[INO], name=b"#%d" % ino))["attr"][INO] == ino


async def test_an_orphan_that_somebody_has_open_is_in_order_and_one_that_nobody_has_is_let_go(tmp_path: Path) -> None:
    async with cluster_of(tmp_path) as cluster:
        mount = await cluster.mount("n1")
        ino = await mount.make(b"file")
        await mount.change("unlink", parent=1, name=b"file", directory=False)
        assert (await checked(cluster, repair=False))["found"] == 0
        service = await cluster.wait_serving()
        service._janitor._orphans.clear()
        await mount.call("release", items=[[ino, 0]])
        assert [kind for kind, _ in (await checked(cluster, repair=False))["findings"]] == ["forgotten"]
        await checked(cluster, repair=True)
        await cluster.wait(lambda: service.dispatch._metadata.orphans() == [])
