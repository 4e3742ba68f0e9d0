"""The kernel's wire format: what is packed is what the kernel's structs say, what is unpacked is checked."""

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfs.mount import fuse_abi as abi

KERNEL_HEADER = Path("/usr/include/linux/fuse.h")


@pytest.mark.skipif(not KERNEL_HEADER.exists(), reason="no <linux/fuse.h> here")
def test_numbers_are_those_of_the_kernels_header() -> None:
    text = KERNEL_HEADER.read_text()
    opcodes = dict(re.findall(r"\tFUSE_(\w+)\s*= (\d+),", text))
    for name in ("LOOKUP", "SETATTR", "READ", "WRITE", "CREATE", "READDIRPLUS", "RENAME2", "COPY_FILE_RANGE"):
        assert getattr(abi, name) == int(opcodes[name])
    for name, bit in re.findall(r"#define FUSE_(\w+)\s+\(1(?:ULL)? << (\d+)\)", text):
        flag = getattr(abi, f"FLAG_{name}", None)
        assert flag is None or flag == 1 << int(bit), name
    for name, bit in re.findall(r"#define (FOPEN_\w+)\s+\(1 << (\d+)\)", text):
        assert getattr(abi, name, 1 << int(bit)) == 1 << int(bit)


def test_an_init_request_has_its_flags_in_two_words() -> None:
    low = abi.FLAG_INIT_EXT | abi.FLAG_MAX_PAGES
    body = struct.pack("=IIIII", 7, 45, 131072, low, 1 << 4) + bytes(44)
    request = abi.unpack_init(memoryview(body))
    assert request == abi.InitRequest(7, 45, 131072, low | abi.FLAG_DIRECT_IO_ALLOW_MMAP)
    assert abi.unpack_init(memoryview(body)[:15]) is None
    old = abi.unpack_init(memoryview(body)[:16])
    assert old is not None and old.flags == low


def test_an_init_reply_fills_the_kernels_struct() -> None:
    flags = abi.FLAG_BIG_WRITES | abi.FLAG_DIRECT_IO_ALLOW_MMAP
    reply = abi.pack_init_reply(
        9, minor=44, flags=flags, max_readahead=1 << 20, max_background=64, io_size_max=1 << 20
    )
    assert abi.OUT_HEADER.unpack_from(reply) == (80, 0, 9)
    assert struct.unpack_from("=IIIIHHIIHHI", reply, 16) == (
        7, 44, 1 << 20, abi.FLAG_BIG_WRITES, 64, 48, 1 << 20, 1, 256, 0, 1 << 4,
    )  # fmt: skip


def test_statfs_counts_in_blocks() -> None:
    figures = {"size": 10 * 4096 + 5, "free": 3 * 4096, "files": 7, "files_free": 8, "name_max": 255}
    reply = abi.pack_statfs_reply(1, figures)
    assert len(reply) == 96
    assert abi.STATFS_OUT.unpack_from(reply, 16)[:8] == (10, 3, 3, 7, 8, 4096, 255, 4096)


def test_notifications_have_no_request_to_answer() -> None:
    assert abi.OUT_HEADER.unpack_from(abi.pack_inval_inode(5, -1, 0)) == (40, 2, 0)
    assert abi.OUT_HEADER.unpack(abi.pack_inc_epoch()) == (16, 8, 0)


def plus_reply(names: list[bytes]) -> bytes:
    body = b""
    for number, name in enumerate(names, start=1):
        entry = bytes(abi.ENTRY_OUT_SIZE) + abi.DIRENT.pack(number, 100 + number, len(name), 8) + name
        body += entry + bytes(-len(entry) % 8)
    return abi.OUT_HEADER.pack(16 + len(body), 0, 77) + body


@given(st.lists(st.binary(min_size=1, max_size=255)))
def test_a_listing_without_attributes_has_the_same_names_in_the_same_order(names: list[bytes]) -> None:
    reply = abi.without_attributes(memoryview(plus_reply(names)))
    assert abi.OUT_HEADER.unpack_from(reply) == (len(reply), 0, 77)
    found = []
    at = 16
    while at < len(reply):
        ino, cookie, size, kind = abi.DIRENT.unpack_from(reply, at)
        assert (cookie, kind) == (100 + ino, 8)
        found.append(reply[at + 24 : at + 24 + size])
        at += (24 + size + 7) // 8 * 8
    assert found == names


@given(st.lists(st.binary(min_size=1, max_size=30), min_size=1), st.data())
def test_a_cut_listing_is_refused(names: list[bytes], data: st.DataObject) -> None:
    whole = plus_reply(names)
    offsets = set(abi.entry_offsets(memoryview(whole))) | {16}
    cut = data.draw(st.integers(17, len(whole) - 1).filter(lambda size: size not in offsets))
    with pytest.raises(ValueError, match="ends within"):
        abi.without_attributes(memoryview(whole)[:cut])
