"""Weights under which block-sparse attention chooses its blocks far from a tie, so that neither rounding nor a small step changes a choice.

A choice of blocks jumps, and at a jump no two computations need agree. Which blocks come close depends on the tokens, so the rows of the
embedding are dealt to the tokens anew, by the turn of the table that keeps the choices of the case's first batch farthest from ties.
"""

import numpy as np

from smedjan_common.config import ModelConfig
from smedjan_common.reference import model as reference

Params = dict[str, np.ndarray]
ENOUGH = 1e-2  # of the spread of the scores; a directional derivative moves a score by 1e-3 of it, rounding by 1e-6


def untied(model: ModelConfig, params: Params, tokens: np.ndarray) -> Params:
    """The same parameters where no block is chosen; else with the best turn of the embedding, which keeps ENOUGH."""
    if "block-sparse" not in model.mixer:
        return params
    turns = ({**params, "embed.weight": np.roll(params["embed.weight"], turn, axis=0)} for turn in range(model.padded_vocab_size))
    return max(turns, key=lambda turned: margin(model, turned, tokens))


def margin(model: ModelConfig, params: Params, tokens: np.ndarray) -> float:
    """The smallest distance between the last chosen and the first not chosen earlier block, over the standard deviation of all scores."""
    smallest, others = np.inf, model.block_topk - 1
    for scores_BxHkxTxJ in reference.outputs(model, params, tokens)[1].get("block_scores", []):
        for position in range((others + 1) * model.block_size, tokens.shape[1]):
            ranked = np.sort(scores_BxHkxTxJ[:, :, position, : position // model.block_size])
            gap = (ranked[..., -others] - ranked[..., -others - 1]).min()
            smallest = min(smallest, float(gap / scores_BxHkxTxJ.std()))
    return smallest
