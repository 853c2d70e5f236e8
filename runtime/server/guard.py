# SPDX-License-Identifier: Apache-2.0
"""Looks at every request before it is answered: its key; and counts how chats ended.

Plain ASGI: the middleware of Starlette's decorators stands between a handler and the socket, and then nobody
notices that a client has left.
"""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from starkv.runtime.server.errors import ApiError, answer
from starkv.runtime.server.metrics import Metrics

CHAT = "/v1/chat/completions"
_OPEN = ("/health",)
"""Paths that need no key."""


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        key: asked for; None lets anybody in.
        metrics: counts chat requests by status.
    """

    def __init__(self, app: ASGIApp, key: str | None, metrics: Metrics) -> None:
        self._app, self._key, self._metrics = app, key, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and path == CHAT:
                self._metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        if self._key is None or path in _OPEN or _knows(Headers(scope=scope), self._key):
            await self._app(scope, receive, counted)
            return
        error = ApiError(401, "the API key is missing or wrong; send it as Authorization: Bearer …")
        await answer(error)(scope, receive, counted)


def _knows(headers: Headers, key: str) -> bool:
    """Whether a request brings the key; takes as long for a nearly right one as for any other."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())
