"""`csvfs file map`: extents in pages from the coordinator, rows with their holes, and what is shared."""

import pytest

from coordinator.file_map import file_map
from csvfs.admin.file_map import FileMap, MapRow, copies_text, rows_of, summary
from csvfs.errors import BadRequest, IsADirectory
from csvfs.ids import DriveId, Epoch, NodeName, SlabId
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import ROLE_ABSENT, ROLE_IN_SYNC, ROLE_JOINING, Member, SlabDescriptor
from tests.metadata_members import TestVolume
from tests.test_cloning import made

ROLES = (ROLE_IN_SYNC, ROLE_JOINING, ROLE_ABSENT)
MEMBERS = tuple(Member(DriveId(bytes([n]) * 16), NodeName(f"n{n}"), role) for n, role in enumerate(ROLES, 1))


def test_the_map_comes_in_pages_and_says_how_many_files_have_what(monkeypatch):
    monkeypatch.setattr("coordinator.file_map.EXTENTS_MAX", 2)
    volume = TestVolume()
    source, target = made(volume, b"a", 40), made(volume, b"b", 0)
    with volume.batch() as metadata:
        for block in (8, 16, 24):
            metadata.punch(source, block, 2, 3)
        metadata.clone(source, 4, 16, target, 4, 4)
    rows: list[list[int]] = []
    block: int | None = 0
    pages = 0
    while block is not None:
        answer = file_map(metadata, {"ino": source, "block": block})
        assert answer["size"] == 40 * BLOCK_SIZE and len(answer["slabs"]) == bool(answer["rows"])
        rows, block, pages = rows + answer["rows"], answer["next"], pages + 1
    assert [(row[0], row[1], row[4]) for row in rows] == [
        (0, 4, 1), (4, 4, 2), (10, 6, 2), (18, 2, 2), (20, 4, 1), (26, 14, 1)
    ]  # fmt: skip
    assert pages > 2 and all(row[3] == row[0] for row in rows)
    for args in ({"ino": source, "block": 1 << 40}, {"ino": 0, "block": 0}):
        with pytest.raises(BadRequest):
            file_map(metadata, args)
    with pytest.raises(IsADirectory):
        file_map(metadata, {"ino": 1, "block": 0})


def test_rows_show_holes_up_to_the_end_and_where_the_copies_are():
    descriptor = SlabDescriptor(SlabId(7), Epoch(3), MEMBERS)
    extents = [[2, 3, 7, 100, 1], [5, 1, 7, 9, 3]]
    rows = list(rows_of(extents, 9 * BLOCK_SIZE + 5, {7: descriptor}, {"01" * 16: "/dev/sdb"}))
    shown = [(row.offset // BLOCK_SIZE, row.length, row.slab, row.slab_offset // BLOCK_SIZE, row.owners) for row in rows]
    assert shown == [
        (0, 2 * BLOCK_SIZE, None, 0, 0),
        (2, 3 * BLOCK_SIZE, 7, 100, 1),
        (5, BLOCK_SIZE, 7, 9, 3),
        (6, 3 * BLOCK_SIZE + 5, None, 0, 0),
    ]
    assert copies_text(rows[1].copies) == "n1:01010101 n2:02020202(joining) n3:03030303(absent)"
    assert [copy.path for copy in rows[1].copies] == ["/dev/sdb", "", ""] and not rows[0].copies
    figures = summary(FileMap("/p", "v", 5, 1, rows))
    assert figures == {"extents": 2, "allocated": 4 * BLOCK_SIZE, "shared": BLOCK_SIZE}
    assert list(rows_of([], 0, {}, {})) == []
    assert list(rows_of([], 10, {}, {})) == [MapRow(0, 10)]
