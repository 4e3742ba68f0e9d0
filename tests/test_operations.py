"""Operations: what they ask of the coordinator, what they tell the file table, which errors programs see."""

import errno
import os
import stat
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
from pyfuse3 import FUSEError

from csvfs.errors import Corrupt, NoSpace, NotFound, Unavailable, error_kinds
from csvfs.mount import operations as operations_module
from csvfs.mount.errno_border import errno_of
from csvfs.mount.operations import VolumeOperations
from tests.memory_volume import READ_LEASE, WRITE_LEASE, MemoryVolume

ROOT = 1
CONTEXT: Any = SimpleNamespace(uid=1000, gid=100, pid=1, umask=0)


@pytest.fixture
def volume() -> MemoryVolume:
    return MemoryVolume()


@pytest.fixture
def operations(volume: MemoryVolume) -> VolumeOperations:
    return VolumeOperations(volume, volume)


async def make_file(operations: VolumeOperations, name: bytes = b"f") -> int:
    info, _ = await operations.create(ROOT, name, 0o640, os.O_RDWR, CONTEXT)
    return int(info.fh)


async def test_a_new_file_belongs_to_the_caller_and_is_open(
    operations: VolumeOperations, volume: MemoryVolume
) -> None:
    info, entry = await operations.create(ROOT, b"f", 0o640, os.O_RDWR, CONTEXT)
    assert info.fh == entry.st_ino
    assert (entry.st_mode, entry.st_uid, entry.st_gid) == (stat.S_IFREG | 0o640, 1000, 100)
    assert volume.inodes[entry.st_ino].opens == 1
    assert volume.leases == {ROOT: READ_LEASE, entry.st_ino: READ_LEASE}
    assert (entry.entry_timeout, entry.attr_timeout) == (1, 1)


async def test_absence_is_an_answer_and_not_an_error(operations: VolumeOperations) -> None:
    entry = await operations.lookup(ROOT, b"none", CONTEXT)
    assert (entry.st_ino, entry.entry_timeout) == (0, 1)


async def test_what_came_without_a_lease_is_not_cached(
    operations: VolumeOperations, volume: MemoryVolume
) -> None:
    ino = await make_file(operations)
    attr = volume.inodes[ino].attr()
    replies = [{"attr": attr, "lease": 0, "dir_lease": 0}, {"attr": None, "lease": 0, "dir_lease": 0}]
    volume.call_lookup = lambda **_: replies.pop(0)  # type: ignore[method-assign,assignment]
    # The table goes on to hold READ, from elsewhere.
    volume.granted = lambda *_: None  # type: ignore[method-assign]
    for _ in range(2):
        entry = await operations.lookup(ROOT, b"f", CONTEXT)
        assert (entry.entry_timeout, entry.attr_timeout) == (0, 0)


async def test_attributes_of_a_file_written_here_are_the_file_tables(
    operations: VolumeOperations, volume: MemoryVolume
) -> None:
    """The coordinator has not heard of the last writes; its size must not reach the kernel."""
    ino = await make_file(operations)
    stale = volume.inodes[ino].attr()
    volume._write(ino, 0, memoryview(b"x" * 10_000), 0)
    reply = {"attr": stale, "lease": WRITE_LEASE, "dir_lease": READ_LEASE}
    volume.call_lookup = lambda **_: reply  # type: ignore[method-assign,assignment]
    entry = await operations.lookup(ROOT, b"f", CONTEXT)
    assert (entry.st_size, entry.attr_timeout) == (10_000, 1)


async def test_a_file_is_never_open_without_a_lease(
    operations: VolumeOperations, volume: MemoryVolume
) -> None:
    ino = await make_file(operations)
    volume.recall(ino)
    await operations.open(ino, os.O_RDONLY, CONTEXT)
    assert volume.calls[-1] == "acquire"
    assert volume.inodes[ino].opens == 2
    await operations.open(ino, os.O_RDONLY, CONTEXT)
    assert volume.calls.count("acquire") == 1


async def test_create_of_a_name_made_elsewhere_is_tried_again_or_refused(
    operations: VolumeOperations,
) -> None:
    await make_file(operations)
    for flags, expected in [(os.O_RDWR, errno.ESTALE), (os.O_RDWR | os.O_EXCL, errno.EEXIST)]:
        with pytest.raises(FUSEError) as caught:
            await operations.create(ROOT, b"f", 0o600, flags, CONTEXT)
        assert caught.value.errno == expected


