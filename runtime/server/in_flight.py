# SPDX-License-Identifier: Apache-2.0
"""What all requests together hold, from their arrival to the end of their answers, and how much that may be.

Each request has a limit of its own for its body and its images; without a common one a crowd of requests that
are all within theirs could still fill the memory. Who comes too many is told to come back.
"""

import threading
from dataclasses import dataclass

from starkv.runtime.server.errors import RETRY_SECONDS, ApiError
from starkv.runtime.server.options import ServerOptions


@dataclass(frozen=True)
class Held:
    """What is held at a moment, by one request or by all."""

    requests: int = 0
    body_bytes: int = 0
    pixels: int = 0

    def __add__(self, more: "Held") -> "Held":
        return Held(
            self.requests + more.requests, self.body_bytes + more.body_bytes, self.pixels + more.pixels
        )

    def __neg__(self) -> "Held":
        return Held(-self.requests, -self.body_bytes, -self.pixels)


class InFlight:
    """Counts what requests hold. Safe to use from any thread: images are decoded on several.

    Args:
        options: limits of the server.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.most = Held(options.most_requests, options.most_total_body_bytes, options.most_total_pixels)
        self.held = Held()
        """By all requests."""
        self.lock = threading.Lock()

    def enter(self) -> "Share":
        """Let one more request in.

        Raises:
            ApiError: there are as many as there may be.
        """
        share = Share(self)
        share.take(Held(requests=1))
        return share

    def check(self, more: Held) -> None:
        """Refuse what does not fit beside what is held now.

        Raises:
            ApiError: 503, with what is held.
        """
        held, most = self.held, self.most
        if held.requests + more.requests > most.requests:
            raise _busy(f"{held.requests} requests are in progress, the most there may be")
        if held.body_bytes + more.body_bytes > most.body_bytes:
            raise _busy(
                f"the bodies of requests in progress take {held.body_bytes} of the {most.body_bytes} bytes "
                "that they may take together"
            )
        if held.pixels + more.pixels > most.pixels:
            raise _busy(
                f"the images of requests in progress have {held.pixels:,} of the {most.pixels:,} pixels that "
                "they may have together"
            )


class Share:
    """What one request holds of it; given back as a whole by :meth:`close`."""

    def __init__(self, whole: InFlight) -> None:
        self._whole, self._mine, self._closed = whole, Held(), False

    def expect_body(self, body_bytes: int) -> None:
        """Refuse a body that is said to be larger than what is free, before it is sent.

        Nothing is reserved for it: a client that says much and sends nothing must not keep others out.

        Raises:
            ApiError: it doesn't fit now.
        """
        self._whole.check(Held(body_bytes=body_bytes))

    def take_body(self, body_bytes: int) -> None:
        """Count bytes of the body that have come.

        Raises:
            ApiError: they don't fit now.
        """
        self.take(Held(body_bytes=body_bytes))

    def take_pixels(self, pixels: int) -> None:
        """Count an image that is about to be decoded.

        Raises:
            ApiError: it doesn't fit now, or the request's images never will.
        """
        most = self._whole.most.pixels
        if self._mine.pixels + pixels > most:
            raise ApiError(
                400,
                f"the request's images have more than {most:,} pixels together, the most that this server "
                "takes; send fewer or smaller images",
                "messages",
                "too_many_pixels",
            )
        self.take(Held(pixels=pixels))

    def take(self, more: Held) -> None:
        """Hold more.

        Raises:
            ApiError: it doesn't fit now, or the request is over.
        """
        with self._whole.lock:
            if self._closed:
                # A thread that still decodes images of a request that was given up.
                raise ApiError(499, "the request is over", code="client_closed_request")
            self._whole.check(more)
            self._whole.held += more
            self._mine += more

    def close(self) -> None:
        """Give everything back."""
        with self._whole.lock:
            self._whole.held += -self._mine
            self._mine, self._closed = Held(), True


def _busy(message: str) -> ApiError:
    return ApiError(
        503, f"{message}; try again later", code="busy", headers={"Retry-After": str(RETRY_SECONDS)}
    )
