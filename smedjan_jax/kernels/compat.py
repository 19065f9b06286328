"""Pallas's Triton backend, of which JAX says since 0.11 that it will go."""

import warnings

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    from jax.experimental.pallas import triton as plgpu

__all__ = ["plgpu"]
