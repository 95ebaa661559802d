"""Metrics whose values are read at scrape time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Labelled = list[tuple[dict[str, str], float]]  # labels and value of each instance, such as a GPU
NO_LABELS: dict[str, str] = {}

# Our names -> vLLM's, for metrics with the same meaning
VLLM_NAMES = {
    name: name
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "prompt_tokens",
        "generation_tokens",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "spec_decode_num_draft_tokens",
        "spec_decode_num_accepted_tokens",
        "lora_requests_info",
        "cache_config_info",
    )
} | {"kv_cache_usage_ratio": "kv_cache_usage_perc", "preemptions": "num_preemptions"}


class RelabelledRegistry(Collector):
    """The metrics of another registry with constant labels, and again under vLLM's names."""

    def __init__(self, source: CollectorRegistry, tags: Mapping[str, str], vllm_names: bool) -> None:
        self._source, self._tags, self._vllm_names = source, tags, vllm_names

    def collect(self) -> Iterator[Metric]:
        copies = []
        for metric in self._source.collect():
            yield _renamed(metric, metric.name, self._tags)
            alias = VLLM_NAMES.get(metric.name.removeprefix("gptoss_"))
            if self._vllm_names and alias is not None:
                labels = {"model_name": self._tags["model_id"], "engine": "0"}
                copies.append(_renamed(metric, f"vllm:{alias}", labels))
        yield from copies

    def describe(self) -> list[Metric]:
        return []


def _renamed(metric: Metric, name: str, labels: Mapping[str, str]) -> Metric:
    copy = Metric(name, metric.documentation, metric.type)
    for sample in metric.samples:
        own = sample.name.replace(metric.name, name, 1)
        copy.samples.append(sample._replace(name=own, labels={**labels, **sample.labels}))
    return copy


@dataclass(frozen=True, slots=True)
class ScrapedValue:
    """A value that is read at scrape time, or one with labels for each instance."""

    name: str
    text: str
    read: Callable[[], float | Labelled]
    counter: bool = False

    def metric(self) -> Metric:
        metric = Metric(f"gptoss_{self.name}", self.text, "counter" if self.counter else "gauge")
        found = self.read()
        for labels, number in found if isinstance(found, list) else [(NO_LABELS, found)]:
            metric.add_sample(metric.name + ("_total" if self.counter else ""), labels, number)
        return metric


class ScrapeCollector(Collector):
    """Gauges and counters that are read from other objects at scrape time."""

    def __init__(
        self,
        values: list[ScrapedValue],
        gauges: Callable[[], Mapping[str, Labelled]],
        tags: Callable[[], dict[str, str]],
    ) -> None:
        """`gauges`: by name, one for each instance."""
        self._values = values
        self._gauges = gauges
        self._tags = tags

    def collect(self) -> Iterator[Metric]:
        tags = self._tags()
        info = GaugeMetricFamily("gptoss_info", "What is loaded.", labels=list(tags))
        info.add_metric(list(tags.values()), 1.0)
        yield info
        for name, found in self._gauges().items():
            labelled = Metric(f"gptoss_{name}", name.replace("_", " ").capitalize() + ".", "gauge")
            for labels, number in found:
                labelled.add_sample(f"gptoss_{name}", labels, number)
            yield labelled
        for value in self._values:
            yield value.metric()
