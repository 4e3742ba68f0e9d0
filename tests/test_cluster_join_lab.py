"""A cluster made on bare machines by the words of README, "Three real machines": and who is not let in."""

from collections.abc import Iterator

import pytest

from tests.bare_machines import Machine, bare_machines, needs_machines, wait_for

pytestmark = needs_machines


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Machine]]:
    with bare_machines(4) as machines:
        yield machines


def test_three_machines_become_a_cluster_by_the_steps_of_the_readme(machines: list[Machine]) -> None:
    first, *others = machines[:3]
    assert "n1" in first.run("csvfs", "cluster", "create", "Tower")
    first.start()
    wait_for(lambda: "up" in first.run("csvfs", "node", "list"), "the first node")
    for machine in others:
        token = first.run("csvfs", "cluster", "token").strip()
        machine.run("csvfs", "cluster", "join", token)
        machine.start()
    for machine in machines[:3]:
        wait_for(lambda: machine.run("csvfs", "node", "list").count(" up ") == 3, "all nodes up")
    first.run("csvfs", "pool", "create")
    for machine in machines[:3]:
        machine.run("csvfs", "drive", "add", machine.drive)
    others[1].run("csvfs", "volume", "create", "Volume1", "--resiliency", "mirror", "--copies", "3")
    first.run("dd", "of=/clusterstorage/Volume1/guest", "conv=fsync", "status=none", input=b"written on n1" * 1000)
    assert others[0].run("cat", "/clusterstorage/Volume1/guest") == "written on n1" * 1000
