"""The whole model: embedding, pre-norm blocks, final norm, head.

    x = e embed[tokens]
    x = x + r mixer(rms_norm(x)); x = x + r ffn(rms_norm(x))    for every layer
    logits = rms_norm(x) / d head^T                              the head is the embedding, or a matrix of its own

e, r, d: embedding_multiplier, residual_multiplier, logits_divisor, which are 1 unless a model says otherwise (Granite 3, 2024).
norms: what is added may be normalised instead of what is read (post; OLMo 2, 2025), or both (sandwich).

Mixers and feed-forwards come from the rows of smedjan_common.model.mixers, so a new row needs its file beside this one and nothing here.
"""

import importlib
from types import ModuleType
from typing import NamedTuple

import numpy as np

from smedjan_common.model.config import ModelConfig
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import head_name
from smedjan_common.model.rope import settled
from smedjan_common.reference import experts
from smedjan_common.reference.loss import IGNORED, mean_cross_entropy, mean_kl, mean_z_loss, token_losses
from smedjan_common.reference.norm import rms_norm
from smedjan_common.training.config import TrainConfig
from smedjan_common.training.distillation import Mixed
from smedjan_common.training.objectives import OBJECTIVES, Rows

Params = dict[str, np.ndarray]


class Teacher(NamedTuple):
    """A model that another learns from, and the numbers of it."""

    config: ModelConfig
    params: Params
    mixed: Mixed


def forward(config: ModelConfig, params: Params, tokens_BxT: np.ndarray, documents_BxT: np.ndarray | None = None) -> np.ndarray:
    """Logits [B, T, padded V], float64."""
    return hidden(config, params, tokens_BxT, documents_BxT) @ as_float64(params[head_name(config)]).T


def hidden(config: ModelConfig, params: Params, tokens_BxT: np.ndarray, documents_BxT: np.ndarray | None = None) -> np.ndarray:
    """What the output head reads, [B, T, D], float64. With `documents_BxT` every document of a row is a sequence by itself."""
    if documents_BxT is None:
        return outputs(config, params, tokens_BxT)[0]
    config, rows = settled(config, tokens_BxT.shape[1]), zip(tokens_BxT, documents_BxT, strict=True)
    return np.stack([np.concatenate([outputs(config, params, piece)[0][0] for piece in _pieces(*row)]) for row in rows])


def outputs(config: ModelConfig, params: Params, tokens_BxT: np.ndarray) -> tuple[np.ndarray, dict]:
    """What the output head reads, and what the layers left beside it."""
    config = settled(config, tokens_BxT.shape[1])
    params = {name: as_float64(value) for name, value in params.items()}
    x, carried = config.embedding_multiplier * params["embed.weight"][tokens_BxT], {}
    for layer in range(config.layers):
        mixer, ffn, at = mixer_module(config, layer), ffn_module(config, layer), f"layers.{layer}."
        normed = _norm(config, params, f"{at}mixer_norm", x)
        mixed = mixer.forward(config.at(layer), under(params, f"{at}mixer."), normed, carried)
        x = x + config.residual_multiplier * _norm(config, params, f"{at}mixer_post_norm", mixed)
        normed = _norm(config, params, f"{at}ffn_norm", x)
        fed = ffn.forward(config, under(params, f"{at}ffn."), normed, carried)
        x = x + config.residual_multiplier * _norm(config, params, f"{at}ffn_post_norm", fed)
    return rms_norm(x, params["norm.weight"], config.norm_eps) / config.logits_divisor, carried


def router_logits(config: ModelConfig, params: Params, tokens_BxT: np.ndarray, documents_BxT: np.ndarray | None = None) -> list[np.ndarray]:
    """The scores [N, E] of all tokens, of each layer that routes."""
    config = settled(config, tokens_BxT.shape[1])
    rows = [] if documents_BxT is None else zip(tokens_BxT, documents_BxT, strict=True)
    pieces = [tokens_BxT] if documents_BxT is None else [piece for row in rows for piece in _pieces(*row)]
    scores = [outputs(config, params, piece)[1].get("router_logits", []) for piece in pieces]
    return [np.concatenate([piece.reshape(-1, config.experts) for piece in layer]) for layer in zip(*scores, strict=True)]


def _norm(config: ModelConfig, params: Params, name: str, x: np.ndarray) -> np.ndarray:
    """x normalised, where the model has such a norm."""
    weight = params.get(f"{name}.weight")
    return x if weight is None else rms_norm(x, weight, config.norm_eps)


