"""What may become a drive: everything else is refused by name, and nothing of it is touched."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from csvfs.block import in_use
from csvfs.block.drive import Drive
from csvfs.block.eligibility import check_drive, inspect_drive
from csvfs.block.formatting import format_drive
from csvfs.block.layout import size_needed
from csvfs.block.signatures import SIGNATURES
from csvfs.block.superblock import SUPERBLOCK_MAGIC
from csvfs.errors import BadRequest, DriveFailed, DriveRefused
from csvfs.ids import DriveId, NodeName, PoolId
from csvfs.units import KIB, MIB
from tests.drive_files import CLUSTER, DRIVE, DRIVE_SIZE, POOL, SLAB_SIZE, blank_file, make_drive, overwrite


def check(path) -> None:
    check_drive(str(path), pool_id=POOL, cluster_id=CLUSTER, slab_size=SLAB_SIZE)


def refusal(path) -> str:
    """The reason, after looking that neither check nor format has changed a byte."""
    before = fingerprint(path)
    with pytest.raises(DriveRefused) as caught:
        check(path)
    with pytest.raises(DriveRefused):
        make(path)
    assert fingerprint(path) == before
    return str(caught.value).removeprefix(f"{path}: ")


def make(path) -> None:
    format_drive(
        str(path),
        drive_id=DRIVE,
        pool_id=POOL,
        cluster_id=CLUSTER,
        node=NodeName("n1"),
        slab_size=SLAB_SIZE,
        label="",
    )


def fingerprint(path):
    status = os.stat(path)
    if not os.path.isfile(path):
        return status.st_mtime_ns
    return hashlib.sha256(Path(path).read_bytes()).digest(), status.st_mtime_ns, status.st_blocks


@pytest.fixture
def blank(tmp_path):
    return blank_file(tmp_path / "disk")


def test_a_blank_file_is_taken(blank):
    check(blank)
    make(blank)
    Drive.open(blank, pool_id=POOL, cluster_id=CLUSTER).close()


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda s: f"{s.name}@{s.offset}")
def test_every_signature_is_found_at_its_place(blank, signature):
    offset = signature.offset
    if offset < 0:
        offset += DRIVE_SIZE - DRIVE_SIZE % signature.align
    overwrite(blank, offset, signature.magic)
    assert refusal(blank) == f"not blank: {signature.name}"


def test_a_drive_with_both_a_file_system_and_a_boot_sector_is_named_by_the_file_system(blank):
    overwrite(blank, 510, b"\x55\xaa")
    overwrite(blank, 82, b"FAT32   ")
    assert refusal(blank) == "not blank: file system vfat"


@pytest.mark.parametrize("label", [0, 256 * KIB, DRIVE_SIZE - 256 * KIB])
def test_zfs_is_found_by_any_uberblock_of_any_label(blank, label):
    overwrite(blank, label + 128 * KIB + 37 * KIB, b"\x0c\xb1\xba\x00\0\0\0\0")
    assert refusal(blank) == "not blank: file system zfs"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["mkfs.ext4", "-q", "-F"], "not blank: file system ext4"),
        (["mkswap", "-q"], "not blank: file system swap"),
    ],
)
def test_what_real_tools_make_is_recognized(blank, command, reason):
    if shutil.which(command[0], path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
        pytest.skip(f"{command[0]} is not installed")
    subprocess.run(
        [*command, blank], check=True, capture_output=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
    )
    assert refusal(blank) == reason


@pytest.mark.parametrize("offset", [0, 5000, MIB - 1])
def test_unknown_data_in_the_first_mib_is_not_overwritten(blank, offset):
    overwrite(blank, offset, b"x")
    assert refusal(blank) == "not blank: unknown data"


def test_a_text_file_is_not_blank(tmp_path):
    (tmp_path / "notes").write_text("remember the milk\n")
    assert refusal(tmp_path / "notes") == "not blank: unknown data"


def test_a_file_that_is_too_small_says_how_much_is_needed(tmp_path):
    needed = size_needed(SLAB_SIZE)
    path = blank_file(tmp_path / "small", needed - 1)
    assert refusal(path) == f"too small ({needed - 1} B, needs at least {needed} B)"
    os.truncate(path, needed)
    make(path)
    drive = Drive.open(path)
    assert drive.slot_count == 1
    drive.close()


def test_an_empty_file_is_too_small(tmp_path):
    assert refusal(blank_file(tmp_path / "empty", 0)).startswith("too small (0 B")


def test_a_drive_of_this_pool_is_not_formatted_again(tmp_path):
    path, _ = make_drive(tmp_path / "drive")
    assert refusal(path) == f"already in this pool (drive {DRIVE.hex()})"


def test_a_drive_of_another_pool_is_named_by_it(tmp_path):
    path, _ = make_drive(tmp_path / "drive")
    with pytest.raises(DriveRefused, match=f"in a foreign pool \\({POOL.hex()}\\)"):
        check_drive(path, pool_id=PoolId(b"o" * 16), cluster_id=CLUSTER, slab_size=SLAB_SIZE)
    with pytest.raises(DriveRefused, match="in a foreign pool"):
        check_drive(path, pool_id=None, cluster_id=None, slab_size=SLAB_SIZE)


def test_a_drive_with_a_wiped_start_is_still_ours(tmp_path):
    path, _ = make_drive(tmp_path / "drive")
    overwrite(path, 0, bytes(MIB))
    assert refusal(path).startswith("already in this pool")


def test_a_damaged_drive_is_not_taken_for_blank(blank):
    overwrite(blank, 0, SUPERBLOCK_MAGIC)
    assert refusal(blank).startswith("not blank: a damaged csvfs drive")


def test_a_truncated_drive_is_not_taken_for_blank(tmp_path):
    path, _ = make_drive(tmp_path / "drive")
    os.truncate(path, DRIVE_SIZE // 2)
    assert "truncated" in refusal(path)


def test_an_open_drive_is_in_use(tmp_path):
    path, _ = make_drive(tmp_path / "drive")
    drive = Drive.open(path)
    assert "in use by another process" in refusal(path)
    drive.close()


def test_a_file_that_another_process_has_open_names_it(blank):
    script = f"import sys; file = open({blank!r}, 'rb'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        other.stdout.readline()
        assert refusal(blank).startswith(f"in use by another process (pid {other.pid}, python")
        other.stdin.close()
    check(blank)


def test_a_file_without_write_permission_is_read_only(blank):
    os.chmod(blank, 0o444)
    assert refusal(blank) == "read-only"


@pytest.mark.parametrize("path", ["/dev/null", "/tmp", "/proc/version_does_not_exist"])
def test_what_is_neither_file_nor_block_device_is_refused(path):
    with pytest.raises(DriveRefused, match=r"not a file or block device|No such file"):
        check(path)


def test_a_symbolic_link_is_followed(blank, tmp_path):
    (tmp_path / "link").symlink_to(blank)
    check(tmp_path / "link")


def test_odd_ids_and_texts_are_refused_before_anything_is_written(blank):
    before = fingerprint(blank)
    good = {
        "drive_id": DRIVE,
        "pool_id": POOL,
        "cluster_id": CLUSTER,
        "node": NodeName("n"),
        "slab_size": SLAB_SIZE,
    }
    for bad in (
        {"drive_id": DriveId(b"x")},
        {"label": "x" * 65},
        {"slab_size": 5 * MIB},
        {"slab_size": 1 << 40},
    ):
        with pytest.raises(BadRequest):
            format_drive(blank, **{**good, **bad})
    assert fingerprint(blank) == before


def test_a_format_that_runs_out_of_space_leaves_no_drive(blank, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("csvfs.block.formatting.write_zeros", full)
    with pytest.raises(DriveFailed, match="No space left"):
        make(blank)
    monkeypatch.undo()
    check(blank)


def test_a_listing_says_what_each_path_is(tmp_path, blank):
    path, superblock = make_drive(tmp_path / "drive")
    found = inspect_drive(path, pool_id=POOL, cluster_id=CLUSTER, slab_size=SLAB_SIZE)
    assert (found.kind, found.size, found.superblock) == ("file", DRIVE_SIZE, superblock)
    assert found.refused == f"already in this pool (drive {DRIVE.hex()})"
    assert inspect_drive(blank, pool_id=POOL, cluster_id=CLUSTER, slab_size=SLAB_SIZE).refused is None
    other = inspect_drive("/dev/null", pool_id=POOL, cluster_id=CLUSTER)
    assert (other.kind, other.refused) == ("other", "not a file or block device")


# Block devices


@pytest.fixture
def loop_device(blank):
    """A block device on a file; skipped where there are none."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    made = subprocess.run(["losetup", "--find", "--show", blank], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no loop devices here: {made.stderr.strip()}")
    device = made.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.lab
