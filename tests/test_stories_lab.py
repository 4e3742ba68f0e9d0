"""What programs may ask for, on two nodes at random, against a model: names, attributes, data, open files, errnos; and
fsx, many more operations on the bytes of one file. `tools/fsx` runs it at length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from csvfs.units import GIB
from tests.lab_cluster import needs_lab, running_lab, wait_for
from tests.programs import fsx
from tests.programs.hands import Hand, hands_on
from tests.programs.stories import KINDS, STEP_BYTES, Story, steps_of
from tests.test_first_cluster import is_mounted

pytestmark = [pytest.mark.lab, needs_lab]

STEPS = 200
folders = itertools.count()
# Bytes, five a step: drawn at once, and made smaller by becoming zeros, which are steps that do nothing.
stories = st.binary(min_size=STEPS * STEP_BYTES, max_size=STEPS * STEP_BYTES)


@pytest.fixture(scope="module")
def hands() -> Iterator[list[Hand]]:
    with running_lab(nodes=2, drives=1, drive_size=4 * GIB) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "2")
        for node in ("n1", "n2"):
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=60)
        with hands_on(cluster.directory, ("n1", "n2")) as both:
            yield both


def play(hands: list[Hand], story_bytes: bytes) -> None:
    story = Story(hands, b"/clusterstorage/Volume1/%d" % next(folders))
    try:
        for step in steps_of(story_bytes):
            story.play(step, KINDS)
        story.end()
    except AssertionError:
        note("\n".join(story.told))
        raise
    finally:
        story.close()


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(stories)
def test_two_nodes_are_one_posix_file_system_whatever_they_do(hands: list[Hand], story_bytes: bytes) -> None:
    play(hands, story_bytes)


@pytest.mark.parametrize("mode", sorted(fsx.KINDS))
def test_fsx_finds_every_byte_of_a_file_that_two_nodes_change_in_turns(hands: list[Hand], mode: str) -> None:
    fsx.run(hands, b"/clusterstorage/Volume1", mode, seed=5, operations=500)
