"""Executors: who carries a step to the ranks that compute it. The contract: `hexad.engine.step.Executor`."""

from __future__ import annotations

from hexad.engine.step import ScheduledStep, StepCost, StepResult
from hexad.params import PoolingParams, SamplingParams
from hexad.runner.model_runner import ModelRunner


class LocalExecutor:
    """Computes on the one rank of this process."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner

    @property
    def step_cost(self) -> StepCost:
        """What this model's steps cost."""
        return self.runner.step_cost

    def check(self, params: SamplingParams | PoolingParams) -> None:
        """Raises ParamsError for what could not be carried out."""
        self.runner.check(params)

    def execute(self, step: ScheduledStep) -> StepResult:
        """Computes the step here and now."""
        return self.runner.execute(step)

    def sleep(self) -> None:
        """Frees weights and KV cache."""
        self.runner.sleep()

    def wake(self) -> None:
        """Loads them again."""
        self.runner.wake()
