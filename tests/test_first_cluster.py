"""The whole path on a lab of three nodes: real mounts, real fio, real qemu-img, real kills (issue "first cluster")."""

import hashlib
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator

import pytest

from csvfs.units import BLOCK_SIZE, GIB, MIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for

pytestmark = [pytest.mark.lab, needs_lab]

VOLUME = "/clusterstorage/Volume1"
FIO = ("fio", "--name=t", "--ioengine=psync", "--direct=1", "--bs=4k", "--size=64M", "--fallocate=none")


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=3, drives=2, drive_size=2 * GIB) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--resiliency", "mirror", "--copies", "3")
        for node in ("n1", "n2", "n3"):
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=180)
        yield cluster


def is_mounted(cluster: LabCluster, node: str) -> bool:
    return b"ok" in cluster.run(node, "sh", "-c", f"mountpoint -q {VOLUME} && echo ok", check=False)


def volume_status(cluster: LabCluster, node: str = "n1") -> dict:
    return json.loads(cluster.run(node, "csvfs", "volume", "status", "Volume1", "--json"))


def owner(cluster: LabCluster) -> str:
    rows = json.loads(cluster.run("n1", "csvfs", "volume", "list", "--json"))
    return next(row["coordinator"] for row in rows if row["name"] == "Volume1")


def is_healthy(cluster: LabCluster) -> bool:
    rows = json.loads(cluster.run("n1", "csvfs", "volume", "list", "--json"))
    return all(row["health"] == "Healthy" for row in rows)


def wait_healthy(cluster: LabCluster, within_s: float = 180) -> None:
    for node in ("n1", "n2", "n3"):
        wait_for(lambda node=node: is_mounted(cluster, node), within_s)
    wait_for(lambda: is_healthy(cluster), within_s)


def sha(cluster: LabCluster, node: str, path: str) -> str:
    return cluster.run(node, "sha256sum", path).split()[0].decode()


def test_what_one_node_writes_the_others_read_at_once(lab):
    for size in (0, 1, 100, 4096, 4097, 70_000, 3 * MIB + 5):
        data = os.urandom(size)
        path = f"{VOLUME}/file-{size}"
        lab.run("n1", "sh", "-c", f"cat > {path}", input=data)
        for node in ("n2", "n3", "n1"):
            assert lab.run(node, "cat", path) == data
    data = os.urandom(5000)
    lab.run("n3", "sh", "-c", f"cat > {VOLUME}/file-70000", input=data)
    assert lab.run("n1", "cat", f"{VOLUME}/file-70000") == data
    lab.run("n2", "sh", "-c", f"cat >> {VOLUME}/file-70000", input=b"tail")
    assert lab.run("n3", "cat", f"{VOLUME}/file-70000") == data + b"tail"


def test_names_changed_on_one_node_are_changed_on_all(lab):
    lab.run(
        "n1", "sh", "-c", f"mkdir -p {VOLUME}/d/e && echo hello > {VOLUME}/d/a && ls {VOLUME}/d/missing; true"
    )
    assert lab.run("n2", "ls", f"{VOLUME}/d") == b"a\ne\n"
    assert lab.run("n3", "sh", "-c", f"ls {VOLUME}/d/b 2>/dev/null; true") == b""
    lab.run("n2", "mv", f"{VOLUME}/d/a", f"{VOLUME}/d/b")
    assert lab.run("n3", "cat", f"{VOLUME}/d/b") == b"hello\n"
    assert lab.run("n1", "ls", f"{VOLUME}/d") == b"b\ne\n"
    lab.run("n3", "rm", "-r", f"{VOLUME}/d")
    assert lab.run("n1", "sh", "-c", f"ls {VOLUME}/d 2>&1; true").count(b"No such") == 1


