"""Files without a name (O_TMPFILE) and whiteouts, at the coordinator. On mounts: test_posix_lab.py."""

import stat

import pytest
import trio

from coordinator.consistency import check
from coordinator.janitor import DELAY_S
from coordinator.metadata import Metadata
from coordinator.namespace import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from csvfs.errors import BadRequest, Conflict, Exists, NotFound
from tests.coordinator_cluster import NAME, Mount
from tests.metadata_members import TestVolume
from tests.test_service import cluster_of

FILE, DIRECTORY = 0o100644, 0o040755
INO, MODE, NLINK, UID, GID, RDEV = range(6)


@pytest.fixture
def volume():
    volume = TestVolume()
    yield volume
    assert check(volume.metadata) == []
    assert check(volume.reopened()) == []


def make(metadata: Metadata, name: bytes | None, mode: int = FILE) -> int:
    return metadata.make(1, name, mode, 5, 5, 0, b"", 10)[INO]


def test_an_unnamed_file_is_an_orphan_that_link_gives_a_name(volume: TestVolume) -> None:
    with volume.batch() as metadata:
        before = metadata.getattr(1)
        same, later = make(metadata, None), make(metadata, None)
        assert metadata.getattr(1) == before and metadata.readdir(1, 0, 10)[0] == []
        metadata.link(same, 1, b"same batch", 11)
    assert metadata.orphans() == [later]
    with volume.batch() as metadata:
        assert metadata.link(later, 1, b"later", 11)[NLINK] == 1
        metadata.link(later, 1, b"again", 12)
    assert metadata.orphans() == []
    for ino in (same, later):
        with volume.batch() as metadata, pytest.raises(Conflict):
            metadata.drop_orphan(ino)


def test_an_unnamed_file_that_got_and_lost_a_name_gets_none_again(volume: TestVolume) -> None:
    with volume.batch() as metadata:
        ino = make(metadata, None)
        metadata.link(ino, 1, b"f", 11)
        metadata.unlink(1, b"f", False, 12)
        with pytest.raises(NotFound, match="deleted"):
            metadata.link(ino, 1, b"f", 13)
        assert metadata.drop_orphan(ino)


def test_a_link_that_fails_leaves_the_file_unnamed(volume: TestVolume) -> None:
    with volume.batch() as metadata:
        ino = make(metadata, None)
        make(metadata, b"taken")
        with pytest.raises(Exists):
            metadata.link(ino, 1, b"taken", 11)
        assert metadata.getattr(ino)[NLINK] == 0
        assert metadata.link(ino, 1, b"free", 11)[NLINK] == 1


def test_only_regular_files_are_made_without_a_name(volume: TestVolume) -> None:
    with volume.batch() as metadata:
        for mode in (DIRECTORY, stat.S_IFIFO | 0o600, stat.S_IFCHR | 0o600):
            with pytest.raises(BadRequest):
                make(metadata, None, mode)


def test_a_rename_may_leave_a_whiteout(volume: TestVolume) -> None:
    with volume.batch() as metadata:
        metadata.setattr(1, mode=0o2755, gid=77, now_ns=1)
        ino, other = make(metadata, b"a"), make(metadata, b"b")
        assert metadata.rename(1, b"a", 1, b"b", RENAME_WHITEOUT, 11, (7, 8)) == (ino, other, 0)
        whiteout = metadata.lookup(1, b"a")
        assert whiteout is not None
        assert whiteout[INO] not in (ino, other)
        assert (whiteout[MODE], whiteout[NLINK], whiteout[UID], whiteout[GID], whiteout[RDEV]) == (stat.S_IFCHR, 1, 7, 77, 0)
        with pytest.raises(Exists):
            metadata.rename(1, b"b", 1, b"a", RENAME_WHITEOUT | RENAME_NOREPLACE, 12)
        with pytest.raises(BadRequest):
            metadata.rename(1, b"b", 1, b"a", RENAME_WHITEOUT | RENAME_EXCHANGE, 12)
        metadata.rename(1, b"b", 1, b"c", RENAME_WHITEOUT | RENAME_NOREPLACE, 13)
        assert sorted(name for _, name, _ in metadata.readdir(1, 0, 10)[0]) == [b"a", b"b", b"c"]
        assert metadata.drop_orphan(other)


# -- and coordinators that die


async def make_unnamed(mount: Mount) -> tuple[int, int]:
    """Its number, and the lease that came with it."""
    args = {"parent": 1, "name": None, "mode": FILE, "uid": 0, "gid": 0, "rdev": 0}
    reply = await mount.change("make", **args)
    return reply["attr"][INO], reply["lease"]


async def next_coordinator(cluster, mount: Mount) -> None:
    """The coordinator dies; the mount claims what it holds from the next one only after that could have tidied up."""
    greet = mount._greet

    async def hesitate(link) -> None:
        await trio.sleep(5 * DELAY_S)
        await greet(link)

    mount._greet = hesitate  # type: ignore[method-assign]
    await cluster.kill_host(next(name for name, host in cluster.hosts.items() if NAME in host.owned))
    with trio.fail_after(60):
        await mount.call("getattr", ino=1)
    mount._greet = greet  # type: ignore[method-assign]


async def test_a_deleted_file_outlives_a_coordinator_while_it_is_open(tmp_path) -> None:
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        mount = await cluster.mount("n1")
        ino = await mount.make(b"file")
        await mount.change("unlink", parent=1, name=b"file", directory=False)
        await next_coordinator(cluster, mount)
        assert (await mount.call("getattr", ino=ino))["attr"][NLINK] == 0
        await mount.call("release", items=[[ino, 0]])
        service = await cluster.wait_serving()
        await cluster.wait(lambda: service.dispatch._metadata.orphans() == [])


async def test_an_unnamed_file_outlives_a_coordinator_and_can_get_its_name_from_the_next(tmp_path) -> None:
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        mount = await cluster.mount("n1")
        (ino, lease), (other, _) = await make_unnamed(mount), await make_unnamed(mount)
        assert lease == 3
        await next_coordinator(cluster, mount)
        assert (await mount.change("link", ino=ino, parent=1, name=b"file"))["attr"][NLINK] == 1
        await mount.call("release", items=[[ino, 0], [other, 0]])
        service = await cluster.wait_serving()
        await cluster.wait(lambda: service.dispatch._metadata.orphans() == [])
        await cluster.wait(lambda: not service._janitor._orphans)
        assert (await mount.call("lookup", parent=1, name=b"file"))["attr"][INO] == ino
        with pytest.raises(NotFound):
            await mount.call("getattr", ino=other)


async def test_an_unnamed_file_is_gone_with_the_mount_that_made_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("coordinator.eviction.CONTACT_S_MAX", 0.1)
    async with cluster_of(tmp_path) as cluster:
        first, second = await cluster.mount("n1"), await cluster.mount("n2")
        ino, _ = await make_unnamed(first)
        assert (await second.call("getattr", ino=ino))["attr"][NLINK] == 0
        await second.call("release", items=[[ino, 0]])
        first.kill()
        await cluster.mount("n1", incarnation=2)
        service = await cluster.wait_serving()
        await cluster.wait(lambda: service.dispatch._metadata.orphans() == [])
