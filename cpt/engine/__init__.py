"""One optimiser step on DeepSpeed, and the same model scored, saved and loaded."""

from cpt.engine.engine import Engine, StepResult

__all__ = ["Engine", "StepResult"]
