# SPDX-License-Identifier: Apache-2.0
"""Looks at every request before it is answered: its key, and whether there is room for it; counts how chats
ended; and hangs up on who doesn't read.

Plain ASGI: the middleware of Starlette's decorators stands between a handler and the socket, and then nobody
notices that a client has left.
"""

import asyncio
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from starkv.runtime.server.errors import ApiError, answer
from starkv.runtime.server.in_flight import InFlight
from starkv.runtime.server.metrics import Metrics

CHAT = ("/v1/chat/completions", "/chat/completions")
_OPEN = ("/health",)
"""Paths that need no key."""
SHARE = "starkv.share"
"""Where a chat request's scope holds its ``Share``."""
READ_SECONDS = 60.0
"""How long a client may leave a piece of its answer unread."""


class ClientStuckError(ConnectionError):
    """Nobody reads an answer."""


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        key: asked for; None lets anybody in.
        metrics: counts chat requests by status.
        in_flight: counts what chat requests hold.
    """

    def __init__(self, app: ASGIApp, key: str | None, metrics: Metrics, in_flight: InFlight) -> None:
        self._app, self._key, self._metrics, self._in_flight = app, key, metrics, in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and path in CHAT:
                self._metrics.requests.labels(str(message["status"])).inc()
            sending = asyncio.ensure_future(send(message))
            try:
                await asyncio.wait({sending}, timeout=READ_SECONDS)
            finally:
                sending.cancel()
            if not sending.done() or sending.cancelled():
                raise ClientStuckError(f"a client left its answer unread for {READ_SECONDS:g} seconds")
            sending.result()

        if self._key is None or path in _OPEN or _knows(Headers(scope=scope), self._key):
            if path not in CHAT:
                await self._app(scope, receive, counted)
                return
            try:
                share = self._in_flight.enter()
            except ApiError as busy:
                await answer(busy)(scope, receive, counted)
                return
            # The application's call lasts as long as the answer, streams included.
            try:
                await self._app({**scope, SHARE: share}, receive, counted)
            finally:
                share.close()
            return
        error = ApiError(401, "the API key is missing or wrong; send it as Authorization: Bearer …")
        await answer(error)(scope, receive, counted)


def _knows(headers: Headers, key: str) -> bool:
    """Whether a request brings the key; takes as long for a nearly right one as for any other."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    # Headers are decoded as Latin-1, whatever they are.
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
