"""Three nodes at work on the same few files: what their programs saw is what one machine would have shown them."""

from collections.abc import Iterator

import pytest

from csvfs.units import GIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for
from tests.programs import coherence
from tests.test_first_cluster import is_mounted

pytestmark = [pytest.mark.lab, needs_lab]

NODES = ("n1", "n2", "n3")


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=3, drives=1, drive_size=2 * GIB) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "3")
        for node in NODES:
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=60)
        yield cluster


def test_what_programs_on_three_nodes_see_of_pages_logs_locks_and_names_is_linearizable(lab):
    figures = coherence.run(lab.directory, NODES, "Volume1", seconds=20, seed=4, kill=False)
    assert figures.rounds >= 1 and figures.operations > 100
