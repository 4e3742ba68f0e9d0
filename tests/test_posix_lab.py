"""What POSIX asks of a file system beyond the ordinary, on a lab of two nodes: what one node did the other one sees."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for
from tests.test_first_cluster import is_mounted

pytestmark = [pytest.mark.lab, needs_lab]

VOLUME = "/clusterstorage/Volume1"

# Carries out the statements of each line of its input, and says what `result` is afterwards. Its names stay.
AGENT = """
import ctypes, errno, json, mmap, os, stat, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
NO_ID = 0xFFFFFFFF
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
def acl(*entries):
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
def for_user(permissions, mask=7):
    return acl((1, 6, NO_ID), (2, permissions, 1001), (4, 0, NO_ID), (16, mask, NO_ID), (32, 0, NO_ID))
def trying(function, *args, **options):
    try:
        return function(*args, **options)
    except OSError as error:
        return errno.errorcode[error.errno]
def give_name(fd, path):
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=0, follow_symlinks=True)  # the number makes it linkat(2)
def rename(old, new, flags):
    if libc.renameat2(-100, old.encode(), -100, new.encode(), flags):
        raise OSError(ctypes.get_errno(), old)
def some_entries(fd):
    "[name, where the next one is] of one getdents64(2) with little room"
    room = ctypes.create_string_buffer(512)
    size = libc.getdents64(fd, room, len(room))
    assert size >= 0, ctypes.get_errno()
    entries, at = [], 0
    while at < size:
        _, following, length, _ = struct.unpack_from("<QqHB", room.raw, at)
        entries.append((room.raw[at + 19:at + length].split(b"\\0")[0].decode(), following))
        at += length
    return entries
names = dict(globals())
for line in sys.stdin:
    names["result"] = None
    exec(json.loads(line), names)
    print(json.dumps(names["result"]), flush=True)
"""

# Makes, appends, renames, links and removes, for five minutes at most.
BUSY = """
import os, sys, time
os.mkdir(sys.argv[1]); os.chdir(sys.argv[1])
ends, number = time.monotonic() + 300, 0
while time.monotonic() < ends:
    number += 1
    with open(f"f{number}", "w") as file:
        file.write("x" * (number % 9000))
    os.link(f"f{number}", f"l{number}"); os.rename(f"f{number}", f"r{number % 20}")
    os.makedirs(f"d{number % 5}/e", exist_ok=True); os.rename(f"d{number % 5}", f"n{number}")
    os.rmdir(f"n{number}/e"); os.rmdir(f"n{number}"); os.unlink(f"l{number}")