def test_a_block_device_becomes_a_drive_and_keeps_its_data(loop_device):
    from tests.drive_files import VOLUME, make_slab, pattern, read, write

    check(loop_device)
    make(loop_device)
    drive = Drive.open(loop_device)
    assert not drive.is_file
    copy = make_slab(drive)
    write(copy, 3, pattern(1, 4))
    copy.trim_blocks(4, 1)
    drive.close()
    drive = Drive.open(loop_device)
    copy = drive.find(VOLUME, copy.slab)
    assert not drive.unclean
    assert read(copy, 3) == pattern(1, 4)[:4096]
    assert read(copy, 4) == bytes(4096)
    with pytest.raises(DriveRefused, match="in use by another process"):
        check(loop_device)
    drive.close()


@pytest.mark.lab
def test_a_file_behind_a_loop_device_is_in_use_by_it(loop_device, blank):
    assert refusal(blank) == f"in use by {loop_device}"


@pytest.mark.lab
def test_a_mounted_block_device_and_the_file_behind_it_say_where(loop_device, blank, tmp_path):
    subprocess.run(["/usr/sbin/mkfs.ext4", "-q", loop_device], check=True)
    place = tmp_path / "mounted here"
    place.mkdir()
    # Read-only: else ext4 itself writes now and then, and `refusal` would take it for us.
    subprocess.run(["mount", "-o", "ro,noload", loop_device, str(place)], check=True)
    try:
        assert refusal(loop_device) == f"mounted at {place}"
        assert refusal(blank) == f"mounted at {place} (through {loop_device})"
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert refusal(loop_device) == "not blank: file system ext4"


