# SPDX-License-Identifier: Apache-2.0
"""A server on a port."""

import asyncio
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from starkv.errors import UsageError
from starkv.manifest import Manifest
from starkv.runtime.engines.base import EngineInfo
from starkv.runtime.server.app import CLOSE_SECONDS, create_app
from starkv.runtime.server.bridge import SchedulerLike
from starkv.runtime.server.connections import limited_protocol
from starkv.runtime.server.logs import set_up
from starkv.runtime.server.options import ServerOptions


class DrainingServer(uvicorn.Server):
    """Lets running requests end: those that take longer than ``CLOSE_SECONDS`` are told so, before their
    connections are closed."""

    def __init__(
        self,
        app: FastAPI,
        scheduler: SchedulerLike,
        most_connections: int,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=limited_protocol(most_connections),
                log_config=None,
                access_log=False,
                lifespan="on",
                # The scheduler ends what is left; uvicorn's own end is for what hangs even then.
                timeout_graceful_shutdown=int(close_seconds) + 5,
            )
        )
        self._scheduler, self._close_seconds = scheduler, close_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, answer what runs, end."""
        closing = asyncio.create_task(asyncio.to_thread(self._scheduler.close, self._close_seconds))
        await super().shutdown(sockets)
        await closing


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
    shown = f"[{host}]" if ":" in host else host
    listening(f"http://{shown}:{sock.getsockname()[1]}")
    DrainingServer(app, scheduler, options.most_connections).run(sockets=[sock])


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
