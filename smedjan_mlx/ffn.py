"""Feed-forwards in MLX; `ffn_class` finds the class that a row of smedjan_common.model.ffns.FFNS names.

swiglu: down(silu(gate(x)) * up(x))        (Shazeer, 2020)
"""

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from smedjan_common.config import ModelConfig
from smedjan_common.model.ffns import FFNS
from smedjan_mlx.modules import Carried, Linear, Params, apply_together, together


def ffn_class(name: str) -> Any:
    """The class of the feed-forward `name`, a key of FFNS."""
    return getattr(importlib.import_module(f"smedjan_mlx.{FFNS[name].module}"), FFNS[name].class_name)


class SwiGLU(nn.Module):
    """The feed-forward `swiglu`."""

    together = ("gate_proj", "up_proj")

    def __init__(self, config: ModelConfig, params: Params, name: str):
        super().__init__()
        self.gate_proj = Linear(params, f"{name}.gate_proj")
        self.up_proj = Linear(params, f"{name}.up_proj")
        self.down_proj = Linear(params, f"{name}.down_proj")

    def __call__(self, x: mx.array, carried: Carried) -> tuple[mx.array, Carried]:
        return self.mix(self.project(x), carried)

    def project(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Gate and up, [B, T, F] each, of x [B, T, D]."""
        gate, up = apply_together(together(self), x)
        return gate, up

    def mix(self, projected: tuple[mx.array, mx.array], carried: Carried) -> tuple[mx.array, Carried]:
        """What `project` gave, multiplied and projected back to [B, T, D]."""
        return self.down_proj(swiglu(*projected)), carried


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, in the dtype of the arguments."""
    return nn.silu(gate) * up
