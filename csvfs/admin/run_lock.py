"""One `csvfs node run` per node, and nobody beside it who runs its member of the cluster store. Admin floor."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from csvfs.errors import Conflict


@contextlib.contextmanager
def run_dir_lock(run_dir: Path) -> Iterator[None]:
    """Two supervisors on one run_dir would end each other's lease for ever. Raises Conflict, OSError."""
    descriptor = os.open(run_dir / "node.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"another `csvfs node run` uses {run_dir}; stop it first") from None
        yield
    finally:
        os.close(descriptor)
