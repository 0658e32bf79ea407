"""What the server counts, for Prometheus. No question, answer or picture is in it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from mpa_edge.runtime.vlm import Answer

PHASES = ("preprocess", "vision", "prefill", "decode", "total")
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "mpa_edge_requests",
            "Requests by outcome: answered, refused, busy, cancelled, failed.",
            ["outcome"],
            registry=self.registry,
        )
        self.inside = Gauge("mpa_edge_requests_inside", "Requests answered or waiting.", registry=self.registry)
        self.tokens = Counter(
            "mpa_edge_tokens", "Tokens by kind: prompt, cached (of the prompt), new.", ["kind"], registry=self.registry
        )
        self.phases = Histogram(
            "mpa_edge_phase_seconds", "Seconds by phase.", ["phase"], buckets=BUCKETS, registry=self.registry
        )

    def answered(self, answer: Answer) -> None:
        """Count one answer."""
        self.tokens.labels("prompt").inc(answer.prompt_tokens or 0)
        self.tokens.labels("cached").inc(answer.cached_tokens)
        self.tokens.labels("new").inc(len(answer.tokens))
        for phase in PHASES:
            milliseconds = getattr(answer.timings, phase)
            if milliseconds is not None:
                self.phases.labels(phase).observe(milliseconds / 1000)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
