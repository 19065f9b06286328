"""Routed SwiGLU experts: every token goes to the k experts that its router scores highest (Shazeer et al., 2017).

    l = x Wr^T                                             scores of a token, [E]
    softmax:  chosen = the k largest l,             weights = softmax of the chosen l      (Mixtral, 2024)
    bias:     chosen = the k largest sigmoid(l) + b, weights = chosen sigmoid(l) over their sum     (DeepSeek-V3, 2024)
    y = f sum over the chosen of weight * expert(x) + shared(x)                             f: routed_scaling_factor
    shared_gate: sigmoid(x ws^T) shared(x) in its place                                     (Qwen3-Next, 2025)

norm_topk_prob off: weights are the chosen of softmax(l), or of sigmoid(l), as they are (DeepSeek-V2, 2024; OLMoE, 2024). With groups of
experts a token's come from its best ones only: those with the largest l, or with the largest sum of their two largest sigmoid(l) + b.

Equal scores: the lowest index. b only chooses; it has no gradient, `next_bias` moves it after the step. The softmax router is
kept even by two losses (Switch Transformer, 2021; ST-MoE, 2022), over all tokens N of a batch:

    balance = E sum_e f_e P_e,  f_e = share of the N k choices that e got, P_e = mean of softmax(l)_e;   1 at perfect balance
    z       = mean of logsumexp(l)^2
"""

import numpy as np

from smedjan_common.model.config import ModelConfig
from smedjan_common.reference import ffn
from smedjan_common.reference.activations import sigmoid


def forward(config: ModelConfig, params: dict[str, np.ndarray], x_BxTxD: np.ndarray, carried: dict) -> np.ndarray:
    """[B, T, D] -> [B, T, D], every token by itself; the router's scores [B, T, E] go on the list carried["router_logits"]."""
    logits_BxTxE = x_BxTxD @ params["router.weight"].T
    carried.setdefault("router_logits", []).append(logits_BxTxE)
    chosen_BxTxK, weights_BxTxK = route(config, logits_BxTxE, params.get("router.bias"))
    y = np.zeros_like(x_BxTxD)
    for expert in range(config.experts):
        weight_BxT = (weights_BxTxK * (chosen_BxTxK == expert)).sum(axis=-1)
        own = {f"{name}.weight": params[f"{name}.weight"][expert] for name in ("gate_proj", "up_proj", "down_proj")}
        y += weight_BxT[..., None] * ffn.forward(config, own, x_BxTxD, carried)
    if config.shared_experts:
        shared = {name.removeprefix("shared."): value for name, value in params.items() if name.startswith("shared.")}
        gate = sigmoid(x_BxTxD @ params["shared_gate.weight"].T) if config.shared_gate else 1.0
        y += gate * ffn.forward(config, shared, x_BxTxD, carried)
    return y


def route(config: ModelConfig, logits: np.ndarray, bias_E: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The experts chosen for each token, best first, and their weights, [..., k] both."""
    scores = within_groups(config, choice_scores(logits, bias_E))
    chosen = np.argsort(-scores, axis=-1, kind="stable")[..., : config.experts_per_token]
    picked, largest = np.take_along_axis(logits, chosen, axis=-1), logits.max(axis=-1, keepdims=True)
    weights = np.exp(picked - largest) if bias_E is None else sigmoid(picked)
    if config.norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    elif bias_E is None:
        weights = weights / np.exp(logits - largest).sum(axis=-1, keepdims=True)
    return chosen, config.routed_scaling_factor * weights


def choice_scores(logits: np.ndarray, bias_E: np.ndarray | None) -> np.ndarray:
    """What the choice goes by: the largest are taken."""
    return logits if bias_E is None else sigmoid(logits) + bias_E


def group_scores(config: ModelConfig, scores: np.ndarray) -> np.ndarray:
    """What the choice of groups goes by, [..., groups], of the scores of the choice of experts."""
    ranked = np.sort(scores.reshape(*scores.shape[:-1], config.expert_groups, -1), axis=-1)
    return ranked[..., -1] if config.router == "softmax" else ranked[..., -2:].sum(axis=-1)


def within_groups(config: ModelConfig, scores: np.ndarray) -> np.ndarray:
    """The scores of experts in the groups that a token takes; the others' are -inf."""
    if config.expert_groups_per_token == config.expert_groups:
        return scores
    order = np.argsort(-group_scores(config, scores), axis=-1, kind="stable")
    taken = np.zeros(order.shape, bool)
    np.put_along_axis(taken, order[..., : config.expert_groups_per_token], True, axis=-1)
    return np.where(np.repeat(taken, config.experts // config.expert_groups, axis=-1), scores, -np.inf)


def load(config: ModelConfig, chosen: np.ndarray) -> np.ndarray:
    """How many choices each expert got, [E]."""
    return np.bincount(chosen.ravel(), minlength=config.experts).astype(np.float64)


def balance_loss(config: ModelConfig, logits_NxE: np.ndarray) -> float:
    """E sum_e f_e P_e of one layer with the softmax router."""
    chosen, _ = route(config, logits_NxE, None)
    exponents = np.exp(logits_NxE - logits_NxE.max(axis=-1, keepdims=True))
    mean_probability_E = (exponents / exponents.sum(axis=-1, keepdims=True)).mean(axis=0)
    return float(config.experts * (load(config, chosen) / chosen.size * mean_probability_E).sum())


def router_z_loss(logits_NxE: np.ndarray) -> float:
    """Mean of logsumexp^2 of one layer."""
    largest = logits_NxE.max(axis=-1)
    return float(np.mean((largest + np.log(np.exp(logits_NxE - largest[:, None]).sum(axis=-1))) ** 2))


def next_bias(bias_E: np.ndarray, load_E: np.ndarray, rate: float) -> np.ndarray:
    """The bias after a step in which the experts got `load_E` choices: up by `rate` under the mean, down over it."""
    return bias_E + rate * np.sign(load_E.mean() - load_E)
