"""Pausing, resuming and pacing storage jobs: calls to the volumes' coordinators, who record it in the store.

Place      admin floor.
"""

from typing import Any

import trio

from csvfs.admin.cluster_view import VOLUME_ONLINE, read_cluster_view
from csvfs.admin.peers import Peers, answer_or_error
from csvfs.errors import CsvfsError
from csvfs.store.interface import ClusterStore


async def control_jobs(
    store: ClusterStore, peers: Peers, volume: str | None, action: str, **args: Any
) -> dict[str, Any]:
    """Tell one volume's coordinator, or those of all volumes (None), what to do with their jobs; by volume.

    Raises  NotFound: no such volume. CsvfsError: some could not be told, or refused; which, and why.
    """
    view = await read_cluster_view(store)
    if volume is not None:
        view.volume(volume)
        names = [volume]
    else:
        names = [name for name, record in view.volumes.items() if record.text("state") == VOLUME_ONLINE]
    answers: dict[str, Any] = {}
    errors: dict[str, str] = {}
    async with trio.open_nursery() as nursery:
        for name in names:
            call = peers.coordinator(view, name, "job_control", action=action, **args)
            nursery.start_soon(answer_or_error, call, name, answers, errors)
    if errors:
        failed = "; ".join(f"{name}: {error}" for name, error in sorted(errors.items()))
        if answers:
            failed += f" (done for {', '.join(sorted(answers))})"
        raise CsvfsError(failed)
    return answers
