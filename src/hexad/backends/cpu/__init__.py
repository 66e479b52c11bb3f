"""The CPU backend: a fused graph lowered to one native program (csrc/program.h)."""

from hexad.backends.cpu.backend import CpuBackend, CpuExecutable

__all__ = ["CpuBackend", "CpuExecutable"]
