"""Programs on mounts and coordinators under simulated faults: a range of seeds in every test run.

A failure prints the seed; `tools/sim --world clients --seed N` replays it. What is injected:
tests/simulator/clients/faults.py.
"""

import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from csvfs.mount import fuse_abi as abi
from tests.simulator.clients.kernel import PAGE, Connection
from tests.simulator.clients.models import DIRECTORY, PIECEMEAL
from tests.simulator.clients.recorder import NAMES, Recorder, Violation, first_names
from tests.simulator.clients.world import FIRST_SEED_WITH_HAND_OVER, FIRST_SEED_WITH_SHARED_WRITE
from tests.test_simulator import TIMEOUT_S, check, simulate

clients = partial(simulate, "--world", "clients")
# How many from each first one.
SEEDS = {1: 800, FIRST_SEED_WITH_HAND_OVER + 1: 850, FIRST_SEED_WITH_SHARED_WRITE + 1: 350}
# Seeds that found something when they were first run, beyond those of the range.
KNOWN_SEEDS = (3033, 3075, 3102, 3116, 3183, 3188, 21325, 21342, 21367, 22496, 23817, 24461, 25279, 50081,
               100078, 200206, 200763, 214013, 215316, 300496, 300521, 300686, 301759, 302319, 302429, 302623)  # fmt: skip


@pytest.mark.slow
def test_what_programs_see_is_linearizable_whatever_breaks() -> None:
    """Reads, writes, appends, truncations and names, in more than half of the runs clones and holes, too, and mounts that are
    followed by others, in some files that several nodes write at once, on three nodes; in the end all nodes agree."""
    ranges = [f"{first}..{first + count - 1}" for first, count in SEEDS.items()]
    check([clients("--seeds", ",".join(ranges[1::2])), clients("--seeds", ",".join(ranges[::2]))], sum(SEEDS.values()))


@pytest.mark.slow
def test_seeds_that_once_found_a_fault_of_clients_hold() -> None:
    """The faults have tests of their own, too: a seed is another run when the code runs in another order."""
    check([clients("--seeds", ",".join(map(str, KNOWN_SEEDS)))], len(KNOWN_SEEDS))


def test_a_few_seeds_of_clients_hold() -> None:
    """What fits into the fast tests."""
    check([clients("--seeds", "2001..2003,205001..205003,305001..305002")], 8)


def test_a_seed_of_clients_replays_its_run_exactly() -> None:
    """In another process, after other seeds, with other hashes: the same events at the same instants."""
    alone = [clients("--seed", "13", hash_seed=hash_seed) for hash_seed in ("0", "random")]
    outputs = {run.communicate(timeout=TIMEOUT_S)[0] for run in alone}
    assert len(outputs) == 1
    (output,) = outputs
    assert len(output.splitlines()) > 50
    after = clients("--seeds", "7,13", "--digests")
    found = dict(re.findall(r"^digest of (\d+): (\w+)", after.communicate(timeout=TIMEOUT_S)[0], re.M))
    assert found["13"] == output.split()[-1]


async def test_the_model_of_the_kernel_lets_no_file_grow_by_an_empty_answer_to_a_read() -> None:
    """Two reads of a file that another node has made shorter, of which the kernel has not heard (fuse_read_update_size)."""
    nothing: Any = SimpleNamespace(events_queue=SimpleNamespace(after=lambda delay_s, action: action()))
    connection = Connection(nothing)
    inode = connection.inode(5)
    inode.size = 4 * PAGE
    found: dict[int, bytes] = {}

    async def read(page: int) -> None:
        found[page] = await connection.read(5, page, direct=False)

    async with trio.open_nursery() as nursery:
        for page in (2, 3):
            nursery.start_soon(read, page)
            await trio.testing.wait_all_tasks_blocked()
        for unique in (2, 4):  # the kernel's numbers of requests are even
            connection.take_reply(abi.OUT_HEADER.pack(abi.OUT_HEADER.size, 0, unique))
    assert found == {2: b"", 3: b""}
    assert inode.size == 2 * PAGE


def _check_judged(record: Recorder, right: bool) -> None:
    if right:
        assert record.judge(first_names()) == 0
    else:
        with pytest.raises(Violation, match="not linearizable"):
            record.judge(first_names())


