"""`sample` as it was first written: a whole stable sort for each filter and noise for every id. The definition that the fast form
must not leave (tests/unit/test_sampling_plain.py), and what bench/sampling.py measures it against.
"""

import numpy as np


def plain_sample(logits, history, sampling, position):
    scores = np.asarray(logits, np.float64)
    if sampling.repetition_penalty != 1:
        scores = plain_penalize(scores, history, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(np.argmax(scores))
    with np.errstate(over="ignore"):
        divided = scores / sampling.temperature
        same = np.array_equal(np.isinf(divided), np.isinf(scores))
        scores = plain_filtered(divided if same else (scores - scores.max()) / sampling.temperature, sampling)
    return int(np.argmax(scores + plain_gumbel(len(scores), sampling.seed, position)))


def plain_penalize(scores, history, penalty):
    seen = np.unique(np.asarray(history, np.int64))
    seen = seen[seen < len(scores)]
    result = scores.copy()
    result[seen] = np.where(result[seen] > 0, result[seen] / penalty, result[seen] * penalty)
    return result


def plain_filtered(scores, sampling):
    if 0 < sampling.top_k < len(scores):
        scores = plain_keep(scores, np.argsort(-scores, kind="stable")[: sampling.top_k])
    if sampling.top_p < 1:
        weights = np.exp(scores - scores.max())
        order = np.argsort(-scores, kind="stable")
        before = np.concatenate([[0.0], np.cumsum((weights / weights.sum())[order])[:-1]])
        scores = plain_keep(scores, order[before < sampling.top_p])
    if sampling.min_p > 0:
        scores = np.where(scores >= scores.max() + np.log(sampling.min_p), scores, -np.inf)
    return scores


def plain_keep(scores, ids):
    result = np.full_like(scores, -np.inf)
    result[ids] = scores[ids]
    return result


def plain_gumbel(size, seed, position):
    bits = np.random.Philox(key=np.array([seed, position], np.uint64)).random_raw(size)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))
