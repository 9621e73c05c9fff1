"""The socket, and the end: what runs when a signal comes is finished within seconds, or cut."""

import errno
import socket

import uvicorn
from starlette.types import ASGIApp

from chargpt.errors import ConfigError

FINISHING = 4  # seconds that open requests get after a signal


def listen(app: ASGIApp, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM. Prints the address. Raises ConfigError when it cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(found[0], found[1])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(found[4])
    except OSError as error:
        taken = "; another program has that port, choose one with --port" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(f"cannot listen at {host} port {port}: {error.strerror}{taken}") from None
    shown = f"[{host}]" if ":" in host else host
    print(f"serving at http://{shown}:{listener.getsockname()[1]}, until Ctrl-C", flush=True)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=FINISHING, server_header=False
    )
    uvicorn.Server(config).run(sockets=[listener])
