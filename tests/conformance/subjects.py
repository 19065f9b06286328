"""The sides of a comparison: JAX, MLX and the float64 reference, behind the few calls that the checks need.

A backend is used as its users use it: `Model`, the Backend protocol, `optim`. Its gradients are read out of a real training
step: with beta1 = 0 and no clipping Adam's first moment *is* the gradient. Compiled functions are kept for the session.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from smedjan_common.backend import Snapshot
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.params import parameter_table
from smedjan_common.reference import model as reference
from smedjan_common.training.schedule import learning_rate
from tests.conformance.cases import CHUNK

Params = dict[str, np.ndarray]
Batches = Sequence[tuple[np.ndarray, np.ndarray]]
BACKENDS = ("jax", "mlx")


class Run(NamedTuple):
    """A training run: one loss and gradient norm per step, and the final state on the host."""

    losses: list[float]
    grad_norms: list[float]
    tokens: list[float]
    snapshot: Snapshot


class Framework(NamedTuple):
    """What differs between the frameworks: arrays in, arrays out, gradients, compilation."""

    package: str
    backend: str
    array: Callable[[np.ndarray], Any]
    grad: Callable[[Callable], Callable]
    compile: Callable[[Callable], Callable]


@functools.cache
def framework(name: str) -> Framework:
    """The framework of a backend; ImportError where it is not installed."""
    if name == "jax":
        import jax
        import jax.numpy as jnp

        return Framework("smedjan_jax", "JaxBackend", jnp.asarray, jax.grad, jax.jit)
    import mlx.core as mx

    return Framework("smedjan_mlx", "MlxBackend", mx.array, mx.grad, lambda function: function)


def module(name: str, path: str) -> Any:
    """The module `path` of a backend's package."""
    return importlib.import_module(f"{framework(name).package}.{path}")


def on_device(name: str, tree: Any) -> Any:
    """Dicts of host arrays as the backend's arrays."""
    return {k: on_device(name, v) for k, v in tree.items()} if isinstance(tree, dict) else framework(name).array(tree)


