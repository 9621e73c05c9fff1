"""What a Prometheus reads of the server."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from chargpt.serve.engine import ModelEngine


class Metrics:
    """Prometheus' numbers, by vLLM's names where they mean the same."""

    def __init__(self, engines: Mapping[str, ModelEngine]) -> None:
        self.registry, names = CollectorRegistry(), ["model_name"]
        running = Gauge("vllm:num_requests_running", "streams that are written", names, registry=self.registry)
        waiting = Gauge("vllm:num_requests_waiting", "streams that wait", names, registry=self.registry)
        for name, engine in engines.items():
            running.labels(name).set_function(lambda engine=engine: engine.running)  # type: ignore[misc]
            waiting.labels(name).set_function(lambda engine=engine: engine.waiting)  # type: ignore[misc]
        self.prompt = Counter("vllm:prompt_tokens", "tokens of prompts", names, registry=self.registry)
        self.generated = Counter("vllm:generation_tokens", "tokens written", names, registry=self.registry)
        self.finished = Counter(
            "vllm:request_success", "streams that ended", [*names, "finished_reason"], registry=self.registry
        )
        self.first = Histogram(
            "vllm:time_to_first_token_seconds",
            "until a request's first token",
            names,
            registry=self.registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 25),
        )
        self.whole = Histogram("vllm:e2e_request_latency_seconds", "of a request", names, registry=self.registry)
