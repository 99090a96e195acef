"""The operations that a training step spends its time in: one file each, and a switch that says which twin serves."""

from cpt_kernels.documents import Documents
from cpt_kernels.switch import Kernels, Settings, choose

__all__ = ["Documents", "Kernels", "Settings", "choose"]