def on_host(tree: Any) -> Any:
    """Dicts of a backend's float32 arrays as NumPy's."""
    return {k: on_host(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree)


def tensor_names(model: ModelConfig) -> set[str]:
    """Names of the tensors of a model."""
    return set(parameter_table(model))


def make_backend(name: str, model: ModelConfig, train: TrainConfig) -> Any:
    """A fresh backend of the protocol."""
    return getattr(module(name, "backend"), framework(name).backend)(model, train)


backend = functools.cache(make_backend)


@functools.cache
def _forward(name: str, model: ModelConfig, dtype: str, attention: str, chunk_size: int) -> Callable[[Params, Any, Any], Any]:
    model_class = module(name, "model").Model

    def forward(params: Params, tokens: Any, documents: Any) -> Any:
        built = model_class(model, params, dtype, attention, chunk_size=chunk_size)
        return built.head.logits(built.hidden(tokens, documents))

    return framework(name).compile(forward)


def logits(
    name: str,
    model: ModelConfig,
    params: Params,
    tokens: np.ndarray,
    dtype: str = "float32",
    attention: str = "plain",
    documents: np.ndarray | None = None,
    chunk_size: int = CHUNK,
) -> np.ndarray:
    """Logits [B, T, padded V] of a backend or of the reference."""
    if name == "reference":
        return reference.forward(model, params, tokens, documents)
    array = framework(name).array
    numbers = None if documents is None else array(documents)
    return np.asarray(_forward(name, model, dtype, attention, chunk_size)(on_device(name, params), array(tokens), numbers))


def loss_and_gradients(
    name: str,
    model: ModelConfig,
    train: TrainConfig,
    params: Params,
    batch: tuple[np.ndarray, np.ndarray],
    documents: np.ndarray | None = None,
) -> tuple[float, Params]:
    """Mean loss of one batch and the gradients of what is minimised, as the backend's training step sees them."""
    train = dataclasses.replace(train, optimizer="adamw", beta1=0.0, clip_norm=0.0)
    side = backend(name, model, train)
    state, metrics = side.train_step(side.init(params), *batch, lr=1e-3, documents=documents)
    moments = side.save(state).optimizer
    return side.read(metrics)["loss"], {name: np.asarray(moments[f"mu.{name}"]) for name in params if f"mu.{name}" in moments}


def train(name: str, model: ModelConfig, config: TrainConfig, start: Params | Snapshot, batches: Batches) -> Run:
    """Optimizer steps over `batches` from initial values or from a snapshot."""
    side = backend(name, model, config)
    first = start.step if isinstance(start, Snapshot) else 0
    state = side.restore(start) if isinstance(start, Snapshot) else side.init(start)
    rows = []
    for step, (inputs, targets) in enumerate(batches, first):
        state, metrics = side.train_step(state, inputs, targets, learning_rate(config, step))
        rows.append(side.read(metrics))
    return Run(*([row[key] for row in rows] for key in ("loss", "grad_norm", "tokens")), side.save(state))


@functools.cache
def _stepper(name: str, model: ModelConfig, dtype: str, max_len: int) -> Callable[[Params, Any, Any], tuple[Any, Any]]:
    model_class = module(name, "model").Model
    return framework(name).compile(lambda params, tokens, state: model_class(model, params, dtype, chunk_size=CHUNK).step(tokens, state))


def decode(name: str, model: ModelConfig, params: Params, chunks: Sequence[np.ndarray], max_len: int, dtype: str = "float32") -> np.ndarray:
    """Logits after each chunk of tokens [B, t], fed one after the other into a fresh decode state: [chunks, B, padded V]."""
    step, params = _stepper(name, model, dtype, max_len), on_device(name, params)
    state = module(name, "model").Model(model, params, dtype).init_state(len(chunks[0]), max_len)
    collected = []
    for chunk in chunks:
        out, state = step(params, framework(name).array(chunk), state)
        collected.append(np.asarray(out))
    return np.stack(collected)


@functools.cache
def _hidden_gradient(name: str, model: ModelConfig) -> Callable[[Params, Any, Any], Any]:
    model_class = module(name, "model").Model

    def output(embed: Any, params: Params, tokens: Any, weight_TxD: Any) -> Any:
        hidden = model_class(model, {**params, "embed.weight": embed}, "float32", "plain", chunk_size=CHUNK).hidden(tokens)
        return (hidden**2 * weight_TxD).sum()

    return framework(name).compile(framework(name).grad(output))


def hidden_gradient(name: str, model: ModelConfig, params: Params, tokens: np.ndarray, position: int) -> np.ndarray:
    """d (weighted sum of the squared outputs at `position`, before the head) / d embed.weight, [padded V, D]."""
    weight_TxD = np.zeros((tokens.shape[1], model.dim), np.float32)
    weight_TxD[position] = np.arange(1, model.dim + 1)
    array, params = framework(name).array, on_device(name, params)
    return np.asarray(_hidden_gradient(name, model)(params["embed.weight"], params, array(tokens), array(weight_TxD)))


@functools.cache
def _optimizer_step(name: str, model: ModelConfig, config: TrainConfig) -> Callable[..., Any]:
    optim = module(name, "optim")

    def step(params: Any, grads: Any, slots: Any, count: Any, lr: Any) -> Any:
        grads = optim.clip(grads, optim.global_norm(grads), config.clip_norm)
        return optim.update(model, config, params, grads, slots, count, lr)

    return framework(name).compile(step)


def optimizer_run(name: str, model: ModelConfig, config: TrainConfig, params: Params, gradients: Sequence[Params]) -> Snapshot:
    """Clipping and the optimizer alone, over the same gradients for every side."""
    step, params, array = _optimizer_step(name, model, config), on_device(name, params), framework(name).array
    slots = module(name, "optim").init(model, config, params)
    for count, grads in enumerate(gradients):
        rate = array(np.float32(learning_rate(config, count)))
        params, slots = step(params, on_device(name, grads), slots, array(np.int32(count)), rate)
    moments = {f"{slot}.{parameter}": value for slot, values in on_host(slots).items() for parameter, value in values.items()}
    return Snapshot(len(gradients), on_host(params), moments)