"""


class Agent:
    """A program on a node, to be told what to do."""

    def __init__(self, lab: LabCluster, node: str, *, user: int = 0) -> None:
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        self._process = lab.start_command(
            node, *become, sys.executable, "-c", AGENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def do(self, statements: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(statements) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def get(self, expression: str) -> Any:
        return self.do(f"result = {expression}")

    def end(self, *, kill: bool = False) -> None:
        if kill:
            self._process.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=2, drives=1) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "2")
        for node in ("n1", "n2"):
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=120, explain=cluster.logs)
        yield cluster


@pytest.fixture(scope="module")
def agents(lab: LabCluster) -> Iterator[dict[str, Agent]]:
    """Of root on both nodes, and of user 1001 on n1."""
    agents = {"n1": Agent(lab, "n1"), "n2": Agent(lab, "n2"), "user": Agent(lab, "n1", user=1001)}
    yield agents
    for agent in agents.values():
        agent.end()


def test_an_acl_that_one_node_changes_counts_on_the_other_at_once(agents: dict[str, Agent]) -> None:
    n1, n2, user = agents["n1"], agents["n2"], agents["user"]
    path = f"{VOLUME}/shared"
    n2.do(f"os.umask(0o077); open('{path}', 'w').write('x')")
    # By this n1 has a read lease: what its kernel knows of the file it keeps until somebody takes it back.
    assert n1.get(f"open('{path}').read()") == "x"
    may_open = f"trying(lambda: os.close(os.open('{path}', os.O_RDONLY)))"
    assert user.get(may_open) == "EACCES"
    for _ in range(10):
        n2.do(f"os.setxattr('{path}', ACCESS, for_user(4))")
        assert user.get(may_open) is None
        assert user.get(f"os.getxattr('{path}', ACCESS) == for_user(4)")
        n2.do(f"os.setxattr('{path}', ACCESS, for_user(0))")
        assert user.get(may_open) == "EACCES"
    n2.do(f"os.setxattr('{path}', ACCESS, for_user(4))")
    assert user.get(may_open) is None
    n2.do(f"os.chmod('{path}', 0o600)")  # takes the mask away
    assert user.get(may_open) == "EACCES"
    n2.do(f"os.chmod('{path}', 0o640)")
    assert user.get(may_open) is None
    n2.do(f"os.removexattr('{path}', ACCESS)")
    assert user.get(may_open) == "EACCES"


def test_an_acl_of_a_directory_is_inherited_and_lets_another_node_in(agents: dict[str, Agent]) -> None:
    n1, n2, user = agents["n1"], agents["n2"], agents["user"]
    path = f"{VOLUME}/team"
    n1.do(f"os.mkdir('{path}', 0o700); os.chmod('{path}', 0o700)")
    assert user.get(f"trying(os.listdir, '{path}')") == "EACCES"
    n2.do(f"[os.setxattr('{path}', name, acl((1, 7, NO_ID), (2, 7, 1001), (4, 0, NO_ID), (16, 7, NO_ID), (32, 0, NO_ID)))"
          " for name in (ACCESS, DEFAULT)]")  # fmt: skip
    n2.do(f"os.close(os.open('{path}/file', os.O_CREAT, 0o666)); os.mkdir('{path}/below', 0o777)")
    assert sorted(user.get(f"os.listdir('{path}')")) == ["below", "file"]
    assert user.get(f"open('{path}/file', 'a').write('x')") == 1
    assert user.get(f"oct(os.stat('{path}/file').st_mode)") == "0o100660"
    assert user.do(f"os.close(os.open('{path}/below/mine', os.O_CREAT | os.O_WRONLY, 0o666))") is None
    assert n2.get(f"oct(os.stat('{path}/below/mine').st_mode)") == "0o100660"
    assert n2.get(f"sorted(os.listxattr('{path}/below'))") == ["system.posix_acl_access", "system.posix_acl_default"]
    assert user.get(f"trying(os.setxattr, '{path}/file', ACCESS, for_user(7))") == "EPERM"
    assert n1.get(f"trying(os.setxattr, '{path}/file', DEFAULT, for_user(7))") == "EACCES"
    assert n1.get(f"trying(os.setxattr, '{path}/file', ACCESS, b'nonsense')") in ("EINVAL", "ENOTSUP")
    assert n1.get(f"trying(os.removexattr, '{path}/below/mine', DEFAULT)") is None


def test_a_file_without_a_name_gets_one_or_is_gone_also_after_its_mount_died(lab: LabCluster, agents: dict[str, Agent]) -> None:
    n1, n2 = agents["n1"], agents["n2"]
    count = "os.statvfs('/clusterstorage/Volume1').f_files - os.statvfs('/clusterstorage/Volume1').f_ffree"
    before, names_before = n2.get(count), n2.get(f"os.listdir('{VOLUME}')")
    n1.do(f"""
os.umask(0o027)
fds = [os.open('{VOLUME}', os.O_TMPFILE | os.O_RDWR, 0o666) for _ in range(3)]
fds.append(os.open('{VOLUME}', os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600))
for fd in fds:
    os.write(fd, b'secret')
