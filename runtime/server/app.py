# SPDX-License-Identifier: Apache-2.0
"""The server's endpoints."""

import logging
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from starkv import __version__
from starkv.manifest import Manifest
from starkv.runtime.engines.base import EngineInfo
from starkv.runtime.server.bridge import SchedulerLike
from starkv.runtime.server.chat import Chat
from starkv.runtime.server.errors import ApiError, answer
from starkv.runtime.server.guard import CHAT, Guard
from starkv.runtime.server.in_flight import InFlight
from starkv.runtime.server.logs import note
from starkv.runtime.server.metrics import Metrics
from starkv.runtime.server.options import ServerOptions

CLOSE_SECONDS = 30.0
"""How long requests may go on after the server was asked to end."""


def create_app(
    scheduler: SchedulerLike, manifest: Manifest, info: EngineInfo, options: ServerOptions
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        scheduler: generates.
        manifest: of its engine.
        info: of its engine.
        options: limits and defaults.
    """
    in_flight = InFlight(options)
    metrics = Metrics(scheduler, in_flight)

    app = FastAPI(title="starkv", version=__version__, openapi_url=None)
    chat = Chat(scheduler, manifest, options, metrics)

    @app.exception_handler(ApiError)
    async def api_failed(_: Request, error: ApiError) -> JSONResponse:
        note("refused", status=error.status, code=error.code, parameter=error.parameter)
        return answer(error)

    @app.exception_handler(HTTPException)
    async def http_failed(request: Request, error: HTTPException) -> JSONResponse:
        return answer(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        logging.getLogger("starkv.server").error("internal error", exc_info=error)
        return answer(ApiError(500, f"internal error: {type(error).__name__}; see the server's log"))

    app.add_middleware(Guard, key=options.api_key, metrics=metrics, in_flight=in_flight)
    for path in CHAT:
        app.add_api_route(path, chat.__call__, methods=["POST"], response_model=None)
    _add_facts(app, scheduler, manifest, info, options)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


def _add_facts(
    app: FastAPI, scheduler: SchedulerLike, manifest: Manifest, info: EngineInfo, options: ServerOptions
) -> None:
    """Endpoints that tell what the server is and does."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    model = {"id": options.model, "object": "model", "owned_by": "starkv"}

    @app.get("/v1/models")
    @app.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != options.model:
            raise ApiError(404, f"the only model here is {options.model!r}", "model", "model_not_found")
        return model

    @app.get("/slots")
    async def slots() -> dict[str, Any]:
        return asdict(scheduler.status())

    @app.get("/props")
    async def props() -> dict[str, Any]:
        policy = options.policy
        return {
            "starkv": __version__,
            "model": options.model,
            "engine": {"name": manifest.name, "quantization": manifest.quantization, **asdict(info)},
            "max_context": manifest.max_context,
            "coordinates": manifest.coordinates,
            "prompt": manifest.prompt,
            "pixels": {"min": manifest.image.min_pixels, "max": manifest.image.max_pixels},
            "kv": {
                "method": policy.method,
                "budget": policy.budget.ratio,
                "capacity": policy.budget.capacity,
            },
            "limits": {
                "body_bytes": options.most_body_bytes,
                "images": options.most_images,
                "image_pixels": options.most_image_pixels,
                "total_body_bytes": options.most_total_body_bytes,
                "total_pixels": options.most_total_pixels,
                "requests": options.most_requests,
                "connections": options.most_connections,
                "new_tokens": options.most_new_tokens,
                "timeout_seconds": options.timeout_seconds,
            },
        }