def _pieces(tokens_T: np.ndarray, documents_T: np.ndarray) -> list[np.ndarray]:
    """The documents of a row, [1, t] each."""
    return [piece[None] for piece in np.split(tokens_T, np.flatnonzero(np.diff(documents_T)) + 1)]


def recurrent_forward(config: ModelConfig, params: Params, tokens_BxT: np.ndarray) -> np.ndarray:
    """The same logits, one token at a time through the mixers' recurrent form."""
    config = settled(config, tokens_BxT.shape[1])
    params = {name: as_float64(value) for name, value in params.items()}
    states = [mixer_module(config, layer).initial_state(config, len(tokens_BxT)) for layer in range(config.layers)]
    logits = []
    for tokens_B in tokens_BxT.T:
        x, carried = config.embedding_multiplier * params["embed.weight"][tokens_B], {}
        for layer in range(config.layers):
            mixer, ffn, at = mixer_module(config, layer), ffn_module(config, layer), f"layers.{layer}."
            normed = _norm(config, params, f"{at}mixer_norm", x)
            mixed, states[layer] = mixer.step(config.at(layer), under(params, f"{at}mixer."), normed, states[layer], carried)
            x = x + config.residual_multiplier * _norm(config, params, f"{at}mixer_post_norm", mixed)
            normed = _norm(config, params, f"{at}ffn_norm", x)
            fed = ffn.forward(config, under(params, f"{at}ffn."), normed[:, None], carried)[:, 0]
            x = x + config.residual_multiplier * _norm(config, params, f"{at}ffn_post_norm", fed)
        logits.append(rms_norm(x, params["norm.weight"], config.norm_eps) / config.logits_divisor @ params[head_name(config)].T)
    return np.stack(logits, axis=1)


def loss(
    config: ModelConfig, params: Params, inputs_BxT: np.ndarray, targets_BxT: np.ndarray, documents_BxT: np.ndarray | None = None
) -> float:
    """Mean cross-entropy over the counted tokens, nats."""
    return mean_cross_entropy(forward(config, params, inputs_BxT, documents_BxT), targets_BxT)


def objective(
    config: ModelConfig,
    train: TrainConfig,
    params: Params,
    inputs_BxT: np.ndarray,
    targets_BxT: np.ndarray,
    documents_BxT: np.ndarray | None = None,
    reference_BxM: np.ndarray | None = None,
    teacher: Teacher | None = None,
) -> float:
    """What training minimises: the loss of its objective over its units, mixed with what a teacher says, z_loss times the mean squared
    logsumexp of the logits, and the losses of routers."""
    logits, row = forward(config, params, inputs_BxT, documents_BxT), OBJECTIVES[train.objective]
    if row.formula is None:
        total = mean_cross_entropy(logits, targets_BxT)
        if teacher:
            taught, mixed = forward(teacher.config, teacher.params, inputs_BxT, documents_BxT), teacher.mixed
            total = mixed.loss(total, mean_kl(taught, logits, targets_BxT, mixed.known, mixed.temperature))
    else:
        rows = Rows(token_losses(logits, targets_BxT), targets_BxT, documents_BxT, reference_BxM)
        units = (targets_BxT != IGNORED).sum() if row.units is None else row.units(np, targets_BxT, documents_BxT, reference_BxM)
        total = float(row.formula(np, rows, train).loss) / max(int(units), 1)
    total += train.z_loss * mean_z_loss(logits, targets_BxT)
    if config.router == "softmax" and (targets_BxT != IGNORED).any():
        for logits_NxE in router_logits(config, params, inputs_BxT, documents_BxT):
            total += train.balance_loss * experts.balance_loss(config, logits_NxE) + train.router_z_loss * experts.router_z_loss(logits_NxE)
    return total


def mixer_module(config: ModelConfig, layer: int) -> ModuleType:
    """The definition of the mixer of a layer."""
    return importlib.import_module(f"smedjan_common.reference.{MIXERS[config.mixer_of(layer)].module}")


def ffn_module(config: ModelConfig, layer: int) -> ModuleType:
    """The definition of the feed-forward of a layer."""
    return importlib.import_module(f"smedjan_common.reference.{FFNS[config.ffn_of(layer)].module}")


def under(params: Params, prefix: str) -> Params:
    """The parameters whose names start with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def as_float64(value: np.ndarray) -> np.ndarray:
    """A float64 view or copy."""
    return np.asarray(value, dtype=np.float64)
