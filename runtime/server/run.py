# SPDX-License-Identifier: Apache-2.0
"""A server on a port."""

import socket
from collections.abc import Callable

import uvicorn

from starkv.errors import UsageError
from starkv.manifest import Manifest
from starkv.runtime.engines.base import EngineInfo
from starkv.runtime.server.app import CLOSE_SECONDS, create_app
from starkv.runtime.server.bridge import SchedulerLike
from starkv.runtime.server.logs import set_up
from starkv.runtime.server.options import ServerOptions


def run_server(
    scheduler: SchedulerLike,
    manifest: Manifest,
    info: EngineInfo,
    options: ServerOptions,
    host: str,
    port: int,
    listening: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM; requests that run then are answered first.

    Args:
        scheduler: generates; closed at the end.
        manifest: of its engine.
        info: of its engine.
        options: limits and defaults.
        host: to listen at.
        port: likewise; 0 picks a free one.
        listening: told the server's URL once it listens.

    Raises:
        UsageError: the address can't be listened at.
    """
    set_up(options.log_format)
    sock = _listen(host, port)
    app = create_app(scheduler, manifest, info, options)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=int(CLOSE_SECONDS), lifespan="on"
    )
    shown = f"[{host}]" if ":" in host else host
    listening(f"http://{shown}:{sock.getsockname()[1]}")
    uvicorn.Server(config).run(sockets=[sock])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(128)
    except OSError as error:
        raise UsageError(
            f"can't listen at {host}:{port}: {error.strerror or error}; choose another --host or --port"
        ) from None
    return sock
