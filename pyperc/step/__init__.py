"""The training step: loss, forward, backward and update as one call."""

from pyperc.step.train_step import TrainStep

__all__ = ["TrainStep"]