""")
    assert n1.get("[oct(os.fstat(fd).st_mode) for fd in fds]") == ["0o100640"] * 3 + ["0o100600"]
    assert n1.get("[os.fstat(fd).st_nlink for fd in fds]") == [0] * 4
    assert n2.get(f"os.listdir('{VOLUME}')") == names_before
    assert n2.get(count) == before + 4
    n1.do(f"give_name(fds[0], '{VOLUME}/named')")
    assert n2.get(f"open('{VOLUME}/named').read()") == "secret"
    assert n1.get(f"trying(give_name, fds[1], '{VOLUME}/named')") == "EEXIST"
    assert n1.get(f"trying(give_name, fds[3], '{VOLUME}/exclusive')") == "ENOENT"
    lab.kill("n1", "mount")
    assert n1.get("[os.pread(fd, 10, 0).decode() for fd in fds]") == ["secret"] * 4
    n1.do(f"give_name(fds[1], '{VOLUME}/later'); [os.close(fd) for fd in fds]")
    assert n2.get(f"open('{VOLUME}/later').read()") == "secret"
    assert n2.get(f"os.stat('{VOLUME}/later').st_nlink") == 1
    wait_for(lambda: n2.get(count) == before + 2, within_s=60, explain=lab.logs)


def test_a_rename_with_a_whiteout_leaves_a_device_that_the_other_node_sees(agents: dict[str, Agent]) -> None:
    n1, n2 = agents["n1"], agents["n2"]
    n1.do(f"os.mkdir('{VOLUME}/upper'); open('{VOLUME}/upper/a', 'w').close()")
    assert n2.get(f"os.listdir('{VOLUME}/upper')") == ["a"]
    n1.do(f"rename('{VOLUME}/upper/a', '{VOLUME}/upper/b', 4)")
    for node in (n2, n1):
        assert node.get(f"sorted(os.listdir('{VOLUME}/upper'))") == ["a", "b"]
        whiteout = node.get(f"list(os.stat('{VOLUME}/upper/a'))[:1] + [os.stat('{VOLUME}/upper/a').st_rdev]")
        assert whiteout == [0o020000, 0]
    assert n1.get(f"trying(rename, '{VOLUME}/upper/b', '{VOLUME}/upper/a', 5)") == "EEXIST"
    assert n1.get(f"trying(rename, '{VOLUME}/upper/b', '{VOLUME}/upper/a', 6)") == "EINVAL"


def test_a_read_sets_the_access_time_as_relatime_does_and_the_other_node_sees_it(agents: dict[str, Agent]) -> None:
    n1, n2 = agents["n1"], agents["n2"]
    path = f"{VOLUME}/read"
    read = f"fd = os.open('{path}', os.O_RDONLY | os.O_DIRECT); os.preadv(fd, [mmap.mmap(-1, 4096)], 0); os.close(fd)"
    atime = f"os.stat('{path}').st_atime_ns"
    n1.do(f"open('{path}', 'w').write('x' * 5000); os.symlink('read', '{VOLUME}/read.link'); os.mkdir('{path}.d')")
    made = n1.get(atime)
    n2.do(read)
    first = n2.get(atime)
    assert first > made
    wait_for(lambda: n1.get(atime) == first)
    n2.do(read)
    assert n2.get(atime) == first  # it was read since it was written
    n1.do(f"open('{path}', 'a').write('y')")
    n1.do(read)  # under the write lease
    assert n2.get(atime) == n1.get(atime) > first
    n1.do(f"os.utime('{path}', ns=(5, 6))")
    assert [node.get(atime) for node in (n1, n2)] == [5, 5]
    n2.do(read)
    n1.do(f"os.utime('{path}', ns=(7, 6))")  # what was noted there before does not come after it
    assert [node.get(atime) for node in (n1, n2)] == [7, 7]
    for name, look in ((f"{path}.d", "os.listdir"), (f"{VOLUME}/read.link", "os.readlink")):
        before = n2.get(f"os.lstat('{name}').st_atime_ns")
        n2.do(f"{look}('{name}')")
        assert n2.get(f"os.lstat('{name}').st_atime_ns") > before


def test_what_stays_in_a_directory_is_listed_once_whatever_another_node_does_meanwhile(agents: dict[str, Agent]) -> None:
    n1, n2 = agents["n1"], agents["n2"]
    path = f"{VOLUME}/many"
    n2.do(f"os.mkdir('{path}'); [open(f'{path}/{{number}}', 'w').close() for number in range(1000)]")
    n1.do(f"fd = os.open('{path}', os.O_RDONLY); seen = []")
    place: int | None = None
    for turn in range(1000):
        entries = n1.do("result = some_entries(fd); seen += [name for name, _ in result]")
        if not entries:
            break
        if turn == 5:
            place = n1.get("len(seen)")
            n1.do("position = os.lseek(fd, 0, os.SEEK_CUR)")
        number = 3 * turn  # 0, 3, 6 ... go, come elsewhere, or get another name
        change = (f"os.unlink('{path}/{number}')", f"os.rename('{path}/{number}', '{path}/moved{number}')",
                  f"os.unlink('{path}/{number}'); open('{path}/new{number}', 'w').close()")[turn % 3]  # fmt: skip
        if number < 1000:
            n2.do(change)
    seen = n1.get("seen")
    stayed = {str(number) for number in range(1000) if number % 3 or number > 3 * turn}
    assert len(seen) == len(set(seen))
    assert stayed <= set(seen)
    # And from a place that was remembered before most of that.
    n1.do("os.lseek(fd, position, os.SEEK_SET); again = []")
    while n1.do("result = some_entries(fd); again += [name for name, _ in result]"):
        pass
    again = n1.get("again")
    assert len(again) == len(set(again))
    assert stayed - set(seen[:place]) <= set(again)
    assert not set(seen[:place]) & stayed & set(again)


# Makes everything that has a name, first with one that is too long: its errors, and whether 255 bytes were taken.
MAKE_NAMED = """
def make_named(top):
    os.mkdir(top); os.chdir(top)
    errors, names = [], []
    makers = [os.mkdir, lambda name: os.close(os.open(name, os.O_CREAT)), lambda name: os.symlink("x", name),
              lambda name: os.mkfifo(name), lambda name: os.link("file", name), lambda name: os.rename("file", name)]
    open("file", "w").close()
    for number, make in enumerate(makers):
        names.append(bytes([128 + number]) * 255)
        errors.append(trying(make, b"n" * 256))
        make(names[-1])
    return errors, sorted(os.listdir(b".")) == sorted(names)
