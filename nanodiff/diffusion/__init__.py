"""The mathematics of diffusion: functions of tensors. No networks, no files, no printing."""

from . import editing, elbo, gaussian, grid, guidance, process, samplers, schedule
from .schedule import Schedule

__all__ = ["Schedule", "schedule", "grid", "process", "elbo", "gaussian", "samplers", "guidance", "editing"]
