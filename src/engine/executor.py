"""The workers as the engine core sees them."""

from __future__ import annotations

from src.engine.config import EngineConfig
from src.engine.messages import ModelRunnerOutput, SchedulerOutput
from src.engine.worker.worker import Worker


class Executor:
    """Rank 0 lives in this process."""

    def __init__(self, config: EngineConfig) -> None:
        self.worker = Worker(config)
        self.worker.load()
        self.num_blocks = self.worker.init_cache()
        self.worker.self_test()

    def execute_model(self, out: SchedulerOutput) -> ModelRunnerOutput:
        return self.worker.execute_model(out)
