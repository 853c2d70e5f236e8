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
    parts, size = [], 0

    async def read() -> None:
        nonlocal size
        async for part in request.stream():
            size += len(part)
            if size > most_bytes:
                raise too_large
            parts.append(part)

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body took longer than {BODY_SECONDS:g} seconds", code="slow_body") from None
    return b"".join(parts)
