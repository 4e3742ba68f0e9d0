"""The disks of this machine, and why one is nothing that may be claimed without being named by its path.

Place      block floor, above device_facts.py. Reads /sys; never raises: what cannot be learned is empty.
Rule       Only a whole disk of this machine is claimed because a pattern matches it. Not: partitions; virtual
           devices (loop, RAM, device mapper, RAID), which have something below them; removable and USB media;
           disks attached through a network, which other machines may see as well.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from csvfs.block.device_facts import SYS_BLOCK, kind_of_disk, read_text

SYS_DISKS = Path("/sys/block")
_SECTOR = 512  # bytes: the unit of /sys/block/*/size, whatever the disk has
# World-wide names; serial numbers and what virtual machines make up by default are the same on many machines.
_UNIQUE = ("naa.", "eui.", "uuid.")
_MADE_UP = ("eui.525400",)
_FABRICS = frozenset(("tcp", "rdma", "fc", "loop"))  # of NVMe


@dataclass(slots=True, frozen=True)
class DiskFacts:
    """`identity`: the disk's world-wide name, by all paths and at all machines; empty: not known.
    `unsuitable`: why it may not be claimed because a pattern matches it; empty: it may."""

    path: str
    kind: str
    size: int  # bytes
    identity: str
    unsuitable: str


def whole_disks() -> list[DiskFacts]:
    """All block devices that are no partitions and have a medium, by name."""
    found = []
    for entry in sorted(SYS_DISKS.glob("*")):
        size = _number(read_text(entry / "size")) * _SECTOR
        if size:
            place = entry.resolve()
            found.append(
                DiskFacts(
                    f"/dev/{entry.name.replace('!', '/')}", kind_of_disk(place), size,
                    _identity(place), _unsuitable(place),
                )
            )  # fmt: skip
    return found


def disk_facts(number: str) -> DiskFacts | None:
    """Of the block device `major:minor`; None: the kernel does not know it."""
    here = SYS_BLOCK / number
    if not here.exists():
        return None
    place = here.resolve()
    disk = place if (place / "queue").is_dir() else place.parent
    size = _number(read_text(place / "size")) * _SECTOR
    return DiskFacts(f"/dev/{place.name}", kind_of_disk(disk), size, _identity(disk), _unsuitable(place))


def same_disk(identity: str, path: str, disks: list[DiskFacts]) -> str | None:
    """The path of another device that is the same disk; None: none is known to be."""
    real = os.path.realpath(path)
    others = (disk.path for disk in disks if disk.identity == identity and disk.path != real)
    return next(others, None) if identity else None


def _unsuitable(place: Path) -> str:
    where = str(place)
    if (place / "partition").exists():
        return "a partition, not a whole disk"
    if "/virtual/block/" in where:
        return f"a virtual device ({place.name})"
    if read_text(place / "hidden") == "1":
        return "one path of a multipath disk"
    if read_text(place / "removable") == "1" or "/usb" in where:
        return "removable media"
    network = "/session" in where or "/rport-" in where or place.name.startswith(("rbd", "nbd"))
    if network or read_text(place / "device" / "transport") in _FABRICS:
        return "attached through a network: other machines may use it"
    return ""


def _identity(disk: Path) -> str:
    names = (read_text(disk / name) for name in ("wwid", "device/wwid"))
    return next((name for name in names if name.startswith(_UNIQUE) and not name.startswith(_MADE_UP)), "")


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
