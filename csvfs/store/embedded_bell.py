"""The bell of the embedded store: who commits writes a byte to `store.db-bell`, who watches is woken by
inotify.

Place      store floor, below embedded.py.
Why        Watches that poll every 20 ms cost 17 ms of CPU a second in each process (measured; trio wake-ups,
           not SQLite), and a lab has a dozen processes. With the bell they sleep, and hear of a change
           sooner.
Rule       The bell is a hint. A writer killed between commit and ringing leaves it silent, so a watch looks
           by itself every IDLE_INTERVAL_S; and where the kernel gives no inotify (128 instances per user by
           default), it looks every POLL_INTERVAL_S.
"""

import ctypes
import os
from pathlib import Path

import trio

IDLE_INTERVAL_S = 0.2
POLL_INTERVAL_S = 0.02
_IN_MODIFY = 2


class Bell:
    """For those who commit. `ring` may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def ring(self) -> None:
        os.pwrite(self._descriptor, b"!", 0)

    def close(self) -> None:
        os.close(self._descriptor)


class BellListener:
    """For one watch."""

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)  # -1: none to be had
        if (
            self._descriptor >= 0
            and libc.inotify_add_watch(self._descriptor, os.fsencode(path), _IN_MODIFY) < 0
        ):
            self.close()

    async def wait(self) -> None:
        """Until it may have rung since the last `wait`, or it is time to look anyway. Cancel: safe."""
        if self._descriptor < 0:
            await trio.sleep(POLL_INTERVAL_S)
            return
        with trio.move_on_after(IDLE_INTERVAL_S):
            await trio.lowlevel.wait_readable(self._descriptor)
            os.read(self._descriptor, 65536)  # before the caller looks: what rings from now on wakes it again

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
