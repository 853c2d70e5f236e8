# SPDX-License-Identifier: Apache-2.0
"""Reading a body no further than it may go."""

import asyncio

from fastapi import Request

from starkv.runtime.server.errors import ApiError

BODY_SECONDS = 60.0
"""How long a client may take to send a body."""


async def read_body(request: Request, most_bytes: int) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is larger than allowed, by its header or by what comes, or comes too slowly.
    """
    too_large = ApiError(
        413,
        f"the body is larger than {most_bytes} bytes; send fewer or smaller images",
        code="body_too_large",
    )
    said = request.headers.get("content-length", "0")
    if not said.isdigit() or int(said) > most_bytes:
        raise too_large
    parts: list[bytes] = []
    reading = asyncio.create_task(_read(request, parts, most_bytes))
    try:
        # Not ``wait_for``: before Python 3.12 it may swallow the cancellation of who waits.
        await asyncio.wait({reading}, timeout=BODY_SECONDS)
        if not reading.done():
            raise ApiError(408, f"the body took longer than {BODY_SECONDS:g} seconds", code="slow_body")
        if not reading.result():
            raise too_large
    finally:
        reading.cancel()
    return b"".join(parts)


async def _read(request: Request, parts: list[bytes], most_bytes: int) -> bool:
    """Collect the body's parts; False once they are more than allowed."""
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most_bytes:
            return False
        parts.append(part)
    return True
