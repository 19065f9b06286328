"""Feed-forwards in JAX; `ffn_class` finds the class that a row of smedjan_common.model.ffns.FFNS names.

swiglu: down(silu(gate(x)) * up(x))        (Shazeer, 2020)
"""

import importlib
from typing import Any

import jax
from flax import nnx

from smedjan_common.config import ModelConfig
from smedjan_common.model.ffns import FFNS
from smedjan_jax.modules import Carried, Linear, Params, apply_together, together


def ffn_class(name: str) -> Any:
    """The class of the feed-forward `name`, a key of FFNS."""
    return getattr(importlib.import_module(f"smedjan_jax.{FFNS[name].module}"), FFNS[name].class_name)


class SwiGLU(nnx.Module):
    """The feed-forward `swiglu`."""

    reads = together = ("gate_proj", "up_proj")

    def __init__(self, config: ModelConfig, params: Params, name: str):
        self.gate_proj = Linear(params, f"{name}.gate_proj")
        self.up_proj = Linear(params, f"{name}.up_proj")
        self.down_proj = Linear(params, f"{name}.down_proj")

    def __call__(self, x: jax.Array, carried: Carried) -> tuple[jax.Array, Carried]:
        linears = self.gate_proj, self.up_proj, self.down_proj
        if all(linear.float8 == "pallas" and linear.bias is None and linear.lora_a is None for linear in linears):
            from smedjan_jax.swiglu import fits, swiglu_by_kernels

            gate, up, down = (linear.weight for linear in linears)
            if fits(x, gate):
                return swiglu_by_kernels(x, (gate, up), down), carried
        return self.mix(self.project(x), carried)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gate and up, [B, T, F] each, of x [B, T, D]."""
        gate, up = apply_together(together(self), x)
        return gate, up

    def mix(self, projected: tuple[jax.Array, jax.Array], carried: Carried) -> tuple[jax.Array, Carried]:
        """What `project` gave, multiplied and projected back to [B, T, D]."""
        return self.down_proj(swiglu(*projected)), carried


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, in the dtype of the arguments."""
    return jax.nn.silu(gate) * up