class Fields:
    """pyfuse3.SetattrFields cannot be made by hand."""

    def __init__(self, *names: str) -> None:
        for name in ("atime", "mtime", "ctime", "mode", "uid", "gid", "size"):
            setattr(self, f"update_{name}", name in names)


async def setattr_of(operations: VolumeOperations, ino: int, *names: str, **values: int) -> Any:
    attr = pyfuse3.EntryAttributes()
    for name, value in values.items():
        setattr(attr, name, value)
    fields: Any = Fields(*names)
    return await operations.setattr(ino, attr, fields, None, CONTEXT)


async def test_setattr_changes_what_is_named_and_nothing_else(
    operations: VolumeOperations, volume: MemoryVolume
) -> None:
    ino = await make_file(operations)
    before = volume.inodes[ino].attr()
    entry = await setattr_of(operations, ino, "mode", st_mode=stat.S_IFREG | 0o4755)
    assert entry.st_mode == stat.S_IFREG | 0o4755
    entry = await setattr_of(operations, ino, "uid", "atime", st_uid=7, st_atime_ns=5)
    assert (entry.st_uid, entry.st_gid, entry.st_atime_ns, entry.st_mtime_ns) == (7, before[4], 5, before[9])


async def test_a_change_of_size_goes_through_the_file_table_with_a_new_time(
    operations: VolumeOperations, volume: MemoryVolume
) -> None:
    ino = await make_file(operations)
    before = volume.inodes[ino].mtime_ns
    entry = await setattr_of(operations, ino, "size", st_size=12_345)
    assert entry.st_size == 12_345
    assert entry.st_mtime_ns > before
    assert "setattr" not in volume.calls


async def test_a_time_set_by_hand_comes_after_the_times_of_earlier_writes(
    operations: VolumeOperations, volume: MemoryVolume
) -> None:
    ino = await make_file(operations)
    volume.leases[ino] = WRITE_LEASE
    order: list[str] = []

    async def flush(ino: int) -> None:
        order.append("flush")

    volume.flush = flush  # type: ignore[method-assign,assignment]
    volume.before_reply = lambda name, args: order.append(name)
    await setattr_of(operations, ino, "mtime", st_mtime_ns=99)
    assert order == ["flush", "setattr"]


async def test_renames_keep_flags_and_refuse_unknown_ones(
    operations: VolumeOperations, volume: MemoryVolume
) -> None:
    await make_file(operations, b"a")
    await make_file(operations, b"b")
    await operations.rename(ROOT, b"a", ROOT, b"b", pyfuse3.RENAME_EXCHANGE, CONTEXT)
    assert volume.inodes[ROOT].entries == {b"a": 3, b"b": 2}
    with pytest.raises(FUSEError) as caught:
        await operations.rename(ROOT, b"a", ROOT, b"b", pyfuse3.RENAME_NOREPLACE, CONTEXT)
    assert caught.value.errno == errno.EEXIST
    with pytest.raises(FUSEError) as caught:
        await operations.rename(ROOT, b"a", ROOT, b"c", 8, CONTEXT)
    assert caught.value.errno == errno.EINVAL


