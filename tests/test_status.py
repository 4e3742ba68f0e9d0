"""What `csvfs status` makes of the cluster store and of what the processes answer, or do not answer."""

import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from rich.console import Console

from csvfs.admin import status as module
from csvfs.admin.cli_status import as_map, job_line, print_status
from csvfs.admin.cluster_view import ClusterView, Record, read_cluster_view
from csvfs.admin.peers import CALL_TIMEOUT_S, open_peers
from csvfs.admin.render import format_duration, plain
from csvfs.admin.status import ClusterStatus, JobStatus, collect_status
from csvfs.errors import Corrupt
from csvfs.net.calls import CallTable
from csvfs.net.engine import Engine
from csvfs.net.link import Link, Listener
from csvfs.store.embedded import EmbeddedStore
from csvfs.store.interface import ClusterStore
from csvfs.units import GIB, MIB
from csvfs.wire.control import pack_value
from csvfs.wire.frames import Frame

SLAB = 64 * MIB
SLOTS = 60
DRIVES = {f"n{node}": [bytes([node, index]) * 8 for index in (1, 2, 3)] for node in (1, 2, 3)}


async def fill_store(store: ClusterStore, ports: dict[str, int], *, down: tuple[str, ...] = ()) -> None:
    """Three nodes with three drives each, Volume1 coordinated by n1."""

    async def put(key: str, **value: Any) -> None:
        await store.put(key, pack_value(value))

    await put("cluster", id=bytes(16), name="lab", created=0)
    await put("pool", id=bytes(16), name="pool", slab_size=SLAB)
    for node, drives in DRIVES.items():
        await put(f"nodes/{node}", address="127.0.0.1")
        if node not in down:
            await put(f"alive/{node}", incarnation=1, address="127.0.0.1", started=0)
            await put(f"servers/{node}", address="127.0.0.1", port=ports[node], path="", incarnation=1)
        for index, drive in enumerate(drives, 1):
            await put(
                f"drives/{drive.hex()}",
                node=node,
                path=f"/lab/{node}/drive{index}",
                size=SLOTS * SLAB + MIB,
                kind="file",
                state="ok",
                slots=SLOTS,
            )
    volume = {"id": bytes(16), "name": "Volume1", "resiliency": "mirror", "copies": 3, "size": 0}
    await put("volumes/Volume1", **volume, state="online", created=0)
    await put("owner/Volume1", node="n1", address="127.0.0.1", port=ports["coordinator"], incarnation=1)


def always(value: Any, link: Link, args: dict[str, Any]) -> Any:
    return value


class FakeProcess:
    """Answers calls with fixed values; `silent` ones take the connection and say nothing."""

    def __init__(
        self, engine: Engine, nursery: trio.Nursery, answers: dict[str, Any], silent: bool = False
    ) -> None:
        calls = CallTable({name: partial(always, value) for name, value in answers.items()})

        def on_frame(link: Link, frame: Frame) -> None:
            if not silent:
                calls.handle(link, frame, nursery)

        def on_link(link: Link) -> None:
            link.on_frame = on_frame

        self.listener = Listener(engine, ("127.0.0.1", 0), on_link)
        self.port = self.listener.port


def drive_answers(node: str, *, bad: int | None = None) -> dict[str, Any]:
    rows = [
        {"id": drive, "state": "failed" if index == bad else "ok", "slots": SLOTS, "free_slots": 50}
        for index, drive in enumerate(DRIVES[node], 1)
    ]
    return {"hello": {}, "status": {"drives": rows}}


COORDINATOR_ANSWERS: dict[str, Any] = {
    "volume_status": {
        "health": "Degraded",
        "slabs": {"in sync": 10, "degraded": 2},
        "jobs": [{"what": "copying 2 slabs to n3", "done": 32 * MIB, "total": 128 * MIB, "rate": 48 * MIB}],
        "sessions": [],
        "term": 4,
    },
    "statfs": {"size": 20 * GIB, "free": 19 * GIB, "files": 10, "files_free": 9, "name_max": 255},
}


