"""Routed SwiGLU experts: every token goes to the k experts that its router scores highest (Shazeer et al., 2017).

    l = x Wr^T                                             scores of a token, [E]
    softmax:  chosen = the k largest l,             weights = softmax of the chosen l      (Mixtral, 2024)
    bias:     chosen = the k largest sigmoid(l) + b, weights = chosen sigmoid(l) over their sum     (DeepSeek-V3, 2024)
    y = sum over the chosen of weight * expert(x) + shared(x)

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
        y += ffn.forward(config, shared, x_BxTxD, carried)
    return y


def route(config: ModelConfig, logits: np.ndarray, bias_E: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The experts chosen for each token, best first, and their weights, [..., k] both."""
    chosen = np.argsort(-choice_scores(logits, bias_E), axis=-1, kind="stable")[..., : config.experts_per_token]
    picked = np.take_along_axis(logits, chosen, axis=-1)
    weights = np.exp(picked - picked.max(axis=-1, keepdims=True)) if bias_E is None else sigmoid(picked)
    return chosen, weights / weights.sum(axis=-1, keepdims=True)


def choice_scores(logits: np.ndarray, bias_E: np.ndarray | None) -> np.ndarray:
    """What the choice goes by: the largest are taken."""
    return logits if bias_E is None else sigmoid(logits) + bias_E


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
