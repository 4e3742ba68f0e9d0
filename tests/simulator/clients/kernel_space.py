"""The model of the kernel: where a file has space. copy_file_range(2), and fallocate(2) that punches holes.

Place      simulator, above kernel.py.
Model      Linux 6.18, __fuse_copy_file_range and fuse_file_fallocate: the inode that is changed is locked; no page of it
           is, so READs may be under way; once the answer is there, pages of the range are taken away, waiting for those that are
           locked. generic_copy_file_checks goes by the size of the source that the kernel knows.
"""

from __future__ import annotations

import os

import trio

from csvfs.mount import fuse_abi as abi
from tests.simulator.clients.kernel import PAGE, Connection, Inode
from tests.simulator.clients.models import CELL

_PUNCH_HOLE = 1 | 2  # with KEEP_SIZE, <linux/falloc.h>


async def copy_range(connection: Connection, source: int, page: int, target: int, to: int, count: int) -> int:
    """Pages of one file to another or the same one, open both. How many cells were copied. Raises OSError."""
    size = min(count * PAGE, connection.inode(source).size - page * PAGE)
    if size <= 0:
        return 0
    inode = connection.inode(target)
    async with inode.lock:
        if to * PAGE + size > inode.size:
            inode.resized = trio.Event()
        try:
            copied: list[int] = []

            def take(body: bytes) -> None:
                copied.append(abi.U32.unpack_from(body)[0])
                connection.resized_by_call(inode, to * PAGE + copied[0] if copied[0] else 0)

            body = abi.COPY_FILE_RANGE_IN.pack(source, page * PAGE, target, target, to * PAGE, size, 0)
            await connection.ask(abi.COPY_FILE_RANGE, source, body, take)
            await _drop_pages(connection, inode, to, count)
        finally:
            if inode.resized is not None:
                inode.resized.set()
                inode.resized = None
    return copied[0] // CELL


async def punch(connection: Connection, ino: int, page: int, count: int) -> None:
    """Zeros in place of pages, as far as the file goes; it is open for writing. Raises OSError."""
    inode = connection.inode(ino)
    async with inode.lock:
        body = abi.FALLOCATE_IN.pack(ino, page * PAGE, count * PAGE, _PUNCH_HOLE, 0)
        await connection.ask(abi.FALLOCATE, ino, body, lambda body: connection.resized_by_call(inode, 0))
        await _drop_pages(connection, inode, page, count)


async def _drop_pages(connection: Connection, inode: Inode, first: int, count: int) -> None:
    """truncate_pagecache_range."""
    for page in range(first, first + count):
        async with connection.page_lock(inode, page):
            inode.pages.pop(page, None)


async def copy_between(connection: Connection, source: int, page: int, target: int, to: int, count: int) -> int:
    """With both files open meanwhile."""
    await connection.open(source, os.O_RDONLY)
    try:
        await connection.open(target, os.O_WRONLY)
        try:
            return await copy_range(connection, source, page, target, to, count)
        finally:
            connection.close(target, os.O_WRONLY)
    finally:
        connection.close(source, os.O_RDONLY)
