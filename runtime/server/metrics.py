# SPDX-License-Identifier: Apache-2.0
"""Figures for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from starkv.runtime.server.bridge import SchedulerLike
from starkv.runtime.server.in_flight import InFlight
from starkv.runtime.serving.requests import Finished

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """Counters of one server, and gauges that are read when asked for."""

    def __init__(self, scheduler: SchedulerLike, in_flight: InFlight) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "starkv_requests", "Chat requests by HTTP status.", ["status"], registry=self.registry
        )
        self._ends = Counter(
            "starkv_replies", "Replies by how they ended.", ["reason"], registry=self.registry
        )
        self._tokens = Counter(
            "starkv_tokens",
            "Tokens prefilled, reused from caches, generated.",
            ["kind"],
            registry=self.registry,
        )
        self.first_token = Histogram(
            "starkv_first_token_seconds",
            "From a request's arrival to its first text.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.whole_reply = Histogram(
            "starkv_reply_seconds",
            "From a request's arrival to its reply's end.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Gauges(scheduler, in_flight))

    def count(self, end: Finished) -> None:
        """Count a reply that is over."""
        self._ends.labels(end.reason).inc()
        self._tokens.labels("prefilled").inc(end.timings.prompt_tokens)
        self._tokens.labels("reused").inc(end.reused_tokens)
        self._tokens.labels("generated").inc(end.timings.generated_tokens)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)


class _Gauges(Collector):
    def __init__(self, scheduler: SchedulerLike, in_flight: InFlight) -> None:
        self._scheduler, self._in_flight = scheduler, in_flight

    def collect(self) -> Iterator[GaugeMetricFamily]:
        status, held = self._scheduler.status(), self._in_flight.held
        states = [sequence.state for sequence in status.sequences]
        family = GaugeMetricFamily("starkv_sequences", "Requests by what they are doing.", labels=["state"])
        for state in ("queued", "prefill", "decode"):
            family.add_metric([state], states.count(state))
        yield family
        for name, text, value in (
            ("starkv_kv_held_bytes", "Bytes of valid KV rows in slots.", status.kv_bytes_held),
            ("starkv_kv_reserved_bytes", "Bytes of KV memory allocated.", status.kv_bytes_reserved),
            ("starkv_kv_limit_bytes", "Bytes of KV memory there may be.", status.kv_bytes_limit),
            ("starkv_parked_sessions", "Sessions between their turns.", status.parked_sessions),
            ("starkv_parked_bytes", "Bytes of their KV rows in host memory.", status.parked_bytes),
            ("starkv_requests_in_progress", "Chat requests being read or answered.", held.requests),
            ("starkv_body_bytes_in_progress", "Bytes of their bodies.", held.body_bytes),
            ("starkv_pixels_in_progress", "Pixels that were decoded for them.", held.pixels),
        ):
            yield GaugeMetricFamily(name, text, value=value)
