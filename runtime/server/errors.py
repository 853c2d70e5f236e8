# SPDX-License-Identifier: Apache-2.0
"""Errors in the shape that OpenAI's clients turn into exceptions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse

from starkv.errors import EngineError, ImageError, StarkvError, UsageError
from starkv.runtime.serving.requests import BusyError

RETRY_SECONDS = 1
DONT_RETRY = {"x-should-retry": "false"}
"""Tells OpenAI's clients not to generate the same again by themselves."""


@dataclass
class ApiError(Exception):
    """An answer other than 200."""

    status: int
    message: str
    """Names the field and the fix."""
    parameter: str | None = None
    """Path of the field, such as ``messages[0].content[1]``."""
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """``{"error": …}``."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        default = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": kind.get(self.status, default),
                "param": self.parameter,
                "code": self.code,
            }
        }


def api_error(error: StarkvError, parameter: str | None = None) -> ApiError:
    """What a known error is over HTTP."""
    if isinstance(error, BusyError):
        return ApiError(503, str(error), code="busy", headers={"Retry-After": str(RETRY_SECONDS)})
    if isinstance(error, (UsageError, ImageError)):
        return ApiError(
            400, str(error), parameter, "invalid_image" if isinstance(error, ImageError) else None
        )
    return ApiError(500, str(error), code="engine_error" if isinstance(error, EngineError) else None)


def interrupted(reason: str, timeout_seconds: float) -> ApiError | None:
    """What a reply is that ended before its time; None for one that is whole.

    Half a reply may be half an action, so it is no answer.
    """
    if reason == "timeout":
        return ApiError(
            504,
            f"the reply took longer than {timeout_seconds:g} seconds; ask for fewer tokens",
            code="timeout",
            headers=DONT_RETRY,
        )
    if reason == "cancelled":
        return ApiError(503, "the server is shutting down", code="cancelled", headers=DONT_RETRY)
    return None


def answer(error: ApiError) -> JSONResponse:
    """The error as a response."""
    return JSONResponse(error.body, error.status, dict(error.headers))
