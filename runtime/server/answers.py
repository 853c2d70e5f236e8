# SPDX-License-Identifier: Apache-2.0
"""Replies in OpenAI's shapes, with starkv's own fields beside them."""

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starkv.manifest import Manifest
from starkv.runtime.agent import interpret
from starkv.runtime.serving.requests import Finished

DONE = b"data: [DONE]\n\n"

_GUI = ("action", "actions", "model_xy", "screen_xy", "thought", "error", "resized_wh", "original_wh")


@dataclass(frozen=True)
class Answer:
    """One reply while it is being told."""

    model: str
    manifest: Manifest
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, end: Finished) -> dict[str, Any]:
        """``chat.completion``."""
        return {
            **self._head("chat.completion"),
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "finish_reason": end.reason,
                    "logprobs": None,
                }
            ],
            "usage": usage(end),
            **self.extras(text, end),
        }

    def first_chunk(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""}, None)

    def chunk(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text}, None)

    def last_chunk(self, text: str, end: Finished) -> dict[str, Any]:
        """The chunk that says why the reply ended, with everything that is known only now."""
        return {**self._chunk({}, end.reason), **self.extras(text, end)}

    def usage_chunk(self, end: Finished) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(end)}

    def extras(self, text: str, end: Finished) -> dict[str, Any]:
        """``timings``, and the action in model and screen pixels where the conversation shows a screen."""
        extras: dict[str, Any] = {"timings": end.timings.to_json()}
        if end.seen:
            reply = interpret(text, self.manifest, end.seen[-1], end.timings, end.reason).to_json()
            names = (
                "action",
                "actions",
                "model_xy",
                "screen_xy",
                "thought",
                "error",
                "resized_wh",
                "original_wh",
            )
            extras["gui"] = {name: reply[name] for name in names}
        return extras

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}


def usage(end: Finished) -> dict[str, Any]:
    """Tokens of a request; ``cached_tokens`` of them were in the session's cache already."""
    prompt = end.timings.prompt_tokens + end.reused_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": end.timings.generated_tokens,
        "total_tokens": prompt + end.timings.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": end.reused_tokens},
    }


def event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
