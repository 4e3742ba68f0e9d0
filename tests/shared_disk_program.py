"""`python shared_disk_program.py FILE PART PARTS`: writes to a disk that programs on other nodes write, too, past the cache, until
standard input ends; then a line of JSON.

Block `n` is written by program `n % PARTS` in the first MiB, so that nodes contend for it, and by the program whose part of the
rest it lies in behind that. Each block says who wrote it and the how-manieth time; every program reads blocks of all, whose
number must never go back, nor fall behind what it has written itself.
"""

import json
import mmap
import os
import random
import struct
import sys
import threading

BLOCK = 4096
CONTENDED = 256  # blocks
BLOCKS = 16 * 256
HEAD = struct.Struct("<QQQ")  # block, part, count


class Disk:
    def __init__(self, path: str, part: int, parts: int) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.part, self.parts = part, parts
        self.buffer = mmap.mmap(-1, BLOCK)
        self.seen: dict[int, int] = {}
        self.written: dict[int, int] = {}
        self.wrong: list[str] = []
        self.chance = random.Random(part)

    def owner(self, block: int) -> int:
        if block < CONTENDED:
            return block % self.parts
        return (block - CONTENDED) * self.parts // (BLOCKS - CONTENDED)

    def draw(self) -> int:
        return self.chance.randrange(CONTENDED if self.chance.random() < 0.3 else BLOCKS)

    def write(self) -> None:
        block = self.draw()
        while self.owner(block) != self.part:
            block = self.draw()
        count = self.written.get(block, 0) + 1
        self.buffer[:] = HEAD.pack(block, self.part, count) * (BLOCK // HEAD.size) + bytes(BLOCK % HEAD.size)
        if os.pwritev(self.file, [self.buffer], block * BLOCK) != BLOCK:
            self.wrong.append(f"block {block}: written in part")
        self.written[block] = self.seen[block] = count

    def read(self) -> None:
        block = self.draw()
        if os.preadv(self.file, [self.buffer], block * BLOCK) != BLOCK:
            self.wrong.append(f"block {block}: read in part")
        heads = {HEAD.unpack_from(self.buffer, at) for at in range(0, BLOCK - HEAD.size + 1, HEAD.size)}
        if len(heads) != 1:
            self.wrong.append(f"block {block}: torn: {sorted(heads)}")
            return
        ((number, part, count),) = heads
        if count and (number, part) != (block, self.owner(block)):
            self.wrong.append(f"block {block}: is block {number} of {part}")
        if count < self.seen.get(block, 0) or (part == self.part and count != self.written.get(block, 0)):
            self.wrong.append(f"block {block}: {count}, and was {self.seen.get(block, 0)}")
        self.seen[block] = max(count, self.seen.get(block, 0))


def main() -> None:
    disk = Disk(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), over.set()), daemon=True).start()
    print("at work", flush=True)
    done = 0
    try:
        while not over.is_set() and not disk.wrong:
            disk.write() if disk.chance.random() < 0.6 else disk.read()
            if disk.chance.random() < 0.005:
                os.fsync(disk.file)
            done += 1
    except OSError as error:
        disk.wrong.append(f"{error}, after {done} calls")
    print(json.dumps({"wrong": disk.wrong, "done": done, "written": list(disk.written.items())}), flush=True)


if __name__ == "__main__":
    main()
