"""The menus: one row per sequence mixer (MIXERS) and per feed-forward (FFNS), a file each.

A row tells everything that is not array work: parameters, cost, decode state, what is impossible, where the float64
definition lives and how closely both backends meet it. Counting, initial values, `sizes`, the conformance suite and the
benchmarks walk these tables; a new row with its reference and its two classes is all that a new mixer takes.
"""

from smedjan_common.mixers import attention, block_sparse, experts, gated_deltanet, linear, mla, rwkv, ssm, swiglu
from smedjan_common.mixers.spec import FfnSpec, MixerSpec, StateSpec, Tolerance

__all__ = ["FFNS", "MIXERS", "FfnSpec", "MixerSpec", "StateSpec", "Tolerance"]

MIXERS: dict[str, MixerSpec] = {
    row.name: row for row in (attention.ROW, linear.ROW, ssm.ROW, mla.ROW, block_sparse.ROW, rwkv.ROW, gated_deltanet.ROW)
}
FFNS: dict[str, FfnSpec] = {row.name: row for row in (swiglu.ROW, experts.ROW)}
