"""The socket, and the end: what runs when a signal comes is finished within seconds, or cut."""

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from chargpt.errors import ConfigError

FINISHING = 3.0  # seconds that open requests get after a signal
BACKLOG = 2048  # connections that wait to be taken
IDLE = 10.0  # seconds in which a connection that answers nothing has to bring a whole request's head


class Connection(H11Protocol):
    """Does not wait for ever for a client that connects and then says nothing, or half a request's head."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(IDLE, self._close_if_idle, None)

    def _close_if_idle(self, former: RequestResponseCycle | None) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is former and (former is None or former.response_complete):
            self.transport.close()
        else:
            self.loop.call_later(IDLE, self._close_if_idle, self.cycle)

    def cut(self) -> None:
        """Close it if the request is not whole yet: whoever reads that would wait on."""
        if self.cycle is not None and self.cycle.more_body:
            self.transport.close()


class _Server(uvicorn.Server):
    """Cuts what has not ended FINISHING seconds after the first signal, or at the second one."""

    def __init__(self, config: uvicorn.Config, cut: Callable[[], None]) -> None:
        super().__init__(config)
        self._cut, self._hurry = cut, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self._hurry = True  # uvicorn would leave its open requests with tracebacks
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        cutting = asyncio.create_task(self._cut_in_time())
        await super().shutdown(sockets)
        cutting.cancel()

    async def _cut_in_time(self) -> None:
        end = time.monotonic() + FINISHING
        while time.monotonic() < end and not self._hurry:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self._cut)
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.cut()


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which nobody is answered at yet. Raises ConfigError when it cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With its protocol, since asyncio turns Nagle's delay off only then: small writes would wait 40 ms for an ACK.
        listener = socket.socket(*found[:3])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(found[4])
        listener.listen(BACKLOG)  # now: of two servers that come at the same time both can bind
    except OSError as error:
        taken = "; another program has that port, choose one with --port" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(f"cannot listen at {host} port {port}: {error.strerror}{taken}") from None
    return listener


def configured(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Connection,
        log_level="error",
        access_log=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=int(FINISHING) + 1,
        server_header=False,
    )


def listen(app: ASGIApp, listener: socket.socket, cut: Callable[[], None]) -> None:
    """Print the address and serve until SIGINT or SIGTERM. cut: ends all streams"""
    host, port, *_ = listener.getsockname()
    print(f"serving at http://{f'[{host}]' if ':' in host else host}:{port}, until Ctrl-C", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn gives the signal on when it has ended: nothing went wrong
        _Server(configured(app), cut).run(sockets=[listener])