def test_an_ordinary_tree_with_links_modes_owners_times_and_attributes_survives_tar(lab):
    script = f"""
set -e
cd {VOLUME}; rm -rf tree copy; mkdir tree; cd tree
for i in $(seq 60); do echo $i > f$i; done
ln f1 hard; ln -s f2 soft; mkdir -m 2770 dir; mknod fifo p; mknod null c 1 3
chown 1000:1001 f3; chmod 4751 f4; touch -d '2001-02-03 04:05:06.789' f5
setfattr -n user.colour -v blue f6 2>/dev/null || python3 -c "import os; os.setxattr('f6', 'user.colour', b'blue')"
cd ..; mkdir copy; tar -C tree --xattrs -cf - . | tar -C copy --xattrs -xpf -
"""
    lab.run("n2", "bash", "-c", script)
    show = "find . -printf '%P %y %m %U %G %s %n %T+ %l\\n' | sort | grep -v '^ d' | grep -v ' d '"
    original = lab.run("n3", "bash", "-c", f"cd {VOLUME}/tree && {show}")
    copied = lab.run("n1", "bash", "-c", f"cd {VOLUME}/copy && {show}")
    assert original == copied
    assert b"f4 f 4751" in copied and b"f3 f 644 1000 1001" in copied and b"hard f 644 0 0 2 2" in copied
    value = lab.run(
        "n1", "python3", "-c", f"import os; print(os.getxattr('{VOLUME}/copy/f6', 'user.colour'))"
    )
    assert value == b"b'blue'\n"


def test_an_unlinked_open_file_lives_until_its_last_close_and_then_gives_its_space_back(lab):
    script = f"""
import os
fd = os.open('{VOLUME}/temporary', os.O_CREAT | os.O_RDWR)
os.write(fd, b'x' * 1000000)
os.unlink('{VOLUME}/temporary')
assert os.pread(fd, 5, 999990) == b'xxxxx'
os.write(fd, b'y' * 10)
assert os.fstat(fd).st_size == 1000010 and os.fstat(fd).st_nlink == 0
"""
    lab.run("n2", "python3", "-c", script)


def test_statfs_says_what_the_volume_has(lab):
    rows = lab.run("n3", "stat", "-f", "-c", "%b %f %S", VOLUME).split()
    blocks, free, size = (int(value) for value in rows)
    # Three nodes of 2 x 2 GiB, three copies, a quarter kept for repairs: below 3 GiB, and nearly all of it.
    assert 2.5 * GIB < blocks * size <= 3 * GIB
    assert 0 < free <= blocks


def test_a_directory_with_a_quota_holds_so_much_on_all_nodes_together(lab):
    directory = f"{VOLUME}/limited"
    lab.run("n1", "sh", "-c", f"mkdir {directory} && head -c 3M /dev/zero > {directory}/before")
    said = lab.run("n2", "csvfs", "quota", "set", directory, "--size", "40M", "--files", "4").decode()
    assert said.startswith(f"quota of {directory}: 40.0 MiB and 4 files")

    def quota() -> dict:
        (row,) = json.loads(lab.run("n1", "csvfs", "quota", "list", "Volume1", "--json"))
        return row

    wait_for(lambda: quota()["state"] == "in force", within_s=60)
    assert quota() == quota() | {"path": "/limited", "size": 40 * MIB, "files": 2, "files_max": 4}
    assert 3 * MIB <= quota()["used"] <= 7 * MIB  # with what was granted ahead
    lab.run("n3", "sh", "-c", f"head -c 20M /dev/zero > {directory}/on-n3")
    full = lab.run("n1", "sh", "-c", f"head -c 20M /dev/zero 2>&1 > {directory}/on-n1 || true")
    assert b"Disk quota exceeded" in full
    refused = lab.run("n2", "sh", "-c", f"mkdir {directory}/more 2>&1 || true")
    assert b"Disk quota exceeded" in refused
    size, free = map(int, lab.run("n2", "df", "--output=size,avail", "-B1M", directory).split()[-2:])
    assert size == 40 and free < 4
    lab.run("n2", "csvfs", "quota", "remove", directory)
    lab.run("n3", "sh", "-c", f"head -c 50M /dev/zero > {directory}/more && rm -r {directory}")
    wait_for(lambda: json.loads(lab.run("n1", "csvfs", "quota", "list", "--json")) == [], within_s=60)


