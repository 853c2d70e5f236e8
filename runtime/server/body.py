# SPDX-License-Identifier: Apache-2.0
"""Reading a body no further than it may go."""

import asyncio

from fastapi import Request

from starkv.runtime.server.errors import ApiError
from starkv.runtime.server.in_flight import Share

BODY_SECONDS = 60.0
"""How long a client may take to send a body."""


async def read_body(request: Request, most_bytes: int, share: Share) -> bytes:
    """The body of a request, counted as it comes.

    Raises:
        ApiError: it is larger than allowed, by its header or by what comes, comes too slowly, or does not
            fit beside the bodies of other requests.
    """
    too_large = ApiError(
        413,
        f"the body is larger than {most_bytes} bytes; send fewer or smaller images",
        code="body_too_large",
    )
    said = request.headers.get("content-length", "0")
    if not said.isdigit() or int(said) > most_bytes:
        raise too_large
    share.expect_body(int(said))
    parts: list[bytes] = []
    reading = asyncio.create_task(_read(request, parts, most_bytes, share))
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


async def _read(request: Request, parts: list[bytes], most_bytes: int, share: Share) -> bool:
    """Collect the body's parts; False once they are more than allowed."""
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most_bytes:
            return False
        share.take_body(len(part))
        parts.append(part)
    return True
