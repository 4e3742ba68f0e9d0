"""A TCP proxy before an etcd member that loses answers, or requests, when told to."""

import random

import trio

from csvfs.store.etcd_http import Endpoint


class LossyProxy:
    """`lose_next`: of how many exchanges from now on the answer is to be lost. `chaos`: lose at random."""

    def __init__(self, target: Endpoint) -> None:
        self._target = target
        self._listener: trio.SocketListener | None = None
        self.endpoint = Endpoint("127.0.0.1", 0)
        self.lose_next = 0
        self.chaos: random.Random | None = None
        self.lost_count = 0

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.endpoint = Endpoint("127.0.0.1", listener.socket.getsockname()[1])
        task_status.started()
        await trio.serve_listeners(self._relay, [listener])

    async def _relay(self, client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream(self._target.host, self._target.port)
        async with client, server:
            while data := await _receive(client):
                if self.chaos is not None and self.chaos.random() < 0.1:
                    self.lost_count += 1
                    return  # the request itself is lost
                await server.send_all(data)
                answer = await _receive(server)
                if self._is_to_be_lost():
                    self.lost_count += 1
                    return
                if not answer:
                    return
                await client.send_all(answer)

    def _is_to_be_lost(self) -> bool:
        if self.lose_next > 0:
            self.lose_next -= 1
            return True
        return self.chaos is not None and self.chaos.random() < 0.1


async def _receive(stream: trio.SocketStream) -> bytes:
    try:
        return bytes(await stream.receive_some(65_536))
    except trio.BrokenResourceError:
        return b""
