"""An open drive: its slab copies, its free slots, its flushes and its counters (FORMAT.md).

Place      block floor, above superblock.py, slots.py and slab_copy.py. Synchronous: no trio, no network.
Writer     the one process that holds the file's lock. All methods are for one thread, except `flush`, which
           may run in another one meanwhile.

Invariants
  D1  The superblock says "open" durably before anything else on the drive changes, and "clean" only after all
      is flushed.
  D2  of slots.py: a slot is handed out again only when nothing of what was in it can come back.
  D3  After an open that may have lost page-cache content, every chunk of every slab counts as active.
  D4  A drive of which a flush failed is failed for good: the kernel has dropped what it could not write.
"""

import contextlib
import os
import threading
from dataclasses import dataclass
from typing import NoReturn

from csvfs.block import drive_faults
from csvfs.block.copy_tables import CopyTables
from csvfs.block.in_use import open_locked, try_lock
from csvfs.block.layout import ACTIVE_MAP_OFFSET, Layout
from csvfs.block.medium import (
    disk_sequence,
    is_regular_file,
    machine_boot_id,
    medium_size,
    write_all,
)
from csvfs.block.open_tables import OpenTables
from csvfs.block.slab_copy import SlabCopy
from csvfs.block.slot_tables import (
    SLOT_HEADER_SIZE,
    SlotTables,
    pack_slot_header,
    read_slot_metadata,
)
from csvfs.block.slots import Slots
from csvfs.block.superblock import (
    Superblock,
    highest_sequence,
    next_superblock,
    read_superblock,
    write_superblock,
)
from csvfs.errors import BadRequest, Corrupt, DriveFailed, DriveRefused, NoSpace, NotFound, StaleEpoch
from csvfs.ids import DriveId, Epoch, PoolId, SlabId, Term, VolumeId
from csvfs.wire.block_messages import ROLE_ABSENT, ROLE_IN_SYNC, ROLE_JOINING

_EPOCH_MAX = (1 << 32) - 1


@dataclass(slots=True)
class DriveCounters:
    """Since this open. `checksum_errors`: blocks; `io_errors`: calls of the operating system that failed;
    `pulled`: bytes that were copied onto it from other drives."""

    reads: int = 0
    writes: int = 0
    flushes: int = 0
    checksum_errors: int = 0
    healed: int = 0
    torn_adopted: int = 0
    pulled: int = 0
    io_errors: int = 0


