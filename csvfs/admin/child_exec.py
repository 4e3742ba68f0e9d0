"""Become another program that is killed when its parent dies. Started as a file by child.py, with `-I -S`.

Place      admin floor; imports nothing of csvfs, since it runs at every start of a child.
Usage      child_exec.py PARENT_PID PROGRAM ARGUMENT...
Why        A wrapper and not a `preexec_fn`: the parent has threads, and code between fork and exec of a
           process with threads may find a lock held for ever.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(sys.argv[1]):  # it died before prctl: no signal will come any more
        sys.exit("the parent is gone")
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