def test_a_mapping_shared_on_one_node_is_read_on_another(lab):
    script = f"""
import mmap, os
fd = os.open('{VOLUME}/mapped', os.O_CREAT | os.O_RDWR)
os.ftruncate(fd, 1 << 20)
m = mmap.mmap(fd, 1 << 20)
m[5000:5005] = b'hello'; m[(1 << 20) - 3:] = b'end'
m.flush()
"""
    lab.run("n1", "python3", "-c", script)
    data = lab.run("n2", "cat", f"{VOLUME}/mapped")
    assert len(data) == MIB and data[5000:5005] == b"hello" and data[-3:] == b"end"


def test_a_directory_of_five_thousand_names_lists_whole_on_every_node(lab):
    lab.run("n1", "bash", "-c", f"mkdir {VOLUME}/many && cd {VOLUME}/many && touch $(seq 5000)")
    for node in ("n2", "n3"):
        names = lab.run(node, "ls", "-f", f"{VOLUME}/many").split()
        assert sorted(set(names) - {b".", b".."}) == sorted(str(i).encode() for i in range(1, 5001))
        assert len(names) == 5002
    lab.run("n3", "rm", "-r", f"{VOLUME}/many")


def test_a_qcow2_image_with_patterns_is_clean_and_equal_on_all_nodes(lab):
    image = f"{VOLUME}/disk.qcow2"
    lab.run("n1", "qemu-img", "create", "-q", "-f", "qcow2", image, "512M")
    commands = []
    for index in range(40):
        commands += ["-c", f"write -P {index + 1} {index * 7 * MIB + 512 * index} {64 * 1024 + 512 * index}"]
    lab.run("n1", "qemu-io", "-t", "none", "-f", "qcow2", *commands, image)
    assert b"No errors were found" in lab.run("n2", "qemu-img", "check", image)
    for index in range(40):
        pattern = f"read -P {index + 1} {index * 7 * MIB + 512 * index} {64 * 1024 + 512 * index}"
        commands[2 * index + 1] = pattern
    assert b"Pattern verification failed" not in lab.run(
        "n3", "qemu-io", "-r", "-f", "qcow2", *commands, image
    )
    assert sha(lab, "n1", image) == sha(lab, "n2", image) == sha(lab, "n3", image)


def test_git_clones_a_repository_and_runs_its_tests_on_the_volume(lab, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "sums.py").write_text("def add(a, b):\n    return a + b\n")
    (source / "test_sums.py").write_text("from sums import add\nassert add(2, 3) == 5\nprint('passed')\n")
    for argv in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", "-C", str(source), *argv], check=True)
    lab.run("n2", "git", "clone", "-q", str(source), f"{VOLUME}/clone")
    assert lab.run("n2", "git", "-C", f"{VOLUME}/clone", "fsck", "--strict") == b""
    assert lab.run("n2", "python3", f"{VOLUME}/clone/test_sums.py") == b"passed\n"
    assert lab.run("n3", "git", "-C", f"{VOLUME}/clone", "status", "--porcelain").count(b"M ") == 0


def test_fio_writes_verified_blocks_on_one_node_and_reads_them_back_on_another(lab):
    job = (*FIO, f"--filename={VOLUME}/verify.fio", "--rw=randwrite", "--verify=crc32c", "--numjobs=1")
    lab.run("n1", *job, "--do_verify=0", "--randseed=7")
    lab.run("n3", *job, "--verify_only", "--randseed=7")