"""

# Directories below each other, until the path of a file in the last one has `size` bytes.
MAKE_DEEP = """
def make_deep(top, size):
    fd, path = os.open(top, os.O_RDONLY), top
    while size - len(path) > 300:
        name = "d" * 200
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd, path = below, f"{path}/{name}"
    name = "f" * (size - len(path) - 1)
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(os.open(name + "1", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    return f"{path}/{name}"
"""


def test_names_paths_and_symlinks_are_as_long_as_linux_lets_them_be(agents: dict[str, Agent]) -> None:
    n1, n2 = agents["n1"], agents["n2"]
    n1.do(MAKE_NAMED)
    assert n1.get(f"make_named('{VOLUME}/names')") == [["ENAMETOOLONG"] * 6, True]
    assert n2.get(f"sorted(len(name) for name in os.listdir(b'{VOLUME}/names'))") == [255] * 6
    assert n2.get(f"trying(os.stat, '{VOLUME}/names/' + 'n' * 256)") == "ENAMETOOLONG"
    n1.do(MAKE_DEEP)
    deepest = n1.get(f"make_deep('{VOLUME}/names', 4095)")
    assert len(deepest) == 4095
    assert n2.get(f"os.stat('{deepest}').st_size") == 0
    assert n2.get(f"trying(os.stat, '{deepest}1')") == "ENAMETOOLONG"  # it is there, and has no path
    directory, name = deepest.rsplit("/", 1)
    assert n2.do(f"os.chdir('{directory}'); result = os.stat('{name}1').st_size; os.chdir('/')") == 0
    for size, error in ((4095, None), (4096, "ENAMETOOLONG"), (0, "ENOENT")):
        assert n1.get(f"trying(os.symlink, 't' * {size}, '{VOLUME}/names/to{size}')") == error
    assert n2.get(f"os.readlink('{VOLUME}/names/to4095') == 't' * 4095")


def test_a_sparse_file_ends_at_16_tib(agents: dict[str, Agent]) -> None:
    n1, n2 = agents["n1"], agents["n2"]
    end = 1 << 44
    n1.do(f"fd = os.open('{VOLUME}/sparse', os.O_CREAT | os.O_RDWR); os.truncate(fd, {end})")
    assert n1.get(f"os.pwrite(fd, b'end', {end - 3})") == 3
    for refused in (
        f"os.truncate, fd, {end + 1}",
        f"os.pwrite, fd, b'x', {end}",
        f"os.posix_fallocate, fd, {end - 4096}, 4097",
    ):
        assert n1.get(f"trying({refused})") == "EFBIG"
    n2.do(f"fd = os.open('{VOLUME}/sparse', os.O_RDONLY)")
    assert n2.get("[os.fstat(fd).st_size, os.fstat(fd).st_blocks < 4096]") == [end, True]
    assert n2.get(f"[os.pread(fd, 10, {end - 5}).hex(), os.pread(fd, 10, {end}).hex()]") == ["0000" + b"end".hex(), ""]
    assert n2.get(f"[os.lseek(fd, 0, os.SEEK_DATA) >= {end - 65536}, os.lseek(fd, 0, os.SEEK_HOLE)]") == [True, 0]
    for agent in (n1, n2):
        agent.do("os.close(fd)")


def test_devices_are_kept_and_open_nothing_and_fifos_connect_the_programs_of_a_node(agents: dict[str, Agent]) -> None:
    n1, n2 = agents["n1"], agents["n2"]
    n1.do(f"os.mkdir('{VOLUME}/special'); os.mkfifo('{VOLUME}/special/fifo')")
    for name, kind, major in (("char", "S_IFCHR", 1), ("block", "S_IFBLK", 259), ("socket", "S_IFSOCK", 0)):
        n1.do(f"os.mknod('{VOLUME}/special/{name}', stat.{kind} | 0o666, os.makedev({major}, 3 if {major} else 0))")
        found = n2.do(f"found = os.stat('{VOLUME}/special/{name}'); result = [stat.S_IFMT(found.st_mode), found.st_rdev]")
        assert found == [getattr(stat, kind), os.makedev(major, 3) if major else 0]
        opened = n2.get(f"trying(os.open, '{VOLUME}/special/{name}', os.O_RDONLY)")
        assert opened == ("ENXIO" if kind == "S_IFSOCK" else "EACCES")
    assert n2.get(f"trying(os.open, '{VOLUME}/special/fifo', os.O_WRONLY | os.O_NONBLOCK)") == "ENXIO"
    n2.do(f"source = os.open('{VOLUME}/special/fifo', os.O_RDONLY | os.O_NONBLOCK)")
    n2.do(f"target = os.open('{VOLUME}/special/fifo', os.O_WRONLY)")
    assert n2.do("os.write(target, b'through'); result = os.read(source, 10).decode()") == "through"
    n2.do("os.close(source); os.close(target)")
    assert n1.get(f"trying(os.open, '{VOLUME}/special/fifo', os.O_WRONLY | os.O_NONBLOCK)") == "ENXIO"


def test_sticky_and_set_gid_directories_made_on_one_node_hold_on_the_other(agents: dict[str, Agent]) -> None:
    n2, user = agents["n2"], agents["user"]
    n2.do(f"os.umask(0o022); os.mkdir('{VOLUME}/sticky'); os.chmod('{VOLUME}/sticky', 0o1777)")
    n2.do(f"open('{VOLUME}/sticky/roots', 'w').close()")
    assert user.get(f"trying(os.unlink, '{VOLUME}/sticky/roots')") == "EPERM"
    assert user.get(f"trying(os.rename, '{VOLUME}/sticky/roots', '{VOLUME}/sticky/mine')") == "EPERM"
    user.do(f"open('{VOLUME}/sticky/own', 'w').close(); os.rename('{VOLUME}/sticky/own', '{VOLUME}/sticky/mine')")
    assert n2.get(f"sorted(os.listdir('{VOLUME}/sticky'))") == ["mine", "roots"]
    assert user.get(f"trying(os.unlink, '{VOLUME}/sticky/mine')") is None
    n2.do(f"os.mkdir('{VOLUME}/group'); os.chown('{VOLUME}/group', -1, 77); os.chmod('{VOLUME}/group', 0o2777)")
    user.do(f"os.mkdir('{VOLUME}/group/below'); open('{VOLUME}/group/file', 'w').close()")
    shown = f"[[os.stat(f'{VOLUME}/group/{{name}}').st_gid, os.stat(f'{VOLUME}/group/{{name}}').st_mode & stat.S_ISGID]"
    assert n2.get(f"{shown} for name in ('below', 'file')]") == [[77, stat.S_ISGID], [77, 0]]


def test_two_nodes_append_to_one_file_and_no_record_is_lost_or_torn(lab: LabCluster, agents: dict[str, Agent]) -> None:
    append = f"import os; fd = os.open('{VOLUME}/log', os.O_APPEND | os.O_CREAT | os.O_WRONLY)\n"
    append += "for number in range(100): os.write(fd, f'NODE {number:04d} '.encode().ljust(99, b'.') + b'\\n')"
    running = [lab.start_command(n, sys.executable, "-c", append.replace("NODE", n)) for n in ("n1", "n2")]
    for process in running:
        lab.finish(process)
    lines = agents["n1"].get(f"open('{VOLUME}/log').read().splitlines()")
    for node in ("n1", "n2"):
        own = [line for line in lines if line.startswith(node)]
        assert own == [f"{node} {number:04d} ".ljust(99, ".") for number in range(100)]
    assert len(lines) == 200 and agents["n2"].get(f"open('{VOLUME}/log').read().splitlines()") == lines


def test_extended_attributes_have_linuxs_limits_each_with_its_errno(agents: dict[str, Agent]) -> None:
    n1, n2 = agents["n1"], agents["n2"]
    path = f"{VOLUME}/attributes"
    n1.do(f"open('{path}', 'w').close(); longest = 'user.' + 'n' * 250; value = os.urandom(65536)")
    assert n1.get(f"trying(os.setxattr, '{path}', longest + 'n', b'')") == "ERANGE"
    assert n1.get(f"trying(os.setxattr, '{path}', longest, value + b'x')") == "E2BIG"
    n1.do(f"os.setxattr('{path}', longest, value)")
    assert n2.get(f"os.getxattr('{path}', 'user.' + 'n' * 250).hex()") == n1.get("value.hex()")
    assert n2.get(f"trying(os.setxattr, '{path}', 'user.' + 'n' * 250, b'', os.XATTR_CREATE)") == "EEXIST"
    assert n2.get(f"trying(os.setxattr, '{path}', 'user.other', b'', os.XATTR_REPLACE)") == "ENODATA"
    assert n2.get(f"trying(os.getxattr, '{path}', 'user.other')") == "ENODATA"
    assert n2.get(f"trying(os.setxattr, '{path}', 'user.', b'')") == "EINVAL"
    assert n2.get(f"trying(os.setxattr, '{path}', 'other.name', b'')") == "ENOTSUP"
    # All names of a file have 65,536 bytes, with a NUL each.
    n1.do(f"for number in range(255): os.setxattr('{path}', f'user.{{number:0250d}}', b'')")
    assert n1.get(f"trying(os.setxattr, '{path}', 'user.1', b'')") == "ENOSPC"
    assert n2.get(f"[len(os.listxattr('{path}')), trying(os.setxattr, '{path}', 'user.1', b'')]") == [256, "ENOSPC"]
    n2.do(f"os.removexattr('{path}', 'user.' + 'n' * 250)")
    assert n1.get(f"trying(os.setxattr, '{path}', 'user.1', b'')") is None


def test_a_volume_in_use_is_checked_from_any_node_without_a_false_alarm(lab: LabCluster, agents: dict[str, Agent]) -> None:
    busy = lab.start_command("n2", sys.executable, "-c", BUSY, f"{VOLUME}/busy")
    try:
        for node in ("n1", "n2"):
            report = json.loads(lab.run(node, "csvfs", "volume", "check", "Volume1", "--json"))
            assert (report["findings"], report["left"], report["mended"]) == ([], 0, [])
            assert report["rows"] > 2000
    finally:
        busy.kill()
        busy.wait(timeout=60)
    assert b"all fits together" in lab.run("n2", "csvfs", "volume", "check", "Volume1", "--repair")
