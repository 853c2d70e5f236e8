# SPDX-License-Identifier: Apache-2.0
"""A request of the wire → one of the scheduler."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from starkv.errors import StarkvError
from starkv.methods.budget import Budget
from starkv.methods.names import FULL, STAR_KV
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.tokenizer import Message
from starkv.runtime.server import images
from starkv.runtime.server.errors import ApiError, api_error
from starkv.runtime.server.options import ServerOptions
from starkv.runtime.server.wire import ChatRequest, ImageContent
from starkv.runtime.serving.requests import GenerationRequest

_SHOWN = 100
"""Characters of a wrong value that a message repeats."""
_TAGS = ("text", "image_url")
_BRANCHES = ("str", "list[str]", "list[tagged-union[TextContent,ImageContent]]")


def parse(body: bytes, options: ServerOptions) -> ChatRequest:
    """Read a request's body.

    Raises:
        ApiError: it is no JSON, a field is wrong, or it asks for what the server doesn't have.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _field_error(error) from None
    if request.model is not None and request.model != options.model:
        raise ApiError(
            404,
            f"the model {request.model[:_SHOWN]!r} is not served here; ask for {options.model!r}, or leave "
            "model out",
            "model",
            "model_not_found",
        )
    if request.n not in (None, 1):
        raise ApiError(400, f"n must be 1, not {request.n}; send one request per reply", "n")
    if (request.new_tokens or 0) > options.most_new_tokens:
        name = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        raise ApiError(
            400, f"{name} may be at most {options.most_new_tokens}, not {request.new_tokens}", name
        )
    count = sum(1 for _ in _image_parts(request))
    if count > options.most_images:
        raise ApiError(
            400,
            f"{count} images are more than the {options.most_images} that this server takes; leave older "
            "screenshots out",
            "messages",
            "too_many_images",
        )
    return request


def translate(request: ChatRequest, options: ServerOptions, prepare: images.Prepare) -> GenerationRequest:
    """Prepare the images and put everything into the scheduler's terms.

    Args:
        request: as it came.
        options: limits of the server.
        prepare: takes the bytes of each image file.

    Raises:
        ApiError: an image or a value can't be taken.
    """
    prepared = [
        images.load(part.image_url.url, place, options, prepare) for place, part in _image_parts(request)
    ]
    try:
        parameters = SamplingParameters(
            request.new_tokens or options.default_new_tokens,
            request.temperature or 0.0,
            1.0 if request.top_p is None else request.top_p,
            # OpenAI allows negative seeds.
            None if request.seed is None else request.seed % 2**63,
            request.stop_strings,
        )
        policy = _policy(request, options.policy)
    except StarkvError as error:
        raise api_error(error) from None
    return GenerationRequest(
        messages=[_message(request, number) for number in range(len(request.messages))],
        images=prepared,
        parameters=parameters,
        policy=policy,
        session_id=request.session_id,
        timeout_seconds=options.timeout_seconds,
    )


def _image_parts(request: ChatRequest) -> Iterator[tuple[str, ImageContent]]:
    """Path and part of every image, in order."""
    for number, message in enumerate(request.messages):
        if isinstance(message.content, list):
            for index, part in enumerate(message.content):
                if isinstance(part, ImageContent):
                    yield f"messages[{number}].content[{index}].image_url", part


def _message(request: ChatRequest, number: int) -> Message:
    message = request.messages[number]
    role = "system" if message.role == "developer" else message.role
    content: Any = message.content or ""
    if isinstance(content, list):
        content = [
            {"type": "image"} if isinstance(part, ImageContent) else {"type": "text", "text": part.text}
            for part in content
        ]
    turn: Mapping[str, Any] = {"role": role, "content": content}
    return turn


def _policy(request: ChatRequest, default: KvPolicy) -> KvPolicy:
    """The server's policy with what the request wants otherwise; a budget alone means STaR-KV."""
    budget, method = default.budget, request.kv_method
    if request.kv_budget is not None or request.kv_capacity is not None:
        budget = Budget(1.0 if request.kv_budget is None else request.kv_budget, request.kv_capacity)
        method = method or (STAR_KV if default.method == FULL else default.method)
    packed = default.packed if request.kv_packed is None else request.kv_packed
    return replace(default, method=method or default.method, budget=budget, packed=packed)


def _field_error(error: ValidationError) -> ApiError:
    # Of a union's branches the one that got furthest tells most.
    first = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']}", code="invalid_json")
    place = ""
    for step in first["loc"]:
        # Pydantic also names the branch of a union, which is no part of the body.
        if isinstance(step, int):
            place += f"[{step}]"
        elif step in _BRANCHES or (step in _TAGS and place.endswith("]") and "content" in place):
            continue
        else:
            place += f".{step}" if place else step
    return ApiError(400, f"{place or 'body'}: {first['msg']}", place or None)
