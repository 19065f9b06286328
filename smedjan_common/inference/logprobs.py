"""Log-probabilities of tokens from logits, on the host: natural, of the model's own distribution, in float64."""

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[..., V] -> log-probabilities, float64 [..., V]."""
    scores = np.asarray(logits, np.float64)
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def most_probable(logprobs: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most probable of [V] as (id, log-probability), ties to the smaller id."""
    count = min(count, len(logprobs))
    if not count:
        return ()
    least = np.partition(logprobs, len(logprobs) - count)[len(logprobs) - count]
    ids = np.flatnonzero(logprobs >= least)
    best = ids[np.lexsort((ids, -logprobs[ids]))][:count]
    return tuple((int(token), float(logprobs[token])) for token in best)
