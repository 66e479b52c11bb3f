"""Executors: who carries a step to the ranks that compute it. The contract: `hexad.engine.step.Executor`."""

from __future__ import annotations

from hexad.engine.step import ScheduledStep, StepResult
from hexad.runner.model_runner import ModelRunner


class LocalExecutor:
    """Computes on the one rank of this process."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner

    def execute(self, step: ScheduledStep) -> StepResult:
        """Computes the step here and now."""
        return self.runner.execute(step)
