"""Claims drives: by itself under `csvfs node run` while the pool's auto-claim is on, or once by `csvfs drive claim`.

Place      admin floor, over drive_claim.py (what may be claimed) and drive_ops.py (making it a drive).
Tasks      claim_forever, one per node and lease; it claims one drive at a time.
Order      seen twice (C4); `claims/<identity>` taken, so that of two nodes that see one disk one gets it; looked at
           again under the lock that formatting takes; formatted; made known; the key given back.
Limits     PATHS_MAX paths (drive_claim.py). What was refused is not read again for RECHECK_S.
"""

import contextlib
import hashlib
import logging
from collections.abc import Callable

import trio

from csvfs.admin.cluster_view import Record, read_cluster_view
from csvfs.admin.drive_claim import ClaimCandidate, Sighting, Sightings, claim_rules, list_candidates
from csvfs.admin.drive_ops import DriveCandidate, make_drive
from csvfs.cluster.membership import View
from csvfs.config import NodeConfig
from csvfs.errors import CsvfsError, DriveRefused
from csvfs.store.interface import ClusterStore, Compare, Delete, Put
from csvfs.wire.control import pack_value

logger = logging.getLogger(__name__)

SCAN_INTERVAL_S = 5.0
RECHECK_S = 300.0  # a disk's content changes without a sign of it in /sys
CLAIMS = "claims/"
BY_ITSELF = "auto-claim"
CLAIM_LEASE_MS = 60_000  # of a claim by hand: formatting takes seconds


async def candidates_here(
    config: NodeConfig, store: ClusterStore, known: dict[Sighting, str] | None = None
) -> list[ClaimCandidate]:
    """Raises NotFound: no pool. Corrupt, Unavailable: the store. Cancel safe, though a disk that hangs keeps its
    thread."""
    rules = claim_rules(config, await read_cluster_view(store))
    return await trio.to_thread.run_sync(list_candidates, rules, known, abandon_on_cancel=True)


async def claim_once(
    config: NodeConfig, store: ClusterStore, announce: Callable[[Record], None], by: str = BY_ITSELF
) -> list[ClaimCandidate]:
    """Look, wait, look again, claim what was eligible both times; returns what was seen at the second look.

    Raises  as candidates_here; CsvfsError of the first drive that could not be claimed.
    """
    settle_s = config.options.drive_claim_after_s
    sightings = Sightings(settle_s)
    candidates = await candidates_here(config, store)
    sightings.ripe(candidates, trio.current_time())
    if not any(candidate.eligible for candidate in candidates):
        return candidates
    await trio.sleep(settle_s)
    candidates = await candidates_here(config, store)
    lease = await store.grant_lease(CLAIM_LEASE_MS)
    try:
        for candidate in sightings.ripe(candidates, trio.current_time()):
            announce(await claim_drive(config, store, candidate, lease, by))
    finally:
        with trio.CancelScope(shield=True), contextlib.suppress(CsvfsError):  # it ends by itself
            await store.revoke_lease(lease)
    return candidates


async def claim_forever(config: NodeConfig, store: ClusterStore, view: View, lease: int) -> None:
    """Claim what becomes eligible, for as long as the pool's auto-claim is on. Raises nothing that a disk or the
    store could cause. Cancel safe: a drive that is being formatted is finished and made known."""
    if not config.claim:
        return  # C1: nothing can be claimed here
    sightings = Sightings(config.options.drive_claim_after_s)
    known: dict[Sighting, str] = {}
    forget_at = trio.current_time() + RECHECK_S
    said: dict[str, str] = {}
    while True:
        await trio.sleep(min(SCAN_INTERVAL_S, max(1, config.options.drive_claim_after_s)))
        if not (view.pool or {}).get("auto_claim"):
            sightings.ripe([], trio.current_time())
            continue
        if trio.current_time() >= forget_at:
            known.clear()
            forget_at = trio.current_time() + RECHECK_S
        try:
            candidates = await candidates_here(config, store, known)
            _say_refusals(candidates, said)
            for candidate in sightings.ripe(candidates, trio.current_time()):
                await _claim_or_log(config, store, candidate, lease)
        except (CsvfsError, OSError) as error:
            logger.warning("no drives are claimed at the moment: %s", error)


async def _claim_or_log(config: NodeConfig, store: ClusterStore, candidate: ClaimCandidate, lease: int) -> None:
    """One that cannot be claimed does not keep the next from it; it is seen anew, and not blank any more if it was
    written to."""
    try:
        drive = await claim_drive(config, store, candidate, lease, BY_ITSELF)
        logger.warning(
            "drive %s claimed: %s (%s, named by %s)",
            drive.name[:8], candidate.path, candidate.kind or "kind not known", candidate.named_by,
        )  # fmt: skip
    except (CsvfsError, OSError) as error:
        logger.error("%s cannot be claimed: %s", candidate.path, error)


def _say_refusals(candidates: list[ClaimCandidate], said: dict[str, str]) -> None:
    """Each named path and reason once, until the reason is another one."""
    refused = {c.path: c.reason for c in candidates if c.named_by and c.reason}
    for path, reason in refused.items():
        if said.get(path) != reason and not reason.startswith("in the pool"):
            logger.info("%s is not claimed: %s", path, reason)
    said.clear()
    said.update(refused)


async def claim_drive(
    config: NodeConfig, store: ClusterStore, candidate: ClaimCandidate, lease: int, by: str
) -> Record:
    """Make a ripe candidate a drive of the pool.

    Raises  DriveRefused: it is not blank any more, or another node is claiming the same disk. CsvfsError.
    """
    key = ""
    if candidate.identity:
        key = CLAIMS + hashlib.blake2b(candidate.identity.encode(), digest_size=16).hexdigest()
        value = {"node": config.node, "path": candidate.path, "identity": candidate.identity}
        taken = await store.transact([Compare(key, 0)], [Put(key, pack_value(value), lease)])
        if not taken.succeeded:
            raise DriveRefused(f"{candidate.path}: another node is claiming the same disk")
    try:
        drives = (await read_cluster_view(store)).drives.values()
        if candidate.identity and any(d.text("identity") == candidate.identity for d in drives):
            raise DriveRefused(f"{candidate.path}: the same disk is a drive of the pool by now")
        found = DriveCandidate(
            candidate.path, candidate.size, candidate.backing, candidate.kind, identity=candidate.identity, by=by
        )
        with trio.CancelScope(shield=True):  # what was formatted is made known, or nobody would know it
            drive = await make_drive(store, config.node, found, must_be_empty=True)
        assert drive is not None, "nothing ends a shielded scope early"
        return drive
    finally:
        if key:
            with trio.CancelScope(shield=True), contextlib.suppress(CsvfsError):  # else it ends with the lease
                await store.transact([], [Delete(key)])
