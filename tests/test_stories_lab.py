"""The whole of what programs may ask for, on two nodes at random, against a model: names, attributes, data, errnos."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from csvfs.units import GIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for
from tests.programs.hands import Hand, hands_on
from tests.programs.stories import KINDS, PICK_MAX, Step, Story
from tests.test_first_cluster import is_mounted

pytestmark = [pytest.mark.lab, needs_lab]

STEPS = 200
folders = itertools.count()
picks = st.integers(0, PICK_MAX)
stories = st.lists(st.tuples(st.integers(0, len(KINDS) - 1), st.integers(0, 1), picks, picks, picks), min_size=STEPS, max_size=STEPS)


@pytest.fixture(scope="module")
def hands() -> Iterator[list[Hand]]:
    with running_lab(nodes=2, drives=1, drive_size=4 * GIB) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "2")
        for node in ("n1", "n2"):
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=60)
        with hands_on(cluster.directory, ("n1", "n2")) as both:
            yield both


def play(hands: list[Hand], steps: list[Step]) -> None:
    story = Story(hands, b"/clusterstorage/Volume1/%d" % next(folders))
    try:
        for step in steps:
            story.play(step)
        story.end()
    except AssertionError:
        note("\n".join(story.told))
        raise
    finally:
        story.close()


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(stories)
def test_two_nodes_are_one_posix_file_system_whatever_they_do(hands: list[Hand], steps: list[Step]) -> None:
    play(hands, steps)
