# SPDX-License-Identifier: Apache-2.0
"""``POST /v1/chat/completions``."""

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from starkv.errors import StarkvError
from starkv.manifest import Manifest
from starkv.runtime.server.answers import DONE, Answer, event
from starkv.runtime.server.body import read_body
from starkv.runtime.server.bridge import Bridge, SchedulerLike
from starkv.runtime.server.errors import ApiError, api_error, interrupted
from starkv.runtime.server.guard import SHARE
from starkv.runtime.server.logs import note
from starkv.runtime.server.metrics import Metrics
from starkv.runtime.server.options import ServerOptions
from starkv.runtime.server.translate import parse, translate
from starkv.runtime.server.wire import ChatRequest
from starkv.runtime.serving.requests import Failed, Finished, GenerationRequest, TextPiece

DECODERS = 4
"""Requests whose images are decoded at once: each takes as much memory as its pixels."""
GLANCE_SECONDS = 0.5
"""How often a client that waits for a whole reply is looked at, whether it is still there."""


class Chat:
    """Answers chat requests.

    Args:
        scheduler: generates.
        manifest: of its engine.
        options: limits and defaults.
        metrics: counts.
    """

    def __init__(
        self, scheduler: SchedulerLike, manifest: Manifest, options: ServerOptions, metrics: Metrics
    ) -> None:
        self._scheduler, self._manifest = scheduler, manifest
        self._options, self._metrics = options, metrics
        self._decoding = asyncio.Semaphore(DECODERS)

    async def __call__(self, request: Request) -> Response:
        """Answer a request.

        Raises:
            ApiError: it can't be answered.
        """
        arrived = time.monotonic()
        asked, generation = await self._read(request)
        bridge = Bridge(self._scheduler)
        try:
            await bridge.submit(generation)
        except StarkvError as error:
            raise api_error(error) from None
        answer = Answer(self._options.model, self._manifest)
        if asked.stream:
            chunks = self._stream(bridge, answer, asked, arrived)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)
        text, end = await self._whole(request, bridge, arrived)
        return JSONResponse(answer.whole(text, end))

    async def _read(self, request: Request) -> tuple[ChatRequest, GenerationRequest]:
        share = request.scope[SHARE]
        body = await read_body(request, self._options.most_body_bytes, share)
        async with self._decoding:
            asked = await asyncio.to_thread(parse, body, self._options)
            del body
            most = self._options.most_image_pixels
            prepare = partial(self._scheduler.prepare, most_pixels=most, on_pixels=share.take_pixels)
            generation = await asyncio.to_thread(translate, asked, self._options, prepare)
        # Its images in base64 are not needed any more, and a reply may take minutes.
        return asked.model_copy(update={"messages": []}), generation

    async def _whole(self, request: Request, bridge: Bridge, arrived: float) -> tuple[str, Finished]:
        pieces: list[str] = []
        glanced = arrived
        try:
            async for came in bridge.events(GLANCE_SECONDS):
                if time.monotonic() - glanced > GLANCE_SECONDS:
                    glanced = time.monotonic()
                    if await request.is_disconnected():
                        raise ApiError(499, "the client is gone", code="client_closed_request")
                if isinstance(came, TextPiece):
                    self._first(pieces, arrived)
                    pieces.append(came.text)
                elif isinstance(came, Failed):
                    raise api_error(came.error)
                elif isinstance(came, Finished):
                    self._over(came, arrived)
                    if error := interrupted(came.reason, self._options.timeout_seconds):
                        raise error
                    return "".join(pieces), came
        finally:
            bridge.leave()
        raise AssertionError("events end with how the reply ended")

    async def _stream(
        self, bridge: Bridge, answer: Answer, asked: ChatRequest, arrived: float
    ) -> AsyncIterator[bytes]:
        pieces: list[str] = []
        try:
            yield event(answer.first_chunk())
            async for came in bridge.events(self._options.keep_alive_seconds):
                if came is None:
                    # Proxies close what is silent.
                    yield b": waiting\n\n"
                elif isinstance(came, TextPiece):
                    self._first(pieces, arrived)
                    pieces.append(came.text)
                    yield event(answer.chunk(came.text))
                elif isinstance(came, Failed):
                    # The status is long sent: OpenAI's clients raise on an event with an error.
                    yield event(api_error(came.error).body)
                else:
                    self._over(came, arrived)
                    if error := interrupted(came.reason, self._options.timeout_seconds):
                        yield event(error.body)
                        break
                    yield event(answer.last_chunk("".join(pieces), came))
                    if asked.stream_options and asked.stream_options.include_usage:
                        yield event(answer.usage_chunk(came))
            yield DONE
        finally:
            # Also where the client is gone and the stream was closed in the middle.
            bridge.leave()

    def _first(self, pieces: list[str], arrived: float) -> None:
        if not pieces:
            self._metrics.first_token.observe(time.monotonic() - arrived)

    def _over(self, end: Finished, arrived: float) -> None:
        seconds = time.monotonic() - arrived
        self._metrics.whole_reply.observe(seconds)
        self._metrics.count(end)
        timings = end.timings
        note(
            "reply",
            reason=end.reason,
            seconds=round(seconds, 3),
            prompt_tokens=timings.prompt_tokens,
            reused_tokens=end.reused_tokens,
            generated_tokens=timings.generated_tokens,
            images=len(end.seen),
            kv_tokens_kept=round(timings.kv_tokens_kept, 1),
        )