def fio_under(lab: LabCluster, name: str, fault) -> None:
    """Random verified writes on n1 while `fault()` happens; then verified again on n3.

    Begins with a cluster that is whole, so that the failure of one test is not that of the next.
    """
    wait_healthy(lab)
    job = [
        *FIO, f"--filename={VOLUME}/{name}", "--rw=randwrite", "--verify=crc32c", "--randseed=11",
        "--rate_iops=1500", "--size=48M",
    ]  # fmt: skip
    running = lab.start_command("n1", *job, "--do_verify=1", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    time.sleep(2)
    fault()
    lab.finish(running)
    wait_for(lambda: is_mounted(lab, "n3"), within_s=180)
    lab.run("n3", *job, "--verify_only")


def test_fio_goes_on_when_the_coordinator_is_killed(lab):
    before = owner(lab)
    fio_under(lab, "coordinator.fio", lambda: lab.kill(before, "coordinator"))
    wait_healthy(lab)


def test_fio_goes_on_when_a_drive_server_is_killed(lab):
    fio_under(lab, "drives.fio", lambda: lab.kill("n2", "drives"))
    wait_healthy(lab)


def test_fio_goes_on_when_the_drive_server_of_its_own_node_is_killed(lab):
    fio_under(lab, "own.fio", lambda: lab.kill("n1", "drives"))
    wait_healthy(lab)


def test_fio_goes_on_when_another_whole_node_is_powered_off(lab):
    lab.run("n1", "csvfs", "volume", "move", "Volume1", "n3")

    def power_cycle() -> None:
        lab.kill("n3")
        time.sleep(6)
        lab.start("n3")

    fio_under(lab, "node.fio", power_cycle)
    wait_healthy(lab)


def test_200_flipped_bytes_are_all_read_right_counted_rewritten_and_gone_at_the_second_pass(lab):
    data = os.urandom(64 * MIB)
    lab.run("n2", "sh", "-c", f"cat > {VOLUME}/rot && sync", input=data)
    flipped = flip_bytes(lab, "n2", 200)
    before = counters(lab, "n2")
    expected = hashlib.sha256(data).hexdigest()
    read_everything(lab, "n2")
    assert sha(lab, "n2", f"{VOLUME}/rot") == expected
    wait_for(lambda: counters(lab, "n2")["healed"] - before["healed"] >= flipped)
    healed = counters(lab, "n2")
    assert healed["checksum_errors"] - before["checksum_errors"] >= flipped
    read_everything(lab, "n2")
    assert sha(lab, "n2", f"{VOLUME}/rot") == expected
    assert counters(lab, "n2") == healed


def read_everything(lab: LabCluster, node: str) -> None:
    """Every byte of every file, from the drives: the damaged blocks may be of any of them."""
    lab.run(
        node,
        "sh",
        "-c",
        f"echo 3 > /proc/sys/vm/drop_caches; find {VOLUME} -type f -exec cat {{}} + > /dev/null",
    )


def counters(lab: LabCluster, node: str) -> dict[str, int]:
    """Bad and healed blocks of a node's drives, summed."""
    rows = json.loads(lab.run(node, "csvfs", "drive", "list", "--json"))
    mine = [row for row in rows if row["node"] == node]
    return {name: sum(row["counters"][name] for row in mine) for name in ("checksum_errors", "healed")}


def flip_bytes(lab: LabCluster, node: str, count: int) -> int:
    """Flip bytes in written blocks of data slabs; returns in how many different blocks."""
    rng = random.Random(4)
    blocks: set[tuple[str, int]] = set()
    for path in sorted((lab.directory / "nodes" / node / "drives").iterdir()):
        blocks.update((str(path), offset) for offset in written_data_blocks(str(path)))
    chosen = rng.sample(sorted(blocks), min(count, len(blocks)))
    for path, offset in chosen:
        fd = os.open(path, os.O_RDWR)
        position = offset + rng.randrange(BLOCK_SIZE)
        byte = os.pread(fd, 1, position)
        os.pwrite(fd, bytes([byte[0] ^ (1 << rng.randrange(8))]), position)
        os.close(fd)
    assert len(chosen) == count
    return len(chosen)


def written_data_blocks(path: str) -> Iterator[int]:
    """Offsets of blocks with a checksum in slabs that hold the file's bytes, read beside the running server."""
    from csvfs.block.slot_table import STATE_IN_USE, SlotTable
    from csvfs.block.superblock import read_superblock
    from csvfs.ids import METADATA_SLAB_ID_MIN

    fd = os.open(path, os.O_RDONLY)
    try:
        superblock = read_superblock(fd, os.fstat(fd).st_size).superblock
        layout = superblock.layout
        table = SlotTable(fd, layout, superblock.drive_id)
        for slot, entry in enumerate(table.entries):
            if entry is None or entry.state != STATE_IN_USE or entry.slab >= METADATA_SLAB_ID_MIN:
                continue
            raw = os.pread(fd, 4 * layout.blocks_per_slab, layout.block_checksum_offset(slot, 0))
            for block in range(layout.blocks_per_slab):
                if raw[4 * block : 4 * block + 4] != b"\0\0\0\0":
                    yield layout.block_data_offset(slot, block)
    finally:
        os.close(fd)
