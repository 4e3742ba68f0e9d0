"""Drive files of a real lab truncated, deleted, overwritten, made read-only under fio: no error, and what can comes back."""

import json
import mmap
import os
import sys
import time
from collections.abc import Iterator

import pytest

from csvfs.units import GIB, MIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for

pytestmark = [pytest.mark.lab, needs_lab]

VOLUME = "/clusterstorage/Volume1"
FIO = (
    "fio", "--name=t", "--ioengine=psync", "--direct=1", "--bs=4k", "--size=48M", "--rw=randwrite", "--verify=crc32c",
    "--verify_fatal=1", "--do_verify=1", "--fallocate=none", f"--filename={VOLUME}/fio", "--loops=6", "--output-format=json",
)  # fmt: skip
# Each block of a file by a read of its own: its bytes, or the name of the error.
READ_BLOCKS = """
import errno, json, os, sys
fd, answers = os.open(sys.argv[1], os.O_RDONLY), []
for at in range(0, os.fstat(fd).st_size, 4096):
    try:
        answers.append(os.pread(fd, 4096, at).hex())
    except OSError as error:
        answers.append(errno.errorcode[error.errno])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=3, drives=2, drive_size=1 * GIB) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "3")
        for node in ("n1", "n2", "n3"):
            wait_for(lambda node=node: mounted(cluster, node), within_s=180)
        yield cluster


def mounted(cluster: LabCluster, node: str) -> bool:
    return b"ok" in cluster.run(node, "sh", "-c", f"mountpoint -q {VOLUME} && echo ok", check=False)


def drives(cluster: LabCluster) -> dict[str, dict]:
    rows = json.loads(cluster.run("n1", "csvfs", "drive", "list", "--json"))
    return {row["path"]: row for row in rows}


def explain(cluster: LabCluster) -> str:
    """How the drives stand, and what the nodes wrote, for the message of a test that failed."""
    return f"{json.dumps(drives(cluster), indent=1)}\n{cluster.logs()}"


def healthy(cluster: LabCluster) -> bool:
    rows = json.loads(cluster.run("n1", "csvfs", "volume", "list", "--json"))
    return all(row["health"] == "Healthy" for row in rows)


def drive_of(cluster: LabCluster, node: str, number: int) -> str:
    return sorted(path for path, row in drives(cluster).items() if row["node"] == node)[number]


def test_a_drive_file_truncated_to_nothing_under_load_costs_no_error_and_the_other_drive_of_the_node_serves(
    lab,
):
    path = drive_of(lab, "n2", 0)
    other = drive_of(lab, "n2", 1)
    fio = lab.start_command("n1", *FIO, stdout=-1, stderr=-1)
    time.sleep(3)
    os.truncate(path, 0)
    wait_for(lambda: drives(lab)[path]["state"] == "Failed media", 180, lambda: explain(lab))
    wait_for(lambda: drives(lab)[other]["state"] == "OK", 180, lambda: explain(lab))
    lab.finish(fio)
    server = lab.pids("n2")["drives"]
    time.sleep(3)
    assert lab.pids("n2")["drives"] == server  # it does not die again and again
    assert "truncated" in drives(lab)[path]["reason"] or "superblock" in drives(lab)[path]["reason"]


def test_a_drive_file_made_read_only_or_moved_away_comes_back_by_itself(lab):
    path = drive_of(lab, "n3", 0)
    fio = lab.start_command("n1", *FIO, stdout=-1, stderr=-1)
    time.sleep(2)
    os.chmod(path, 0o400)
    wait_for(lambda: drives(lab)[path]["state"] == "Not usable", 180, lambda: explain(lab))
    time.sleep(1)
    os.chmod(path, 0o600)
    wait_for(lambda: drives(lab)[path]["state"] == "OK", 180, lambda: explain(lab))
    lab.finish(fio)


def test_flipped_bits_are_found_by_csvfs_volume_scrub(lab):
    lab.run("n1", "csvfs", "volume", "scrub", "Volume1")
    wait_for(lambda: scrubbed(lab), within_s=120)


def rot_everywhere(cluster: LabCluster, block: bytes) -> int:
    """Flip a bit of this block of a file wherever it lies on a drive, also where it lies no more; on how many drives."""
    count = 0
    for path in drives(cluster):
        if not os.path.getsize(path):
            continue  # truncated by a test before this one
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as content:
            found = list(places(file.fileno(), content, block))
            for at in found:
                content[at] ^= 1
            count += bool(found)
    return count


def places(fd: int, content: mmap.mmap, block: bytes) -> Iterator[int]:
    """Where in a sparse file it lies."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:
            return  # only a hole is left
        end = os.lseek(fd, start, os.SEEK_HOLE)
        while (at := content.find(block, start, end)) >= 0:
            yield at
            start = at + len(block)