class Drive:
    """Use `Drive.open`; then `close`.

    failure    why the drive is failed until it is opened anew; None: it is not. `fault`: the same as a word
               of drive_faults.py.
    fd         its descriptor, for this package.
    unclean    it was not closed cleanly before this open.
    contents_lost  unclean, and the page cache may be gone too (another boot, replugged, failed flush): see
                   D3. It stays so, durably, until all copies have been judged (`note_judged`): a copy here may
                   lack what was acknowledged, so one on another drive is preferred.
    repairs    what was found damaged at this open, one line each; it has been repaired where another copy
               allowed it.
    """

    def __init__(self, path: str, fd: int, boot_id: bytes | None = None) -> None:
        """Takes over `fd` of open_locked. Use `Drive.open`."""
        self.path = path
        self.fd = fd
        self.is_locked = False
        self.lock_again()
        self._boot_id = machine_boot_id() if boot_id is None else boot_id
        self.failure: str | None = None
        self.fault = ""
        self.counters = DriveCounters()
        self._flush_lock = threading.Lock()  # one flush at a time advances the deletes
        self._closed = False
        size = medium_size(fd)
        try:
            found = read_superblock(fd, size)
        except Corrupt as error:
            damaged = Corrupt(f"drive {path}: {error}; csvfs drive reset makes a new drive of it")
            raise drive_faults.faulty(damaged, error.fault or drive_faults.DAMAGED) from None
        self.superblock: Superblock = found.superblock
        self._superblock_sequence = highest_sequence(fd, size)
        self.repairs: list[str] = found.repairs
        self.layout: Layout = self.superblock.layout
        self.id: DriveId = self.superblock.drive_id
        self.is_file = is_regular_file(fd)
        self.unclean = not self.superblock.clean
        self._loses_now = self.unclean and (  # since the last open; else at an earlier one, if at all
            self.superblock.failed
            or self.superblock.boot_id != self._boot_id
            or self.superblock.disk_sequence != disk_sequence(fd)
        )
        self.contents_lost = self.unclean and (self._loses_now or self.superblock.contents_lost)
        self._copies: dict[tuple[VolumeId, SlabId], SlabCopy] = {}
        self.slots: Slots
        self._tables: OpenTables

    @classmethod
    def open(
        cls,
        path: str,
        *,
        pool_id: PoolId | None = None,
        cluster_id: bytes | None = None,
        boot_id: bytes | None = None,
    ) -> "Drive":
        """Lock, verify, repair and load a drive, and note durably that it is open.

        Args    pool_id, cluster_id: refuse a drive of another one; None: take any. boot_id: for tests of
                power cuts.
        Raises  DriveRefused: missing, in use, of another pool or cluster. Corrupt: truncated, or no
                superblock is readable. DriveFailed: it cannot be written.
        """
        fd = open_locked(path)
        try:
            drive = cls(path, fd, boot_id)
            found = drive.superblock
            if pool_id is not None and found.pool_id != pool_id:
                refused = DriveRefused(f"drive {path} is in a foreign pool ({found.pool_id.hex()})")
                raise drive_faults.faulty(refused, drive_faults.FOREIGN)
            if cluster_id is not None and found.cluster_id != cluster_id:
                refused = DriveRefused(f"drive {path} is of a foreign cluster ({found.cluster_id.hex()})")
                raise drive_faults.faulty(refused, drive_faults.FOREIGN)
            drive._load()
        except BaseException:
            os.close(fd)
            raise
        return drive

    def _load(self) -> None:
        try:
            opens = self.superblock.opens + 1
            if self._loses_now:  # D1; the old boot id stays until D3 holds
                self._note(clean=False, contents_lost=True, opens=opens)
            else:
                self._note_open(opens)
            self.slots = Slots(self.fd, self.layout, self.id)
            if 2 * len(self.quarantined) > self.slot_count:  # not rot: somebody wrote over it
                count = len(self.quarantined)
                damaged = Corrupt(
                    f"drive {self.path}: {count} of {self.slot_count} entries of its slot table are gone; "
                    "csvfs drive reset makes a new drive of it"
                )
                raise drive_faults.faulty(damaged, drive_faults.DAMAGED)
            for entry in self.slots.find():
                self._add_copy(entry.slot, entry.volume, entry.slab, entry.epoch, entry.role, entry.term)
            self.repairs += self.slots.repairs
            if self._loses_now:
                self._mark_all_active()
                os.fdatasync(self.fd)
                self._note_open(opens)
            self._tables = OpenTables(self)
        except OSError as error:
            failed = DriveFailed(f"drive {self.path}: cannot be opened for writing: {error.strerror}")
            raise drive_faults.faulty(failed, drive_faults.fault_of_errno(error.errno)) from None

    def _note_open(self, opens: int) -> None:
        boot_id, sequence = self._boot_id, disk_sequence(self.fd)
        self._note(clean=False, failed=False, opens=opens, boot_id=boot_id, disk_sequence=sequence)

    def _note(self, **changes: object) -> None:
        """Durably change the superblock. Raises DriveFailed."""
        self._check_length()
        self._superblock_sequence += 1
        self.superblock = next_superblock(self.superblock, self._superblock_sequence, **changes)
        write_superblock(self.fd, self.superblock)

    def _add_copy(
        self, slot: int, volume: VolumeId, slab: SlabId, epoch: Epoch, role: int, term: Term
    ) -> SlabCopy:
        copy = SlabCopy(self, self.fd, slot, volume, slab, epoch, role, term)
        self._copies[volume, slab] = copy
        return copy

    def _mark_all_active(self) -> None:
        """D3: marks and headers made since the last flush may be lost, so all chunks are marked."""
        marks = b"\xff" * (self.layout.chunks_per_slab // 8)
        for copy in self._copies.values():
            maps = self.layout.slot_maps_offset(copy.slot)
            header = pack_slot_header(self.id, copy.volume, copy.slab, copy.slot)
            try:
                found = os.pread(self.fd, SLOT_HEADER_SIZE, maps)
                raw = b"" if found == header else read_slot_metadata(self.fd, self.layout, copy.slot)
            except (OSError, DriveFailed) as error:  # whoever uses this slab is told again, by open_tables
                self.repairs.append(f"slab {copy.slab}: {error}")
                continue
            if found != header:
                if raw.strip(b"\0"):
                    self.repairs.append(f"slab {copy.slab} in slot {copy.slot}: its metadata is damaged")
                    continue
                # The slab was just made: its entry got to the medium, its header did not.
                write_all(self.fd, header, maps)
            write_all(self.fd, marks, maps + ACTIVE_MAP_OFFSET)

    @property
    def opens(self) -> int:
        """How often it was opened, this time included: grows durably with every open."""
        return self.superblock.opens

    @property
    def slot_count(self) -> int:
        return self.layout.slot_count

    @property
    def free_slots(self) -> int:
        """Slots that create_slab can give; quarantined ones are not."""
        return self.slots.free_count

    @property
    def quarantined(self) -> list[int]:
        """Slots of which neither half of the entry is valid: what they held must be made anew elsewhere."""
        return self.slots.quarantined

    def slabs(self) -> list[SlabCopy]:
        return list(self._copies.values())

    def find(self, volume: VolumeId, slab: SlabId) -> SlabCopy | None:
        return self._copies.get((volume, slab))

    def create_slab(self, volume: VolumeId, slab: SlabId, epoch: Epoch, role: int, term: Term) -> SlabCopy:
        """Give a slab a free slot, in which all blocks are never written; durable after the next flush.

        Idempotent: a slab that is here already is returned as it is, unless it is damaged and shall join.
        Raises  NoSpace: no free slot. BadRequest. DriveFailed.
        """
        copy = self._copies.get((volume, slab))
        if copy is not None:
            if role != ROLE_JOINING or not self._is_damaged(copy):
                return copy
            self.delete_slab(volume, slab)  # whoever joins has another copy to be made anew from
        if len(volume) != 16 or not 0 <= slab < 1 << 64 or not 0 <= term < 1 << 64:
            raise BadRequest(f"volume of {len(volume)} bytes, slab {slab} or term {term}: out of range")
        _check_epoch_and_role(epoch, role)
        slot = self._take_free_slot()
        try:
            if not self.slots.is_blank(slot):  # D2, against damage
                self.repairs.append(f"slot {slot} was free, but its tables were not empty: erased")
                self.slots.erase(slot)
                self.flush()
            self.slots.fill(slot, volume, slab, epoch, role, term)
        except OSError as error:
            raise self.io_error("create", slab, 0, error) from None
        return self._add_copy(slot, volume, slab, epoch, role, term)

    @property
    def needs_flush_for_slot(self) -> bool:
        """Whether create_slab would have to flush first, which may take long: at most two flushes help."""
        return not self.slots.has_free and self.slots.is_deleting

    def _take_free_slot(self) -> int:
        for _ in range(3):  # a deleted slot is free after two flushes
            if self.failure is not None:
                raise self.failed_error()
            slot = self.slots.take_free()
            if slot is not None:
                return slot
            if not self.slots.is_deleting:
                break
            self.flush()
        raise NoSpace(f"drive {self.path}: all {self.slot_count} slots are in use; add a drive to the pool")

    def delete_slab(self, volume: VolumeId, slab: SlabId) -> bool:
        """Forget a slab; its slot is free again after two more flushes (D2). False: it is not here."""
        copy = self._copies.get((volume, slab))
        if copy is None:
            return False
        if self.failure is not None:
            raise self.failed_error()
        try:
            self.slots.delete(copy.slot)
        except OSError as error:
            raise self.io_error("delete", slab, 0, error) from None
        del self._copies[volume, slab]
        self._tables.close_one(copy)
        return True

    def set_epoch(self, copy: SlabCopy, epoch: Epoch, role: int, term: Term) -> None:
        """Install an epoch and role; durable after the next flush. The term never falls.

        Raises  StaleEpoch when `epoch` is below the installed one. BadRequest. DriveFailed.
        """
        if epoch < copy.epoch:
            raise StaleEpoch(f"slab {copy.slab}: epoch {epoch} is below the installed {copy.epoch}")
        self._check_here(copy)
        _check_epoch_and_role(epoch, role)
        term = max(term, copy.term)
        if (epoch, role, term) == (copy.epoch, copy.role, copy.term):
            return
        if self.failure is not None:
            raise self.failed_error()
        try:
            self.slots.update(copy.slot, role=role, epoch=epoch, term=term)
        except OSError as error:
            raise self.io_error("install an epoch", copy.slab, 0, error) from None
        copy.epoch, copy.role, copy.term = epoch, role, term

    def adopt_torn(self, copy: SlabCopy) -> int:
        """Give blocks of active chunks that do not verify the checksum of what is there; how many.

        All active chunks get the copy's epoch: a power cut may have taken their stamps, and who joins later
        goes by them.

        Rule  only for the last in-sync copy, after an unclean open: FORMAT.md, "Torn blocks", says why it is
              sound.
        """
        chunks = copy.active_chunks()
        adopted = sum(copy.adopt_torn_chunk(chunk) for chunk in chunks)
        copy.stamp_chunks(chunks, copy.epoch)
        self.counters.torn_adopted += adopted
        return adopted

    # Flush, failure, close

    def scrub_slot_table(self) -> int:
        """Put right the halves of entries that rotted; how many. Raises DriveFailed."""
        if self.failure is not None:
            raise self.failed_error()
        try:
            return self.slots.scrub()
        except OSError as error:
            raise self.io_error("repair the slot table at", SlabId(0), 0, error) from None

    def rewrite_superblocks(self) -> None:
        """Write all copies of the current superblock anew. May run in another thread. Raises DriveFailed."""
        with self._flush_lock:
            if self.failure is None and not self._closed:
                self._check_still_there()
                write_superblock(self.fd, self.superblock)

    def note_judged(self) -> None:
        """Every copy has been put in service or made anew since this open: none needs to be distrusted any more.
        May run in another thread.

        Raises  DriveFailed: it stays as it was.
        """
        self.flush()  # the epochs that were installed by the judgement
        with self._flush_lock:
            if self.failure is not None:
                raise self.failed_error()
            self._note(contents_lost=False)
            self.contents_lost = False

    def end_failed(self) -> None:
        """Wait until no flush uses a failed drive any more, and note what the medium has lost. Then `close`.

        May run in another thread. A write that failed is no reason to distrust the active maps (they were
        stored before it); a flush that fails now is (D3).
        """
        assert self.failure is not None
        with self._flush_lock:
            if self._closed or self.fault in (
                drive_faults.DELETED,
                drive_faults.TRUNCATED,
                drive_faults.OVERWRITTEN,
            ):
                return
            try:
                os.fdatasync(self.fd)
            except OSError:
                with contextlib.suppress(DriveFailed):
                    self._note(failed=True)

    def flush(self) -> None:
        """All that was written before this call is on the medium when it returns. May run in another thread.

        Raises  DriveFailed; from then on the drive is failed for good (D4).
        """
        with self._flush_lock:
            if self.failure is not None:
                raise self.failed_error()
            mark = self.slots.before_flush()
            try:
                os.fdatasync(self.fd)
                self.slots.after_flush(mark)
            except OSError as error:
                self.counters.io_errors += 1
                self._fail(f"flush: {error.strerror}", drive_faults.fault_of_errno(error.errno))
            self._check_still_there()
            self.counters.flushes += 1

    def lock_again(self) -> None:
        """Take the lock that a killed process held when this drive was opened (in_use.py), if it is free now."""
        if not self.is_locked:
            self.is_locked = try_lock(self.fd)

    def fail(self, why: str, fault: str) -> None:
        """Nothing is read or written any more until the drive is closed and opened anew; the first reason
        stays."""
        if self.failure is None:
            self.failure, self.fault = why, fault

    def _fail(self, why: str, fault: str) -> NoReturn:
        """D4, noted on the drive too if it still takes that: the next open then trusts no active map."""
        self.fail(why, fault)
        with contextlib.suppress(DriveFailed):
            self._note(failed=True)
        raise self.failed_error()

    def _check_still_there(self) -> None:
        """A drive file that was deleted or truncated under us keeps nothing. Raises DriveFailed."""
        if not self.is_file:
            return
        status = os.fstat(self.fd)
        if status.st_nlink == 0:
            self._fail("its file was deleted", drive_faults.DELETED)
        self._check_length()

    def _check_length(self) -> None:
        """Before anything is written at its end, too, which would make a truncated file long again: so it is noted
        nowhere. Raises DriveFailed."""
        size = os.fstat(self.fd).st_size if self.is_file else self.superblock.size
        if size < self.superblock.size:
            self.fail(f"its file was truncated to {size} of {self.superblock.size} B", drive_faults.TRUNCATED)
            raise self.failed_error()

    def failed_error(self) -> DriveFailed:
        return DriveFailed(
            f"drive {self.path} is failed ({self.failure}); it is tried again by itself, see csvfs drive list"
        )

    def io_error(self, action: str, slab: SlabId, block: int, error: OSError) -> DriveFailed:
        """Count an I/O error and name it. One of a write fails the drive as a whole: so its copies leave the
        in-sync sets at once, instead of one by one as they are written to."""
        self.counters.io_errors += 1
        name = f"{error.strerror} (errno {error.errno})"
        if action != "read":
            self.fail(f"cannot {action}: {error.strerror}", drive_faults.fault_of_errno(error.errno))
        return DriveFailed(f"drive {self.path}: cannot {action} slab {slab} block {block}: {name}")

    def truncated_error(self, slab: SlabId, block: int) -> DriveFailed:
        self.counters.io_errors += 1
        self.fail("its file was truncated", drive_faults.TRUNCATED)
        return DriveFailed(f"drive {self.path}: slab {slab} block {block} is past its end: it was truncated")

    def close(self, *, clean: bool = True) -> None:
        """Flush and close; `clean=False`: close as a kill would. The drive may not be used any more.

        Raises  DriveFailed when what was written cannot be flushed; it is closed nevertheless, and not clean.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if clean:
                self.flush()
                self.flush()  # the halves of entries that the first one wrote
        except DriveFailed:
            clean = False
            raise
        finally:
            self._tables.close()
            try:
                if clean:
                    self._note(clean=True, contents_lost=False)  # D1
            finally:
                os.close(self.fd)
                self.fail("it was closed", drive_faults.NOT_OPENED)

    def open_tables(self, copy: CopyTables) -> SlotTables:
        """The tables of a copy; see OpenTables.open. Raises NotFound too: the slab was deleted."""
        self._check_here(copy)
        return self._tables.open(copy)

    def close_tables(self, copy: CopyTables) -> None:
        self._tables.close_one(copy)

    def _is_damaged(self, copy: SlabCopy) -> bool:
        with contextlib.suppress(Corrupt):
            if copy.tables is None and not copy.damaged:
                self._tables.open(copy)
        return copy.damaged

    def _check_here(self, copy: CopyTables) -> None:
        if self._copies.get((copy.volume, copy.slab)) is not copy:
            raise NotFound(f"drive {self.path}: slab {copy.slab} was deleted")


def _check_epoch_and_role(epoch: int, role: int) -> None:
    if not 0 <= epoch <= _EPOCH_MAX or role not in (ROLE_ABSENT, ROLE_IN_SYNC, ROLE_JOINING):
        raise BadRequest(f"epoch {epoch} or role {role} is out of range")
