"""A real etcd member on loopback, for tests."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio

from csvfs.admin.etcd_member import member_argv, member_configuration, write_member
from csvfs.errors import Unavailable
from csvfs.store.etcd import EtcdStore
from csvfs.store.etcd_http import Endpoint
from csvfs.store.etcd_place import EtcdPlace

HOST = "127.0.0.1"
MEMORY = Path("/dev/shm")
START_S = 60

needs_etcd = pytest.mark.skipif(shutil.which("etcd") is None, reason="needs etcd (etcd-server)")


class EtcdServer:
    """One member with a directory of its own; `place` tells the store about all of them."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.place = EtcdPlace(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.client_port, self.peer_port = free_ports(2)
        self.endpoint = Endpoint(HOST, self.client_port)
        self._data: Path | None = None
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def peer_url(self) -> str:
        return f"http://{HOST}:{self.peer_port}"

    def configure(self, peers: list[tuple[str, str]], **changed: object) -> None:
        client_url = f"http://{HOST}:{self.client_port}"
        values = member_configuration(
            self.place, self.name, client_url, self.peer_url, peers, token=str(self.place.directory.parent), is_new=True
        )
        # Tests need not survive a power cut, and the machine's disk is everybody's.
        self._data = Path(tempfile.mkdtemp(prefix="csvfs-etcd-", dir=MEMORY if MEMORY.is_dir() else None))
        write_member(self.place, {**values, "data-dir": str(self._data), **changed})

    def start(self) -> None:
        with (self.place.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(member_argv(self.place), stdout=log, stderr=log)

    def signal(self, number: int) -> None:
        """Send it; a process that is to stop or die does nothing any more when this returns."""
        assert self.process is not None
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()
        while number == signal.SIGSTOP and not self._is_stopped(self.process.pid):
            time.sleep(0.001)

    @staticmethod
    def _is_stopped(pid: int) -> bool:
        threads = Path(f"/proc/{pid}/task").glob("*/stat")
        return all(path.read_text().rpartition(")")[2].split()[0] == "T" for path in threads)

    def stop(self) -> None:
        """Kill it; what it stored is gone when the `with` of running_etcd ends."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def remove(self) -> None:
        if self._data is not None:
            shutil.rmtree(self._data, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Below the ephemeral ones, so that no connection of anybody takes them before etcd does."""
    found: list[int] = []
    for port in range(20_000 + os.getpid() % 1000 * 10, 32_000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((HOST, port))
            if port not in _given:
                found.append(port)
                _given.add(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


_given: set[int] = set()


async def wait_ready(place: EtcdPlace) -> None:
    with trio.fail_after(START_S):
        store = EtcdStore(place)
        while True:
            try:
                await store.get("ready")
                break
            except Unavailable:
                pass
        await store.close()


@contextlib.contextmanager
def running_etcd(directory: Path, count: int = 1, **changed: object) -> Iterator[list[EtcdServer]]:
    """Members of one cluster that are ready; each one's place names itself first. `changed`: of member.json."""
    servers = [EtcdServer(f"m{index}", directory / f"m{index}") for index in range(1, count + 1)]
    try:
        for server in servers:
            server.configure([(other.name, other.peer_url) for other in servers], **changed)
            others = [other.endpoint for other in servers if other is not server]
            server.place.write_endpoints([server.endpoint, *others])
            server.start()
        with ThreadPoolExecutor(1) as other_thread:  # the caller may be inside a trio loop
            other_thread.submit(trio.run, wait_ready, servers[0].place).result()
        yield servers
    finally:
        for server in servers:
            server.stop()
            server.remove()
