# SPDX-License-Identifier: Apache-2.0
"""Connections: how many there may be, and how long one may stay silent."""

import asyncio

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from starkv.runtime.server.errors import RETRY_SECONDS, ApiError, answer
from starkv.runtime.server.logs import note

HEAD_SECONDS = 30.0
"""How long a client may take to say what it wants."""
HARD_LIMIT = 2
"""Times the limit from which on connections are closed without an answer."""


def limited_protocol(most: int) -> type[H11Protocol]:
    """uvicorn's protocol for at most ``most`` connections.

    A request on one more is answered with 503 and the connection closed; twice as many are hung up on at
    once. Whoever connects and does not send a request's head in time is hung up on, too, or else silent
    clients could keep all others out.
    """

    class Limited(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            count = len(self.connections)
            if count > HARD_LIMIT * most:
                transport.abort()
                return
            if count > most:
                note("too many connections", connections=count)
                self.app = _refuse
            self._silence = self.loop.call_later(HEAD_SECONDS, self._hang_up)

        def connection_lost(self, exc: Exception | None) -> None:
            if hasattr(self, "_silence"):
                self._silence.cancel()
            super().connection_lost(exc)

        def _hang_up(self) -> None:
            # Later requests of a connection are watched by uvicorn's own keep-alive.
            # uvicorn's types don't say that there is none before the first request's head.
            asked: object = self.cycle
            if asked is None:
                self.transport.abort()

    async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
        error = ApiError(
            503,
            f"{most} connections are open, the most there may be; try again later",
            code="busy",
            headers={"Retry-After": str(RETRY_SECONDS), "Connection": "close"},
        )
        await answer(error)(scope, receive, send)

    return Limited