@pytest.fixture
def at_rest(lab: LabCluster) -> Iterator[None]:
    """Every slab has three copies, also those that were on a drive which a test before has truncated, and none is on its way
    to another drive while a test counts where its blocks lie."""
    for row in drives(lab).values():
        if row["state"] == "Failed media":
            lab.run("n1", "csvfs", "drive", "retire", row["id"])  # it would be waited for, 15 minutes
    wait_for(lambda: not json.loads(lab.run("n1", "csvfs", "job", "list", "--json")), 180, lambda: explain(lab))
    lab.run("n1", "csvfs", "job", "pause", "Volume1")
    yield
    lab.run("n1", "csvfs", "job", "resume", "Volume1")


def integrity(cluster: LabCluster, node: str, *options: str) -> dict:
    """What `csvfs file integrity` says, which fails where something is wrong."""
    return dict(json.loads(cluster.run(node, "csvfs", "file", "integrity", f"{VOLUME}/precious", "--json", *options, check=False)))


def test_a_block_that_no_copy_has_is_an_error_in_its_own_place_named_and_good_again_once_it_is_overwritten(lab, at_rest):
    data = os.urandom(64 * 4096)
    lab.run("n1", "sh", "-c", f"cat >{VOLUME}/precious && sync {VOLUME}/precious", input=data)
    sound = integrity(lab, "n2", "--verify")
    assert (sound["sound"], sound["unreadable"], {row["found"] for row in sound["verified"]}) == (True, [], {0})
    assert all(slab["serving"] >= 3 for slab in sound["slabs"]) and len(sound["verified"]) >= 3
    assert rot_everywhere(lab, data[10 * 4096 : 11 * 4096]) >= 3

    bad = integrity(lab, "n2", "--verify")
    assert bad["unreadable"] == [{"offset": 10 * 4096, "size": 4096, "what": "bad"}], f"{bad}\n{explain(lab)}"
    assert (bad["readable"], {row["left"] for row in bad["verified"]}) == (False, {1})
    assert b"bytes 40960 to 45055: bad" in lab.run("n3", "csvfs", "file", "integrity", f"{VOLUME}/precious", check=False)
    assert b"1 blocks are bad" in lab.run("n1", "csvfs", "volume", "status", "Volume1")
    lost = json.loads(lab.run("n3", "csvfs", "volume", "status", "Volume1", "--lost", "--json"))
    assert [(file["path"], file["ranges"]) for file in lost["files"]] == [("/precious", [[10 * 4096, 4096]])]

    read = lab.run("n2", sys.executable, "-c", READ_BLOCKS, f"{VOLUME}/precious")
    answers = json.loads(read)
    expected = [data[block * 4096 : (block + 1) * 4096].hex() for block in range(64)]
    assert answers == [*expected[:10], "EIO", *expected[11:]]
    partial = f"printf x | dd of={VOLUME}/precious bs=1 seek=41000 conv=notrunc,fsync 2>&1 || true"
    assert b"Input/output error" in lab.run("n3", "sh", "-c", partial)

    lab.run("n3", "dd", f"of={VOLUME}/precious", "bs=4096", "seek=10", "conv=notrunc,fsync", input=bytes(4096))
    assert lab.run("n2", "cat", f"{VOLUME}/precious") == data[: 10 * 4096] + bytes(4096) + data[11 * 4096 :]
    assert integrity(lab, "n1", "--verify")["sound"]
    assert b"nothing of volume Volume1 is lost" in lab.run("n1", "csvfs", "volume", "status", "Volume1", "--lost")


def scrubbed(cluster: LabCluster) -> bool:
    status = json.loads(cluster.run("n1", "csvfs", "volume", "status", "Volume1", "--json"))
    scrub = status["volume"]["scrub"]
    return bool(scrub["finished"]) and not scrub["under_way"]


def test_a_volume_that_runs_full_says_enospc_loses_nothing_and_takes_writes_again_after_a_delete():
    with running_lab(nodes=3, drives=1, drive_size=512 * MIB) as small:
        small.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "3")
        for node in ("n1", "n2", "n3"):
            wait_for(lambda node=node: mounted(small, node), within_s=180)
        script = f"""
cd {VOLUME}
i=0
while said=$(LC_ALL=C dd if=/dev/urandom of=f$i bs=1M count=16 conv=fsync 2>&1); do i=$((i+1)); done
rm -f f$i
echo "$said" | grep -c 'No space left'
"""
        assert small.run("n1", "bash", "-c", script).strip() == b"1"
        names = sorted(small.run("n1", "ls", VOLUME).split())
        assert len(names) > 10
        sums = small.run("n1", "bash", "-c", f"cd {VOLUME} && sha256sum *")
        assert small.run("n3", "bash", "-c", f"cd {VOLUME} && sha256sum *") == sums
        small.run("n2", "bash", "-c", f"cd {VOLUME} && rm {names[0].decode()} {names[1].decode()}")
        again = f"cd {VOLUME} && dd if=/dev/urandom of=again bs=1M count=24 conv=fsync 2>&1"
        wait_for(lambda: b"No space" not in small.run("n2", "bash", "-c", again, check=False), within_s=180)
        kept = b"\n".join(line for line in sums.splitlines() if line.split()[1] in names[2:])
        after = small.run("n1", "bash", "-c", f"cd {VOLUME} && sha256sum f*")
        assert after.strip() == kept
