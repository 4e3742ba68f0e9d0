"""The front desk of a coordinator host: whose link is whose, and what is answered to callers without a session.

Place      coordinator floor, between host.py (which volumes are here) and service.py (one volume).
Links      A link is a stranger's until its `hello`; from then on it is its session's, and its frames go straight to
           that session's service. Strangers may ask about volumes by name: those are `csvfs` commands.
"""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from coordinator.service import Service
from coordinator.sessions import Session
from csvfs.errors import BadRequest, CsvfsError, LeaseLost, ProtocolError
from csvfs.ids import DriveId, NodeName
from csvfs.net.calls import field, optional_field
from csvfs.net.link import Link
from csvfs.wire.control import unpack_call
from csvfs.wire.frames import Frame, Kind

log = logging.getLogger(__name__)

# So long a `hello` waits for a volume that is being taken over; less than a mount waits for the answer (session.py,
# HELLO_TIMEOUT_S). To have each mount come again and again would cost a handshake a time, just when all cores are busy.
TAKING_S_MAX = 3.0

Question = Callable[[], Awaitable[Any]]


class FrontDesk:
    """`find`: the service of a volume by name; raises NotCoordinator, Unavailable. `wait_taken`: until it is no longer being
    taken over, or at once when it is not. `nursery`: for slow answers."""

    def __init__(
        self,
        node: NodeName,
        find: Callable[[str], Service],
        wait_taken: Callable[[str], Awaitable[None]],
        may_serve: Callable[[], bool],
        nursery: trio.Nursery,
    ) -> None:
        self._node = node
        self._find = find
        self._wait_taken = wait_taken
        self._may_serve = may_serve
        self._nursery = nursery
        self._service_of: dict[Link, Service] = {}  # links of sessions

    def accept(self, link: Link) -> None:
        link.on_frame = self._on_frame
        link.on_close = self._on_close

    def _on_close(self, link: Link, error: CsvfsError) -> None:
        self._service_of.pop(link, None)
        if isinstance(link.owner, Session):
            link.owner.detach(link)

    def _on_frame(self, link: Link, frame: Frame) -> None:
        if isinstance(link.owner, Session):
            service = self._service_of.get(link)
            if service is None:
                raise ProtocolError(f"{link.peer} has a session of no volume")
            service.on_frame(link, link.owner, frame)
            return
        if frame.kind != Kind.CALL:
            link.reply_error(frame.request_id, BadRequest(f"frames of kind {frame.kind} are not served here"))
            return
        name, args = unpack_call(frame.head)
        if name == "host_status":
            link.reply(frame.request_id, {"node": self._node, "refused": link.engine.refusals.counts})
            return
        try:
            volume = field(args, "volume", str)
            if name == "hello":
                self._nursery.start_soon(self._greet, link, frame.request_id, volume, args)
                return
            service = self._service(volume)
            question = _question(service, name, args)
        except CsvfsError as error:
            link.reply_error(frame.request_id, error)
            return
        self._nursery.start_soon(_answer, service, link, frame.request_id, question)

    def _service(self, volume: str) -> Service:
        service = self._find(volume)
        if not self._may_serve():
            raise LeaseLost(f"node {self._node} lost its lease in the cluster store and serves nothing")
        return service

    async def _greet(self, link: Link, request_id: int, volume: str, args: dict[str, Any]) -> None:
        with trio.move_on_after(TAKING_S_MAX):
            await self._wait_taken(volume)
        if link.closed is not None:
            return
        try:
            service = self._service(volume)
        except CsvfsError as error:
            link.reply_error(request_id, error)
            return
        await _answer(service, link, request_id, partial(self._hello, service, link, args))

    async def _hello(self, service: Service, link: Link, args: dict[str, Any]) -> Any:
        reply = await service.hello(link, args)
        self._service_of[link] = service
        return reply


def _question(service: Service, name: str, args: dict[str, Any]) -> Question:
    """What answers a call that needs no session. Raises BadRequest."""
    if name == "statfs":
        return partial(_statfs, service)
    if name == "volume_status":
        return partial(_now, service.volume_status)
    if name == "waits":
        return partial(_now, service.waits)
    if name == "job_control":
        action, kind = field(args, "action", str), optional_field(args, "kind", str)
        return partial(service.healing.record.control, action, kind, optional_field(args, "speed", str))
    if name == "volume_set":
        return partial(service.control.change, args)
    if name == "quota_set":
        return partial(service.quotas.set, args)
    if name == "quota_remove":
        return partial(service.quotas.remove, args)
    if name == "quota_list":
        return partial(_now, service.quotas.listing)
    if name == "repair":
        return service.repair_now
    if name == "drive_members":
        return partial(service.healing.drive_members, DriveId(field(args, "drive", bytes)))
    if name == "misplaced":
        return partial(service.healing.misplaced, args)
    if name == "without_node":
        return partial(service.healing.without_node, NodeName(field(args, "node", str)))
    if name == "check":
        start, repair = bool(optional_field(args, "start", bool)), bool(optional_field(args, "repair", bool))
        return partial(_now, partial(service.check_desk.ask, start, repair))
    if name == "scrub":
        return partial(_now, service.scrub.start)
    if name == "file_map":
        return partial(_now, partial(service.file_map, args))
    if name == "file_integrity":
        return partial(service.integrity.look, args)
    if name == "file_verify":
        return partial(service.integrity.verify, args)
    if name == "lost":
        return service.lost.listing
    if name == "accept_data_loss":
        return service.lost.accept_data_loss
    raise BadRequest(f"call {name!r} needs a hello first")


async def _statfs(service: Service) -> dict[str, Any]:
    await service.slabs.wait_spaces()
    return service.statfs()


async def _now(answer: Callable[[], Any]) -> Any:
    return answer()


async def _answer(service: Service, link: Link, request_id: int, question: Question) -> None:
    try:
        link.reply(request_id, await question())
    except CsvfsError as error:
        link.reply_error(request_id, error)
    except Exception:
        if not service.is_running:  # its database has been closed meanwhile
            link.reply_error(request_id, service.gone())
            return
        log.exception("a question of %s failed in a way nobody planned for", link.peer)
        link.reply_error(request_id, CsvfsError("the question failed; the log of the coordinator says how"))
