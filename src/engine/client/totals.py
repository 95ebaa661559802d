"""What several engines report, put together as the report of one."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from gptoss.engine.messages import EngineStats, Ready


def added_stats(stats: Sequence[EngineStats]) -> EngineStats:
    """The figures of engines together: sums, but for shares and the last step's duration."""
    names = EngineStats.__struct_fields__
    total = EngineStats(**{name: sum(getattr(one, name) for one in stats) for name in names})
    total.kv_usage = 1 - total.num_free_blocks / total.num_blocks if total.num_blocks else 0.0
    total.last_step_s = max(one.last_step_s for one in stats)
    return total


def added_ready(reports: Sequence[Ready]) -> Ready:
    """What runs on engines together; what is equal for all of them is the first one's."""
    return msgspec.structs.replace(
        reports[0],
        num_blocks=sum(report.num_blocks for report in reports),
        kv_cache_bytes=sum(report.kv_cache_bytes for report in reports),
        weight_bytes=sum(report.weight_bytes for report in reports),
        max_model_len=min(report.max_model_len for report in reports),
        load_s=max(report.load_s for report in reports),
        ranks=[rank for report in reports for rank in report.ranks],
    )
