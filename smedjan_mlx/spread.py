"""Sums over the hosts of a run, each of which trains on its own rows of a batch. One process: nothing is summed, and nothing changes.

Collectives run in the order of the graph, which is the same on all hosts. What a step adds up travels in few messages, of BUCKET_BYTES at
the most.
"""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

BUCKET_BYTES = 64 << 20

_group: mx.distributed.Group | None = None


def begin(group: mx.distributed.Group) -> None:
    """The hosts of the run are these."""
    global _group
    _group = group


def parts() -> int:
    """How many there are."""
    return _group.size() if _group else 1


def own(rows: Any) -> Any:
    """The part of this host of the rows of an array; None of None."""
    if _group is None or rows is None:
        return rows
    each = len(rows) // _group.size()
    return rows[_group.rank() * each : (_group.rank() + 1) * each]


def all_rows(x: mx.array) -> mx.array:
    """The rows of all hosts, in their order, of an array that has those of this one."""
    return mx.distributed.all_gather(x, group=_group) if _group else x


def total(x: mx.array) -> mx.array:
    """The sum over the hosts, with no gradient."""
    return mx.distributed.all_sum(mx.stop_gradient(x), group=_group) if _group else x


def batch_mean(x: mx.array) -> mx.array:
    """The mean over the hosts, with no gradient."""
    return total(x) / parts() if _group else x


def largest(x: mx.array) -> mx.array:
    """The largest of what the hosts have."""
    return mx.distributed.all_max(x, group=_group) if _group else x


def totals(tree: Any) -> Any:
    """A tree of arrays, each the sum over the hosts, taken in float32."""
    if _group is None:
        return tree
    leaves: list[mx.array] = []
    tree_map(leaves.append, tree)
    summed, bucket, size = [], [], 0
    for leaf in leaves:
        if bucket and size + leaf.nbytes > BUCKET_BYTES:
            summed += _summed(bucket)
            bucket, size = [], 0
        bucket.append(leaf)
        size += leaf.nbytes
    found = iter(summed + _summed(bucket))
    return tree_map(lambda _: next(found), tree)


def _summed(bucket: list[mx.array]) -> list[mx.array]:
    """In one message."""
    whole = total(mx.concatenate([leaf.astype(mx.float32).reshape(-1) for leaf in bucket]))
    found, start = [], 0
    for leaf in bucket:
        found.append(whole[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return found
