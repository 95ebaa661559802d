"""Writes dashboard.json next to this file:  python deploy/grafana/make_dashboard.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

P = 'model_id=~"$model"'


def quantiles(metric: str) -> list[tuple[str, str]]:
    return [
        (f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket{{{P}}}[$__rate_interval])))", f"p{q * 100:g}")
        for q in (0.5, 0.95, 0.99)
    ]


def per_second(metric: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{P}}}[$__rate_interval]))"


PANELS: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("Requests by outcome", "reqps", [(per_second("gptoss_requests_total", "outcome"), "{{outcome}}")]),
    ("Running and waiting", "short", [(f"sum without (engine) (gptoss_num_requests_running{{{P}}})", "running"), (f"sum without (engine) (gptoss_num_requests_waiting{{{P}}})", "waiting")]),
    ("Tokens per second", "short", [(per_second("gptoss_generation_tokens_total"), "output"), (per_second("gptoss_prompt_tokens_total"), "prompt")]),
    ("Time to first token", "s", quantiles("gptoss_time_to_first_token_seconds")),
    ("Time to first content token", "s", quantiles("gptoss_time_to_first_content_token_seconds")),
    ("Time between tokens", "s", quantiles("gptoss_inter_token_latency_seconds")),
    ("Whole answer", "s", quantiles("gptoss_e2e_request_latency_seconds")),
    ("Queue", "s", quantiles("gptoss_request_queue_time_seconds")),
    ("Prefill", "s", quantiles("gptoss_request_prefill_time_seconds")),
    ("KV cache in use", "percentunit", [(f"gptoss_kv_cache_usage_ratio{{{P}}}", "share {{engine}}")]),
    ("Cache hits", "percentunit", [
        (f"{per_second('gptoss_prompt_cache_hits_total')} / {per_second('gptoss_prompt_cache_builds_total')}", "prompt cache"),
        (f"{per_second('gptoss_prefix_cache_hits_total')} / {per_second('gptoss_prefix_cache_queries_total')}", "prefix cache"),
        (f"{per_second('gptoss_spec_decode_num_accepted_tokens_total')} / {per_second('gptoss_spec_decode_num_draft_tokens_total')}", "guessed tokens")]),
    ("Step time", "s", quantiles("gptoss_engine_step_duration_seconds")),
    ("Requests in a step", "short", quantiles("gptoss_engine_step_requests")),
    ("Preemptions and restarts", "short", [(f"sum without (engine) (increase(gptoss_preemptions_total{{{P}}}[5m]))", "preemptions"), (f"sum without (engine) (increase(gptoss_engine_restarts_total{{{P}}}[5m]))", "restarts")]),
    ("Prompt length", "short", quantiles("gptoss_request_prompt_tokens")),
    ("Answer length", "short", quantiles("gptoss_request_generation_tokens")),
    ("GPU memory", "bytes", [(f"gptoss_gpu_memory_used_bytes{{{P}}}", "GPU {{gpu}}")]),
    ("GPU use", "percentunit", [(f"gptoss_gpu_utilization_ratio{{{P}}}", "GPU {{gpu}}")]),
]  # fmt: skip


def panel(index: int, title: str, unit: str, queries: list[tuple[str, str]]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "prometheus"}
    return {
        "id": index + 1, "type": "timeseries", "title": title, "datasource": source,
        "gridPos": {"x": index % 3 * 8, "y": index // 3 * 8, "w": 8, "h": 8},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(65 + i), "expr": expr, "legendFormat": legend, "datasource": source}
            for i, (expr, legend) in enumerate(queries)
        ],
    }  # fmt: skip


def dashboard() -> dict[str, Any]:
    return {
        "title": "gpt-oss server", "uid": "gpt-oss-server", "schemaVersion": 41, "version": 1, "editable": True,
        "refresh": "5s", "time": {"from": "now-30m", "to": "now"}, "tags": ["gpt-oss"],
        "templating": {"list": [{
            "name": "model", "type": "query", "datasource": {"type": "prometheus", "uid": "prometheus"},
            "query": {"query": "label_values(gptoss_info, model_id)", "refId": "model"}, "refresh": 2, "includeAll": True,
            "allValue": ".*", "current": {"text": "All", "value": "$__all"},
        }]},
        "panels": [panel(i, *entry) for i, entry in enumerate(PANELS)],
    }  # fmt: skip


if __name__ == "__main__":
    Path(__file__).with_name("dashboard.json").write_text(json.dumps(dashboard(), indent=1) + "\n")
