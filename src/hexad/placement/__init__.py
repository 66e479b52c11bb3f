"""What the machine has, and what goes where on it."""

from hexad.placement.hardware import Hardware, cpu_count, free_memory, probe, thread_cpus
from hexad.placement.plan import Plan, plan

__all__ = ["Hardware", "Plan", "cpu_count", "free_memory", "plan", "probe", "thread_cpus"]
