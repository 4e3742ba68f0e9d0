"""What the machine knows of a drive's device: its kind, its serial number, its names.

Place      block floor, lowest. Reads /sys and /dev/disk; never raises: what cannot be learned is empty.
Files      have the kind of the device that their file system lies on.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

NVME, SSD, HDD = "nvme", "ssd", "hdd"
KINDS = (NVME, SSD, HDD)

SYS_BLOCK = Path("/sys/dev/block")
BY_ID = Path("/dev/disk/by-id")


@dataclass(slots=True, frozen=True)
class DeviceFacts:
    """`kind` empty: not known (a file on a network file system, in memory, in a container)."""

    kind: str
    device: str  # /dev/sda; empty: none
    model: str
    serial: str
    links: tuple[str, ...]  # /dev/disk/by-id/...


def device_facts(path: str) -> DeviceFacts:
    """Of the block device at `path`, or of the one that the file at `path` lies on."""
    try:
        status = os.stat(path)
    except OSError:
        return DeviceFacts("", "", "", "", ())
    number = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    here = SYS_BLOCK / f"{os.major(number)}:{os.minor(number)}"
    if not here.exists():
        return DeviceFacts("", "", "", "", ())
    place = here.resolve()
    disk = place if (place / "queue").is_dir() else place.parent  # a partition has the facts of its disk
    serial = read_text(disk / "device" / "serial") or read_text(disk / "serial") or read_text(disk / "device" / "wwid")
    return DeviceFacts(
        kind_of_disk(disk), f"/dev/{place.name}", read_text(disk / "device" / "model"), serial, _links(place.name)
    )


def kind_of_disk(disk: Path) -> str:
    """Of a disk's directory in /sys: nvme, ssd or hdd; empty: not known."""
    if disk.name.startswith("nvme"):
        return NVME
    return {"0": SSD, "1": HDD}.get(read_text(disk / "queue" / "rotational"), "")


def _links(name: str) -> tuple[str, ...]:
    try:
        entries = sorted(BY_ID.iterdir())
    except OSError:
        return ()
    return tuple(str(entry) for entry in entries if os.path.basename(os.path.realpath(entry)) == name)


def read_text(path: Path) -> str:
    """A file of /sys; empty: it is not there or cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
