"""Routed SwiGLU experts in JAX; equations and sources: smedjan_common.reference.experts.

Nothing is dropped: the (token, expert) pairs are laid out expert by expert, each expert's rows are multiplied by its weights,
and the results go back to their tokens. The work grows with the pairs, not with the experts. Rows are moved by gathers in both
directions (the gradient of a gather by a permutation is the gather by its inverse), so no sum has an order of its own.

The router and what is summed over a token's experts are float32, always.

Shapes: N tokens, K experts of a token, E experts, M = N K pairs, R rows (the pairs, and zeros that fill the last block of an
expert), C rows of a block, D width, F hidden features of an expert.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.ffns.experts import Options, block_rows, limited, load_names, padded_rows
from smedjan_jax import sharding
from smedjan_jax.ffn import SwiGLU, swiglu
from smedjan_jax.grouped_matmul import UNBLOCKED, grouped_matmul, preferred_implementation
from smedjan_jax.modules import Carried, Linear, Params, apart, gated, joined, together
from smedjan_jax.products import whole
from smedjan_jax.quantized import Quantized

LOSSES = ("balance_loss", "router_z_loss")


class Layout(NamedTuple):
    """Which row holds which pair; a pair's number is token * K + place among the token's experts."""

    pair_R: jax.Array  # M for a row of zeros
    row_NK: jax.Array
    sizes_E: jax.Array  # rows of each expert, whole blocks


class Router(nnx.Module):
    """Scores of the experts, float32 [..., E], and the bias of the choice where there is one."""

    def __init__(self, config: ModelConfig, params: Params, name: str):
        self.weight = nnx.data(params[f"{name}.weight"])
        self.bias = nnx.data(params[f"{name}.bias"] if config.router == "bias" else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.matmul(x.astype(jnp.float32), self.weight.T, precision=jax.lax.Precision.HIGHEST)


class Experts(nnx.Module):
    """The feed-forward `experts`. It leaves its losses and its load (pairs of each expert) in what is carried."""

    together = ("gate_proj", "up_proj")

    def __init__(self, config: ModelConfig, params: Params, name: str, implementation: str = "auto"):
        self.router = Router(config, params, f"{name}.router")
        self.gate_proj = Linear(params, f"{name}.gate_proj")
        self.up_proj = Linear(params, f"{name}.up_proj")
        self.down_proj = Linear(params, f"{name}.down_proj")
        self.shared = SwiGLU(config, params, f"{name}.shared") if config.shared_experts else None
        self.shared_gate = Linear(params, f"{name}.shared_gate") if config.shared_gate else None
        self.config, self.experts = config, config.experts
        self.name = name
        self.implementation = preferred_implementation() if implementation == "auto" else implementation

    def __call__(self, x: jax.Array, carried: Carried) -> tuple[jax.Array, Carried]:
        return self.mix(self.project(x), carried)

    def project(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Scores [B, T, E], gate and up of the rows [R, F] and, of shared experts, [B, T, F], and their gate [B, T, 1], of x [B, T, D]."""
        logits = self.router(x)
        layout, _, _ = self._route(logits)
        rows_RD = _spread(x.reshape(-1, x.shape[-1]), layout.pair_R, layout.row_NK)
        linears = together(self)
        if apart(linears):
            gate_RF, up_RF = (self._multiply(rows_RD, linear.weight.astype(rows_RD.dtype), layout) for linear in linears)
        else:
            gate_RF, up_RF = jnp.split(self._multiply(rows_RD, joined(linears), layout), 2, axis=-1)
        gate = (self.shared_gate(x),) if self.shared_gate else ()
        return logits, gate_RF, up_RF, *(self.shared.project(x) if self.shared else ()), *gate

    def mix(self, projected: tuple[jax.Array, ...], carried: Carried) -> tuple[jax.Array, Carried]:
        """What `project` gave, multiplied, projected back and summed over each token's experts, [B, T, D]."""
        logits, gate_RF, up_RF, *of_shared = projected
        layout, weights_NK, load_E = self._route(logits)
        out_RD = self._multiply(swiglu(gate_RF, up_RF), self._down(gate_RF.dtype), layout)
        out_NKD = _collect(out_RD, layout.pair_R, layout.row_NK).astype(jnp.float32)
        y_ND = jnp.sum(weights_NK[..., None] * out_NKD, axis=1)
        y = y_ND.astype(gate_RF.dtype).reshape(*logits.shape[:-1], -1)
        if self.shared:
            gate, up, *own_gate = of_shared
            y = y + gated(self.shared.mix((gate, up), {})[0], *own_gate)
        return y, self._account(carried, logits.reshape(-1, self.experts), load_E)

    def _route(self, logits: jax.Array) -> tuple[Layout, jax.Array, jax.Array]:
        chosen_NK, weights_NK = choose(self.config, logits.reshape(-1, self.experts), self.router.bias)
        load_E = jnp.sum(chosen_NK[..., None] == jnp.arange(self.experts), axis=(0, 1))
        return arrange(chosen_NK, load_E, self._block(chosen_NK.size)), weights_NK, load_E.astype(jnp.float32)

    def _block(self, pairs: int) -> int:
        return 1 if self.implementation in UNBLOCKED else block_rows(pairs, self.experts)

    def _down(self, dtype: Any) -> jax.Array:
        weight = self.down_proj.weight
        return weight.astype(dtype) if isinstance(weight, Quantized) else whole(weight)

    def _multiply(self, x_RD: jax.Array, weight: jax.Array, layout: Layout) -> jax.Array:
        return grouped_matmul(x_RD, weight, layout.sizes_E, self._block(layout.row_NK.size), self.implementation)

    def _account(self, carried: Carried, logits_NE: jax.Array, load_E: jax.Array) -> Carried:
        carried = {**carried, f"{self.name}.load": load_E}
        if self.router.bias is None:
            losses = {"balance_loss": balance_loss(logits_NE, load_E), "router_z_loss": router_z_loss(logits_NE)}
            carried |= {name: carried.get(name, 0.0) + value for name, value in losses.items()}
        return carried


