"""The menu of sequence mixers (MIXERS): one row each, a file each.

A row tells everything that is not array work: parameters, cost, decode state, what is impossible, where the float64
definition lives and how closely both backends meet it. Counting, initial values, `sizes`, the conformance suite and the
benchmarks walk this table; docs/add-a-mixer.md shows what a new row takes, file by file.
"""

from typing import Any

from smedjan_common.model.mixers import attention, block_sparse, gated_deltanet, linear, mla, rwkv, ssm
from smedjan_common.model.spec import MixerSpec

MIXERS: dict[str, MixerSpec[Any]] = {
    row.name: row for row in (attention.ROW, linear.ROW, ssm.ROW, mla.ROW, block_sparse.ROW, rwkv.ROW, gated_deltanet.ROW)
}