class Listing:
    """Plays pyfuse3.readdir_reply: room for so many entries per reply."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        self.reply: list[tuple[bytes, int]] = []
        self.inodes: dict[bytes, int] = {}
        monkeypatch.setattr(operations_module.pyfuse3, "readdir_reply", self.take)

    def take(self, token: object, name: bytes, attr: pyfuse3.EntryAttributes, cookie: int) -> bool:
        if len(self.reply) == self.room:
            return False
        assert (attr.entry_timeout, attr.attr_timeout) == (0, 0)
        self.reply.append((name, cookie))
        self.inodes[name] = attr.st_ino
        assert stat.S_ISDIR(attr.st_mode) or not name.startswith(b".")
        return True

    async def read(self, operations: VolumeOperations, handle: int, cookie: int) -> list[tuple[bytes, int]]:
        self.reply = []
        token: Any = None
        await operations.readdir(handle, cookie, token)
        return self.reply

    async def read_all(self, operations: VolumeOperations, handle: int) -> list[bytes]:
        names: list[bytes] = []
        cookie = 0
        while reply := await self.read(operations, handle, cookie):
            names += [name for name, _ in reply]
            cookie = reply[-1][1]
        return names


async def test_a_listing_takes_one_call_per_page_and_starts_anew_at_0(
    operations: VolumeOperations, volume: MemoryVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations_module, "READDIR_ENTRIES_MAX", 10)
    names = [b"f%02d" % number for number in range(25)]
    for name in names:
        volume.call_make(ROOT, name, stat.S_IFREG, 0, 0, 0, None)
    listing = Listing(monkeypatch, room=3)
    handle = await operations.opendir(ROOT, CONTEXT)
    assert await listing.read_all(operations, handle) == [b".", b"..", *names]
    assert volume.calls == ["readdir"] * 3
    volume.call_unlink(ROOT, b"f00", False)
    assert await listing.read_all(operations, handle) == [b".", b"..", *names[1:]]
    assert operations.listing_was_leased(handle)
    operations.close_directory(handle)
    assert not operations.listing_was_leased(handle)


@pytest.mark.parametrize("room", [1, 2, 3, 10])
async def test_a_listing_begins_with_the_directory_itself_and_its_parent(
    operations: VolumeOperations, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    listing = Listing(monkeypatch, room)
    top = (await operations.mkdir(ROOT, b"top", 0o755, CONTEXT)).st_ino
    inner = (await operations.mkdir(top, b"inner", 0o755, CONTEXT)).st_ino
    await operations.mkdir(inner, b"last", 0o755, CONTEXT)
    for ino, parent, rest in ((inner, top, [b"last"]), (top, ROOT, [b"inner"]), (ROOT, ROOT, [b"top"])):
        handle = await operations.opendir(ino, CONTEXT)
        assert await listing.read_all(operations, handle) == [b".", b"..", *rest]
        assert (listing.inodes[b"."], listing.inodes[b".."]) == (ino, parent)
    await operations.rename(top, b"inner", ROOT, b"moved", 0, CONTEXT)
    handle = await operations.opendir(inner, CONTEXT)
    await listing.read_all(operations, handle)
    assert listing.inodes[b".."] == ROOT


async def test_a_recalled_directory_is_not_listed_from_a_page_fetched_before(
    operations: VolumeOperations, volume: MemoryVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (b"a", b"b", b"c"):
        volume.call_make(ROOT, name, stat.S_IFREG, 0, 0, 0, None)
    listing = Listing(monkeypatch, room=1)
    handle = await operations.opendir(ROOT, CONTEXT)
    [(name, cookie)] = await listing.read(operations, handle, 2)
    assert name == b"a"
    volume.call_unlink(ROOT, b"b", False)
    volume.recall(ROOT)
    [(name, _)] = await listing.read(operations, handle, cookie)
    assert name == b"c"


async def test_attributes_of_other_layers_are_not_kept(
    operations: VolumeOperations, volume: MemoryVolume
) -> None:
    ino = await make_file(operations)
    await operations.set_attribute(ino, b"user.a", b"1", 0)
    assert await operations.listxattr(ino, CONTEXT) == [b"user.a"]
    for name in (b"system.other", b"security.capability", b"nonsense"):
        with pytest.raises(FUSEError) as caught:
            await operations.set_attribute(ino, name, b"1", 0)
        assert caught.value.errno == errno.EOPNOTSUPP
    with pytest.raises(FUSEError) as caught:
        await operations.set_attribute(ino, b"user.", b"1", 0)
    assert caught.value.errno == errno.EINVAL


async def test_trusted_attributes_are_listed_for_root_alone(operations: VolumeOperations) -> None:
    ino = await make_file(operations)
    for name in (b"user.a", b"trusted.a"):
        await operations.set_attribute(ino, name, b"1", 0)
    root: Any = SimpleNamespace(uid=0, gid=0, pid=1, umask=0)
    assert sorted(await operations.listxattr(ino, root)) == [b"trusted.a", b"user.a"]
    assert await operations.listxattr(ino, CONTEXT) == [b"user.a"]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (NotFound("x"), errno.ENOENT),
        (NoSpace("x"), errno.ENOSPC),
        (Unavailable("x"), errno.EAGAIN),
        (Corrupt("x"), errno.EIO),
        (ZeroDivisionError("a bug"), errno.EIO),
        (FUSEError(errno.EXDEV), errno.EXDEV),
    ],
)
async def test_every_error_becomes_an_errno(
    operations: VolumeOperations, volume: MemoryVolume, raised: Exception, expected: int
) -> None:
    async def call(name: str, args: dict) -> None:
        raise raised

    volume.call = call  # type: ignore[method-assign,assignment]
    with pytest.raises(FUSEError) as caught:
        await operations.mkdir(ROOT, b"d", 0o755, CONTEXT)
    assert caught.value.errno == expected


def test_all_kinds_of_errors_have_an_errno_that_the_kernel_takes() -> None:
    for kind in error_kinds().values():
        assert 0 < errno_of(kind("x")) < 512


async def test_of_an_inode_whose_name_was_given_to_another_the_kernel_is_told_to_look_the_name_up_again(
    operations: VolumeOperations,
) -> None:
    """A look at the name that met a rename on another node: ENOENT would say that the name is not there."""
    gone = 4711
    asks = (
        lambda: operations.readlink(gone, CONTEXT),
        lambda: operations.open(gone, os.O_RDONLY, CONTEXT),
        lambda: operations.getattr(gone, CONTEXT),
    )
    for ask in asks:
        with pytest.raises(FUSEError) as raised:
            await ask()
        assert raised.value.errno == errno.ESTALE


async def test_an_unnamed_file_is_open_and_nowhere(operations: VolumeOperations, volume: MemoryVolume) -> None:
    info, entry = await operations.create_unnamed(ROOT, 0o640, os.O_RDWR, CONTEXT)
    assert (entry.st_mode, entry.st_nlink, entry.entry_timeout) == (stat.S_IFREG | 0o640, 0, 0)
    assert volume.inodes[info.fh].opens == 1
    assert volume.inodes[ROOT].entries == {}


async def test_an_unnamed_file_that_a_dying_coordinator_made_and_the_next_dropped_is_made_again(
    operations: VolumeOperations, volume: MemoryVolume
) -> None:
    """The first answer is one that was stored: nobody held the file, so it is gone."""
    lost: list[int] = []

    def lose(name: str, args: dict) -> None:
        if name == "make" and not lost:
            lost.append(volume.next_ino - 1)
            del volume.inodes[lost[0]]

    volume.before_reply = lose
    info, _ = await operations.create_unnamed(ROOT, 0o640, os.O_RDWR, CONTEXT)
    assert info.fh != lost[0]
    assert volume.inodes[info.fh].opens == 1
    assert volume.calls.count("make") == 2


@pytest.mark.parametrize("way", ["create", "mkdir", "mknod", "symlink"])
async def test_I11_what_the_process_before_made_and_another_node_has_removed_since_is_made_anew(
    operations: VolumeOperations, volume: MemoryVolume, way: str
) -> None:
    """Its answer comes late: ENOENT would say that the directory is not there. On ESTALE the kernel begins anew."""
    made = volume.call_make

    def make_and_lose(**args: Any) -> Any:
        reply = made(**args)
        volume.call_unlink(parent=ROOT, name=b"f", directory=way == "mkdir")
        return {**reply, "lease": 0, "history": True}

    volume.call_make = make_and_lose  # type: ignore[method-assign,assignment]
    volume.call_getattr = lambda ino: volume._entry(volume._inode(ino))  # type: ignore[attr-defined]
    asks = {
        "create": lambda: operations.create(ROOT, b"f", 0o644, os.O_RDWR | os.O_EXCL, CONTEXT),
        "mkdir": lambda: operations.mkdir(ROOT, b"f", 0o755, CONTEXT),
        "mknod": lambda: operations.mknod(ROOT, b"f", 0o644 | stat.S_IFIFO, 0, CONTEXT),
        "symlink": lambda: operations.symlink(ROOT, b"f", b"target", CONTEXT),
    }
    with pytest.raises(FUSEError) as raised:
        await asks[way]()
    assert raised.value.errno == errno.ESTALE


@pytest.mark.parametrize("way", ["make", "unlink", "rename", "link"])
async def test_I11_what_the_process_before_changed_is_not_added_to_attributes_that_may_show_it(
    operations: VolumeOperations, volume: MemoryVolume, way: str
) -> None:
    """They may have been asked for since it was done."""
    ino = await make_file(operations)
    true = getattr(volume, f"call_{way}")
    setattr(volume, f"call_{way}", lambda **args: {**true(**args), "time_ns": 7, "history": True})
    volume.call_getattr = lambda ino: volume._entry(volume._inode(ino))  # type: ignore[attr-defined]
    volume.changes.clear()
    asks = {
        "make": lambda: operations.mkdir(ROOT, b"d", 0o755, CONTEXT),
        "unlink": lambda: operations.unlink(ROOT, b"f", CONTEXT),
        "rename": lambda: operations.rename(ROOT, b"f", ROOT, b"g", 0, CONTEXT),
        "link": lambda: operations.link(ino, ROOT, b"g", CONTEXT),
    }
    await asks[way]()
    assert volume.changes
    assert all(time_ns is None for _, time_ns, _, _ in volume.changes)
