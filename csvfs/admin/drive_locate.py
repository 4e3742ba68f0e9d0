"""Finding a drive with one's own eyes: its names, its serial number, and a light that blinks.

Place      admin floor, over block/device_facts.py. Reads only.
Blinking   by reads past the page cache, half a second on and half a second off: every disk with an activity light
           can do it, and no enclosure software is needed.
"""

import mmap
import os
import time
from dataclasses import dataclass

from csvfs.admin.cluster_view import Record
from csvfs.block.device_facts import device_facts
from csvfs.errors import CsvfsError
from csvfs.units import MIB

BURST_S = 0.5


@dataclass(slots=True, frozen=True)
class DriveLocation:
    id: str
    node: str
    path: str
    kind: str
    here: bool  # the rest is known on its own node only
    device: str = ""
    model: str = ""
    serial: str = ""
    links: tuple[str, ...] = ()


def locate_drive(record: Record, here: str) -> DriveLocation:
    """Args  here: the name of this node."""
    node, path, kind = record.text("node"), record.text("path"), record.text("kind")
    if node != here:
        return DriveLocation(record.name, node, path, kind, False)
    facts = device_facts(path)
    return DriveLocation(
        record.name, node, path, kind, True, facts.device, facts.model, facts.serial, facts.links
    )


def blink(path: str, seconds: float) -> int:
    """Read on and off for `seconds`; returns the bytes read. Raises CsvfsError when it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a file system without direct reads
    buffer = mmap.mmap(-1, MIB)
    total, offset, end = 0, 0, time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            pause = time.monotonic() + BURST_S
            while time.monotonic() < min(pause, end):
                got = os.preadv(fd, [buffer], offset)
                total += got
                offset = offset + MIB if got == MIB else 0
                if not total:
                    raise CsvfsError(f"{path} gives nothing to read")
            time.sleep(max(0, min(BURST_S, end - time.monotonic())))
    except OSError as error:
        raise CsvfsError(f"{path} cannot be read: {error.strerror}") from None
    finally:
        buffer.close()
        os.close(fd)
    return total