def test_files_open_on_a_fuse_file_system_that_cannot_hold_the_drive_are_not_asked_about(tmp_path, monkeypatch):
    """Whoever serves it may stand still, and a look at what is open there would stand still too."""
    path = tmp_path / "drive"
    path.write_bytes(b"x")
    read = in_use._read
    with path.open("rb") as file:
        other = subprocess.Popen(["sleep", "1000"], stdin=file)
    try:
        assert other.pid in [pid for pid, _ in in_use.users(str(path))]
        (mount,) = re.findall(r"^mnt_id:\s*(\d+)", read(f"/proc/{other.pid}/fdinfo/0"), re.MULTILINE)

        def fuse_there(name):
            if str(name) == f"/proc/{other.pid}/mountinfo":
                return f"{mount} 25 0:9999 / /there rw - fuse.csvfs csvfs rw\n"
            return read(name)

        monkeypatch.setattr(in_use, "_read", fuse_there)
        assert other.pid not in [pid for pid, _ in in_use.users(str(path))]
    finally:
        other.kill()
        other.wait()


def test_files_of_a_file_system_that_is_unmounted_already_are_asked_about_by_their_number_alone(tmp_path, monkeypatch):
    """It may be FUSE, of somebody who stands still: what is open there says so no more."""
    path, another = tmp_path / "drive", tmp_path / "another"
    path.write_bytes(b"x")
    another.write_bytes(b"x")
    read, is_same, asked = in_use._read, in_use._is, []
    with path.open("rb") as file, another.open("rb") as other_file:
        processes = [subprocess.Popen(["sleep", "1000"], stdin=opened) for opened in (file, other_file)]
    try:
        stdins = [f"/proc/{process.pid}/fd/0" for process in processes]
        unmounted = {f"/proc/{process.pid}/mountinfo" for process in processes}
        monkeypatch.setattr(in_use, "_read", lambda name: "" if str(name) in unmounted else read(name))
        monkeypatch.setattr(in_use, "_is", lambda name, status: asked.append(name) or is_same(name, status))
        assert processes[0].pid in [pid for pid, _ in in_use.users(str(path))]
        assert stdins[0] in asked and stdins[1] not in asked
    finally:
        for process in processes:
            process.kill()
            process.wait()
