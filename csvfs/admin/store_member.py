"""The etcd member among the processes of a node, as `csvfs node run` keeps it.

Place      admin floor, below node_run.py.
Life       It starts before the node asks the store for a lease, outlives the loss of one, and is stopped last.
Tasks      the member itself, started again when it dies; and every LOOK_S a look at who the members are: the
           node's `endpoints` file is brought up to date, and the own member, when it was added lately, is made
           one that votes. And a watch of the certificates that are revoked: the member's list of them is kept.
"""

import contextlib
import logging
import os
from collections.abc import AsyncIterator

import trio

from csvfs.admin.child import Child, ChildPlan
from csvfs.admin.etcd_member import member_argv, write_revoked
from csvfs.admin.etcd_members import StoreMember, list_members, promote
from csvfs.config import NodeConfig
from csvfs.errors import CsvfsError
from csvfs.ids import Incarnation
from csvfs.store.etcd import EtcdStore
from csvfs.store.etcd_client import EtcdClient
from csvfs.store.etcd_messages import Refused
from csvfs.store.etcd_place import EtcdPlace
from csvfs.store.opening import etcd_place, is_etcd
from csvfs.store.revoked import REVOKED, revoked_serials

logger = logging.getLogger(__name__)
ROLE_STORE = "store"
LOOK_S = 10.0
LEARNER_LOOK_S = 1.0  # as long as the own member does not vote, or nobody answers, it makes nothing safer
STOP_GRACE_S = 5.0
FROZEN_S = 15.0  # the other members outvote one that is stopped; it is replaced before a second one may be missing


@contextlib.asynccontextmanager
async def store_member(config: NodeConfig, role_environment: str) -> AsyncIterator[None]:
    """Run this node's etcd member inside the `async with`, if its store is etcd and it has one.

    Raises   NotSupported: etcd is not installed. BadRequest: the store's URL.
    """
    if not is_etcd(config.store):
        yield
        return
    place = etcd_place(config.store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_look_forever, config, place)
        member = None
        if place.member_path.exists():
            member = Child(_plan(config, place, role_environment))
            nursery.start_soon(member.keep_running)
            if place.revoked_path.exists():  # labs have none: nobody is evicted there
                nursery.start_soon(_keep_revoked_forever, place)
        yield
        if member is not None:
            await member.stop(STOP_GRACE_S)
        nursery.cancel_scope.cancel()


def _plan(config: NodeConfig, place: EtcdPlace, role_environment: str) -> ChildPlan:
    async def no_incarnation() -> Incarnation:
        return Incarnation(0)  # it knows nothing of csvfs

    environment = os.environ | {role_environment: ROLE_STORE}
    return ChildPlan(
        ROLE_STORE,
        list(member_argv(place)),
        lambda incarnation: environment,
        no_incarnation,
        config.log_dir / f"{ROLE_STORE}.log",
        config.options.restart_backoff_max_ms / 1000,
        frozen_s=FROZEN_S,
    )


async def _look_forever(config: NodeConfig, place: EtcdPlace) -> None:
    while True:
        is_settled = False
        try:
            client = EtcdClient(place)
            try:
                is_settled = not await _look(client, config, place)
            finally:
                client.close()
        except (CsvfsError, OSError) as error:
            logger.debug("members of the cluster store: %s", error)  # the heartbeat says so loudly
        await trio.sleep(LOOK_S if is_settled else LEARNER_LOOK_S)


async def _keep_revoked_forever(place: EtcdPlace) -> None:
    while True:
        try:
            store = EtcdStore(place)
            try:
                async with store.watch(REVOKED) as changes:
                    write_revoked(place, await revoked_serials(store))
                    async for _ in changes:
                        write_revoked(place, await revoked_serials(store))
            finally:
                with trio.CancelScope(shield=True):
                    await store.close()
        except (CsvfsError, OSError) as error:
            logger.debug("revoked certificates: %s", error)
        await trio.sleep(LEARNER_LOOK_S)


async def _look(client: EtcdClient, config: NodeConfig, place: EtcdPlace) -> bool:
    """Returns whether this node's member does not vote yet."""
    members = await list_members(client)
    own = next((member for member in members if member.name == config.node), None)
    found = [endpoint for member in _own_first(members, own) for endpoint in member.endpoints]
    if found:
        place.write_endpoints(found)
    if own is None:
        return place.member_path.exists()  # it was added and is being started
    if not own.is_learner:
        return False
    try:
        await promote(client, own)
        logger.info("this node's member of the cluster store has caught up and votes from now on")
        return False
    except Refused:
        return True  # it has not caught up yet


def _own_first(members: list[StoreMember], own: StoreMember | None) -> list[StoreMember]:
    voting = [member for member in members if member is not own and not member.is_learner]
    return [*([own] if own is not None else []), *voting]
