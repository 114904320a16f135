"""Plans the memory of a run from its options, without a model or a device."""

from .plan import Part, Plan, plan

__all__ = ["Part", "Plan", "plan"]