def shown(status: ClusterStatus) -> list[str]:
    """The lines on a screen of 80 columns."""
    console = Console(file=io.StringIO(), width=80, highlight=False, markup=False)
    print_status(status, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.fixture
async def store(tmp_path: Path) -> Any:
    store = EmbeddedStore(tmp_path / "store.db")
    yield store
    await store.close()


async def status_of(
    store: ClusterStore, processes: dict[str, dict[str, Any]], **options: Any
) -> ClusterStatus:
    """Start the processes, fill the store, collect. An empty map of answers: a silent process."""
    engine = Engine()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run_forever)
        running = {
            name: FakeProcess(engine, nursery, answers, not answers) for name, answers in processes.items()
        }
        await fill_store(store, {name: process.port for name, process in running.items()}, **options)
        async with open_peers() as peers:
            status = await collect_status(store, peers)
        nursery.cancel_scope.cancel()
    for process in running.values():
        process.listener.close()
    engine.close()
    return status


async def test_a_cluster_in_order_is_shown_on_one_screen(store: ClusterStore) -> None:
    processes = {node: drive_answers(node) for node in DRIVES} | {"coordinator": COORDINATOR_ANSWERS}
    status = await status_of(store, processes)
    lines = shown(status)
    text = "\n".join(lines)

    assert len(lines) <= 24
    assert all(len(line) <= 80 for line in lines)
    for words in (
        "cluster lab",
        "n1",
        "n2",
        "n3",
        "3 ok",
        "mirror x3",
        "Degraded",
        "copying 2 slabs to n3, 25 %",
        "2 s left",
    ):
        assert words in text, text
    assert status.pool is not None
    assert (status.pool.size, status.pool.free) == (9 * SLOTS * SLAB, 9 * 50 * SLAB)
    assert status.pool.nodes_unknown == []
    assert (status.volumes[0].size, status.volumes[0].free) == (20 * GIB, 19 * GIB)


async def test_a_bad_drive_is_named(store: ClusterStore) -> None:
    processes = {node: drive_answers(node) for node in DRIVES} | {"coordinator": COORDINATOR_ANSWERS}
    processes["n2"] = drive_answers("n2", bad=3)
    status = await status_of(store, processes)
    assert [node.drives_bad for node in status.nodes] == [[], ["/lab/n2/drive3"], []]
    text = "\n".join(shown(status))
    assert "2 ok, 1 bad" in text
    assert "/lab/n2/drive3" in text


async def test_a_node_that_is_down_is_said_to_be_and_its_drives_are_not_counted(store: ClusterStore) -> None:
    processes = {node: drive_answers(node) for node in ("n1", "n2")} | {"coordinator": COORDINATOR_ANSWERS}
    status = await status_of(store, processes, down=("n3",))
    assert [node.state for node in status.nodes] == ["up", "up", "down"]
    assert status.pool is not None
    assert status.pool.nodes_unknown == ["n3"]
    assert "(without n3)" in shown(status)[0]