def choose(config: Options, logits_NE: jax.Array, bias_E: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The experts of each token, best first, the lowest index of equal ones, and their weights, [N, K] both."""
    choice_NE = jax.lax.stop_gradient(logits_NE if bias_E is None else jax.nn.sigmoid(logits_NE) + bias_E)
    scores_NE = logits_NE if bias_E is None else jax.nn.log_sigmoid(logits_NE)  # their softmax is a sigmoid over the sum
    chosen_NK = jax.lax.top_k(_within_groups(config, choice_NE), config.experts_per_token)[1]
    hit_NKE = chosen_NK[..., None] == jnp.arange(logits_NE.shape[1])
    picked_NK = jnp.sum(jnp.where(hit_NKE, scores_NE[:, None], 0.0), axis=-1)  # a compare, whose gradient is no scatter
    return chosen_NK, _weights(config, picked_NK, logits_NE if bias_E is None else None)


def _within_groups(config: Options, choice_NE: jax.Array) -> jax.Array:
    """The scores of the choice in the groups that each token takes; the others' are -inf."""
    if not limited(config):
        return choice_NE
    choice_NGE = choice_NE.reshape(len(choice_NE), config.expert_groups, -1)
    best_NG = choice_NGE.max(axis=-1) if config.router == "softmax" else jax.lax.top_k(choice_NGE, 2)[0].sum(axis=-1)
    taken = jax.lax.top_k(best_NG, config.expert_groups_per_token)[1][..., None] == jnp.arange(config.expert_groups)
    return jnp.where(taken.any(axis=1)[..., None], choice_NGE, -jnp.inf).reshape(choice_NE.shape)


def _weights(config: Options, picked_NK: jax.Array, logits_NE: jax.Array | None) -> jax.Array:
    """Weights of the chosen experts, of their scores. logits_NE: where softmax is among all experts, not those chosen."""
    if config.norm_topk_prob:
        weights_NK = jax.nn.softmax(picked_NK, axis=-1)
    else:
        weights_NK = jnp.exp(picked_NK if logits_NE is None else picked_NK - jax.nn.logsumexp(logits_NE, axis=-1, keepdims=True))
    factor = config.routed_scaling_factor
    return weights_NK if factor == 1 else weights_NK * factor


def balance_loss(logits_NE: jax.Array, load_E: jax.Array) -> jax.Array:
    """E sum_e f_e P_e, 1 at perfect balance (Switch Transformer, 2021)."""
    share_E = load_E / jnp.sum(load_E)
    chance_E = jnp.mean(jax.nn.softmax(logits_NE, axis=-1), axis=0)
    return load_E.size * jnp.sum(sharding.batch_mean(share_E) * sharding.batch_mean(chance_E))


def router_z_loss(logits_NE: jax.Array) -> jax.Array:
    """Mean of logsumexp^2 (ST-MoE, 2022)."""
    return sharding.batch_mean(jnp.mean(jnp.square(jax.nn.logsumexp(logits_NE, axis=-1))))


def auxiliary_loss(train: TrainConfig, carried: Carried) -> jax.Array | float:
    """What the layers' losses add to the objective; 0 where there are none."""
    return train.balance_loss * carried.get("balance_loss", 0.0) + train.router_z_loss * carried.get("router_z_loss", 0.0)


def measured(config: ModelConfig, carried: Carried, share: jax.Array) -> dict[str, jax.Array]:
    """What a part of a step reports: its losses, means over the layers, times its share of the counted tokens; and its loads."""
    loads = {name: carried[name] for name in load_names(config)}
    return {**{name: share * carried[name] / len(loads) for name in LOSSES if name in carried}, **loads}


def move_biases(config: ModelConfig, params: Params, metrics: dict[str, jax.Array], rate: jax.Array) -> Params:
    """Parameters after a step: each router's bias goes up by `rate` for experts under the mean load, down for those over it."""
    if config.router != "bias":
        return params
    moved = {}
    for name in load_names(config):
        bias = name.replace(".load", ".router.bias")
        moved[bias] = params[bias] + rate * jnp.sign(jnp.mean(metrics[name]) - metrics[name])
    return {**params, **moved}


def summarised(config: ModelConfig, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics of a whole step, with the loads as one "expert_load" [layers, E]: each expert's share of its layer's pairs."""
    loads = [metrics[name] for name in load_names(config)]
    rest = {name: value for name, value in metrics.items() if not name.endswith(".load")}
    return {**rest, "expert_load": jnp.stack([load_E / jnp.sum(load_E) for load_E in loads])} if loads else rest


def arrange(chosen_NK: jax.Array, load_E: jax.Array, block: int) -> Layout:
    """The rows of all pairs, expert by expert in the order of the tokens; each expert begins a new block."""
    pairs, rows = chosen_NK.size, padded_rows(chosen_NK.size, load_E.size, block)
    order_M = jnp.argsort(chosen_NK.reshape(-1), stable=True)  # the pair at each place of the sorted ones
    sizes_E = -(-load_E // block) * block
    shift_E = (jnp.cumsum(sizes_E) - sizes_E) - (jnp.cumsum(load_E) - load_E)
    row_M = jnp.arange(pairs) + shift_E[chosen_NK.reshape(-1)[order_M]]
    pair_R = jnp.full(rows, pairs, jnp.int32).at[row_M].set(order_M.astype(jnp.int32), unique_indices=True, indices_are_sorted=True)
    row_NK = jnp.zeros(pairs, jnp.int32).at[order_M].set(row_M.astype(jnp.int32), unique_indices=True)
    return Layout(pair_R, row_NK.reshape(chosen_NK.shape), sizes_E)


@jax.custom_vjp
def _spread(x_ND: jax.Array, pair_R: jax.Array, row_NK: jax.Array) -> jax.Array:
    """The rows [R, D]: each pair's token, zeros in between."""
    return x_ND.at[pair_R // row_NK.shape[1]].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _collect(y_RD: jax.Array, pair_R: jax.Array, row_NK: jax.Array) -> jax.Array:
    """Each pair's row, [N, K, D]."""
    return y_RD[row_NK]


def _spread_backward(saved, dy_RD: jax.Array):
    return jnp.sum(_collect(dy_RD, *saved), axis=1), None, None


def _collect_backward(saved, dy_NKD: jax.Array):
    pair_R, _ = saved
    return dy_NKD.reshape(-1, dy_NKD.shape[-1]).at[pair_R].get(mode="fill", fill_value=0), None, None


_spread.defvjp(lambda x_ND, *where: (_spread(x_ND, *where), where), _spread_backward)
_collect.defvjp(lambda y_RD, *where: (_collect(y_RD, *where), where), _collect_backward)
