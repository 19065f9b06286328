"""Mutations of block-sparse: every part of the choice of blocks, and the mask that comes of it."""

import dataclasses
from collections.abc import Callable

import numpy as np

from smedjan_common.reference import block_sparse
from tests.conformance.cases import CASES
from tests.conformance.mutate import demand_decoding, demand_forward, demand_gradient, on, swap

CASE, GQA, THREE = (CASES[f"block-sparse-swiglu-{part}"] for part in ("mha", "gqa", "mha-three-blocks"))


def other(**fields: int) -> Callable:
    """The choice of a model with another option."""
    return lambda right: lambda config, *rest: right(dataclasses.replace(config, **fields), *rest)


def scored_by(pool: Callable) -> Callable:
    """Blocks by something else than the sum of the group's queries times their mean key."""

    def wrong(config, query, key):
        batch, length = query.shape[:2]
        blocks = [key[:, s : s + config.block_size] for s in range(0, key.shape[1], config.block_size)]
        pooled_BxJxHkxK = np.stack([pool(block) for block in blocks], axis=1)
        summed = query.reshape(batch, length, config.kv_heads, -1, config.head_dim).sum(axis=3)
        return np.einsum("btgk,bjgk->bgtj", summed, pooled_BxJxHkxK)

    return lambda right: wrong


def by_the_first_head_of_a_group(right: Callable) -> Callable:
    return lambda config, query, key: right(config, np.where((np.arange(config.heads) % 2 == 0)[:, None], query, 0.0), key)


def first_block_in_place_of_the_own(right: Callable) -> Callable:
    def choose(config, query, key, start):
        chosen, number = right(config, query, key, start), np.arange(-(-key.shape[1] // config.block_size))
        own = number == ((start + np.arange(query.shape[1])) // config.block_size)[:, None]
        return (chosen & ~own) | (number == 0)

    return choose


MUTATIONS = {
    "one block more": (on(demand_forward, CASE), swap(block_sparse, "choose", other(block_topk=3))),
    "one block fewer": (on(demand_forward, THREE), swap(block_sparse, "choose", other(block_topk=2))),
    "worst blocks": (on(demand_forward, CASE), swap(block_sparse, "scores", lambda right: lambda *args: -right(*args))),
    "blocks by their largest key": (on(demand_forward, CASE), swap(block_sparse, "scores", scored_by(lambda block: block.max(axis=1)))),
    "blocks by their last key": (on(demand_forward, CASE), swap(block_sparse, "scores", scored_by(lambda block: block[:, -1]))),
    "one head chooses for its group": (on(demand_forward, GQA), swap(block_sparse, "scores", by_the_first_head_of_a_group)),
    "own block not forced": (on(demand_forward, CASE), swap(block_sparse, "choose", first_block_in_place_of_the_own)),
    "gradient with one block more": (on(demand_gradient, CASE), swap(block_sparse, "choose", other(block_topk=3))),
    "decoding with one block more": (on(demand_decoding, CASE), swap(block_sparse, "choose", other(block_topk=3))),
}
