"""Prometheus metrics: HTTP, times to and between tokens, and all that the engine counts."""

from collections.abc import Iterator, Mapping
from dataclasses import fields

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from statespan.serving.metrics import EngineMetrics

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
TOKENS = tuple(4**exponent for exponent in range(11))


class ServerMetrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engine = _EngineCollector()
        self.registry.register(self._engine)
        self._requests = Counter(
            "statespan_http_requests", "Requests that ended.", ("route", "status"), registry=self.registry
        )

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(f"statespan_{name}", text, labels, buckets=buckets, registry=self.registry)

        self._duration = histogram("http_request_seconds", "From request to end of reply.", SECONDS, ("route",))
        self._first = histogram("first_token_seconds", "From a request's arrival to its first token.", SECONDS)
        self._next = histogram("next_token_seconds", "Between two tokens of a reply.", TOKEN_SECONDS)
        self._prompt = histogram("prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._reply = histogram("reply_tokens", "Tokens of a reply.", TOKENS)

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request ended."""
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """The first token of a reply came."""
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """A further token of a reply came."""
        self._next.observe(seconds)

    def reply(self, prompt_tokens: int, reply_tokens: int) -> None:
        """A reply ended."""
        self._prompt.observe(prompt_tokens)
        self._reply.observe(reply_tokens)

    def text(self, engine: Mapping[str, EngineMetrics]) -> bytes:
        """All metrics in Prometheus' text format; `engine` by replica."""
        self._engine.metrics = engine
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The engine's own counters and gauges."""

    def __init__(self) -> None:
        self.metrics: Mapping[str, EngineMetrics] = {}

    def collect(self) -> Iterator[Metric]:
        for field in fields(EngineMetrics):
            kind = GaugeMetricFamily if field.metadata["gauge"] else CounterMetricFamily
            by_reason = field.name == "finished"
            labels = ["replica", "reason"] if by_reason else ["replica"]
            family = kind(f"statespan_engine_{field.name}", f"{field.metadata['text']}.", labels=labels)
            for replica, values in self.metrics.items():
                value = getattr(values, field.name)
                if by_reason:
                    for reason, count in value.items():
                        family.add_metric([replica, reason], count)
                else:
                    family.add_metric([replica], value)
            yield family

    def describe(self) -> Iterator[Metric]:
        return iter(())