@pytest.mark.parametrize(
    ("told", "of_before", "right"),
    [
        ([(b"f0", 3), (b"f1", 3)], False, True),  # f0 was told before the rename to f1, f1 after it
        ([], False, True),
        ([(b"f0", 3), (b"f1", 3)], True, False),  # all of it after the rename
        ([], True, False),
        ([(b"f0", 4)], False, False),  # no such inode
    ],
)
def test_a_listing_in_pieces_may_see_both_names_of_a_file_that_is_renamed_meanwhile_only(
    told: list[tuple[bytes, int]], of_before: bool, right: bool
) -> None:
    """POSIX leaves open what of a change in the middle of a listing is seen; `of_before`: the change is before it."""
    record = Recorder(lambda text: None)
    record.end(record.begin(NAMES, "n1.0", "make", DIRECTORY, b"f0", False), 3)
    rename = record.begin(NAMES, "n1.0", "rename", DIRECTORY, b"f0", DIRECTORY, b"f1")
    if of_before:
        record.end(rename, 0)
    listing = record.begin(NAMES, "n2.0", "list", DIRECTORY)
    if not of_before:
        record.end(rename, 0)
    listing.name = PIECEMEAL
    record.end(listing, told)
    _check_judged(record, right)


def _two_files() -> Recorder:
    """3: cells 1 and 2; 4: nothing."""
    record = Recorder(lambda text: None)
    record.end(record.begin(3, "n1.0", "write", 0, (1, 2)), None)
    return record


@pytest.mark.parametrize(
    ("copied", "read", "right"),
    [
        (2, (1, 2), True),
        (2, (3, 4), True),  # what was written to the source meanwhile
        (2, (1, 4), False),  # a block of which half is old
        (2, (0, 0), False),
        (2, (1,), False),
        (0, (), True),  # copy_file_range may copy less
        (0, (1, 2), False),
        (4, (1, 2), False),  # the source never had as much
    ],
)
def test_a_clone_shows_what_its_source_had_at_one_moment_of_it(copied: int, read: tuple[int, ...], right: bool) -> None:
    record = _two_files()
    clone = record.begin(4, "n1.0", "clone", 3, 0, 0, 2)
    record.end(record.begin(3, "n2.0", "write", 0, (3, 4)), None)
    record.end(clone, copied)
    record.end(record.begin(4, "n3.0", "read", 0), read)
    _check_judged(record, right)


@pytest.mark.parametrize(("written", "read", "right"), [(3, (1, 2), True), (3, (5, 6), False), (4, (5, 6), True), (4, (1, 2), False)])
def test_a_write_after_a_clone_is_seen_in_that_file_only(written: int, read: tuple[int, ...], right: bool) -> None:
    record = _two_files()
    record.end(record.begin(4, "n1.0", "clone", 3, 0, 0, 1), 2)
    record.end(record.begin(written, "n2.0", "write", 0, (5, 6)), None)
    record.end(record.begin(4, "n3.0", "read", 0), read)
    _check_judged(record, right)


@pytest.mark.parametrize(("read", "right"), [((1, 2), True), ((), True), ((0, 0), False)])
def test_a_clone_without_an_answer_may_be_made_or_not(read: tuple[int, ...], right: bool) -> None:
    record = _two_files()
    record.begin(4, "n1.0", "clone", 3, 0, 0, 1)
    record.end(record.begin(4, "n3.0", "read", 0), read)
    _check_judged(record, right)


def test_a_hole_is_zeros_as_far_as_the_file_goes() -> None:
    record = _two_files()
    record.end(record.begin(3, "n1.0", "punch", 0, 4), None)
    record.end(record.begin(3, "n1.0", "read", 0), (0, 0))
    record.end(record.begin(3, "n1.0", "size"), 2)
    assert record.judge(first_names()) == 0
    record.end(record.begin(3, "n1.0", "read", 0), (1, 2))
    with pytest.raises(Violation, match="not linearizable"):
        record.judge(first_names())


@pytest.mark.parametrize(("reader", "read", "right"), [("n1.1", (3,), True), ("n2.0", (3,), False), ("n1.1", (1,), True), ("n1.1", (4,), False)])
def test_a_write_over_the_end_of_a_file_may_be_seen_to_the_old_end_on_its_node(
    reader: str, read: tuple[int, ...], right: bool
) -> None:
    record = _two_files()
    record.end(record.begin(3, "n1.0", "truncate", 1), None)
    write = record.begin(3, "n1.0", "write", 0, (3, 4))
    record.end(record.begin(3, reader, "read", 0), read)
    record.end(write, None)
    record.end(record.begin(3, "n3.0", "read", 0), (3, 4))
    _check_judged(record, right)