async def test_processes_that_do_not_answer_cost_two_seconds_and_no_more(
    store: ClusterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CALL_TIMEOUT_S == 2.0
    monkeypatch.setattr("csvfs.admin.peers.CALL_TIMEOUT_S", 0.2)
    processes: dict[str, dict[str, Any]] = {"n1": drive_answers("n1"), "n2": {}, "n3": {}, "coordinator": {}}
    status = await status_of(store, processes)
    assert [bool(node.note) for node in status.nodes] == [False, True, True]
    assert status.volumes[0].health == module.UNKNOWN
    assert "did not answer" in status.volumes[0].note
    assert "did not answer" in " ".join(" ".join(shown(status)).split())


async def test_a_volume_without_coordinator_is_unknown_and_says_so(store: ClusterStore) -> None:
    processes = {node: drive_answers(node) for node in DRIVES} | {"coordinator": COORDINATOR_ANSWERS}
    await status_of(store, processes)
    await store.delete("owner/Volume1")
    async with open_peers() as peers:
        status = await collect_status(store, peers)
    assert (status.volumes[0].health, status.volumes[0].coordinator) == ("Unknown", "")
    assert "no coordinator at the moment" in status.volumes[0].note


@pytest.mark.parametrize(
    "answer",
    [
        None,
        7,
        [],
        {"health": 3, "jobs": "many", "slabs": []},
        {"jobs": [None, {"done": "x"}], "health": "Fine"},
    ],
)
async def test_an_answer_of_the_wrong_shape_is_unknown_and_no_crash(store: ClusterStore, answer: Any) -> None:
    processes = {node: {"hello": None, "status": answer} for node in DRIVES}
    status = await status_of(store, processes | {"coordinator": {"volume_status": answer, "statfs": answer}})
    assert status.volumes[0].health == "Unknown"
    assert status.volumes[0].size is None
    assert len(shown(status)) <= 24


async def test_an_empty_store_says_what_to_do_first(store: ClusterStore) -> None:
    async with open_peers() as peers:
        status = await collect_status(store, peers)
    assert shown(status) == ["no cluster in this cluster store yet: csvfs cluster create NAME"]


async def test_a_damaged_key_is_named(store: ClusterStore) -> None:
    for key, value in (
        ("nodes/n1", b"\xc1"),
        ("volumes/Volume1", pack_value(["a list"])),
        ("pool", pack_value({"slab_size": "large"})),
    ):
        await store.put(key, value)
        with pytest.raises(Corrupt, match=key):
            view = await read_cluster_view(store)
            module.pool_status(view, [])
        await store.delete(key)


def test_the_json_is_plain_and_complete() -> None:
    job = JobStatus("Volume1", "copying", done=1, total=4, rate=1.0)
    status = ClusterStatus("lab", [], [], None, [], [job])
    assert plain(as_map(status)) == {
        "cluster": "lab",
        "nodes": [],
        "pool": None,
        "drives": [],
        "volumes": [],
        "jobs": [
            {
                "volume": "Volume1",
                "kind": "repair",
                "what": "copying",
                "done": 1,
                "left": 3,
                "total": 4,
                "copied": None,
                "rate": 1.0,
                "percent": 25.0,
                "eta_s": 3.0,
                "paused": False,
                "waiting_for": "",
            }
        ],
    }


@pytest.mark.parametrize(
    ("job", "line"),
    [
        (JobStatus("V", "copying"), "V: copying, ? %, ? left"),
        (
            JobStatus("V", "copying", 1, 2, 1, "node n3"),
            "V: copying, 50 % of 2 B, 1 B/s, waiting for node n3",
        ),
        (JobStatus("V", "copying", 0, 0, 0), "V: copying, 100 % of 0 B, 0 B/s, ? left"),
        (JobStatus("V", "copying", 9, 3, 1), "V: copying, 100 % of 3 B, 1 B/s, 0 s left"),
        (
            JobStatus("V", "copying", 0, 7200 * MIB, MIB),
            "V: copying, 0 % of 7.0 GiB, 1.0 MiB/s, 2 h 00 min left",
        ),
    ],
)
def test_a_job_is_told_as_far_as_it_is_known(job: JobStatus, line: str) -> None:
    assert job_line(job) == line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0, "0 s"), (89, "89 s"), (90, "2 min"), (5300, "88 min"), (11_100, "3 h 05 min")],
)
def test_durations_are_told_in_units_of_people(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_node_known_only_by_its_drives_is_listed() -> None:
    view = ClusterView(drives={"00": Record("drives/00", {"node": "n9", "path": "/d"}, 1)})
    assert view.node_names == ["n9"]
    assert view.domains_with_drives("node") == set()
