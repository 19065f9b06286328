"""The JAX backend: compiled training, evaluation and decoding over flat dicts of arrays (protocol: smedjan_common.backend).

One compilation per shape; the train state is donated, so a step updates it in place.
"""

import functools
import importlib.metadata
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smedjan_common.backend import Device, Metrics, Snapshot, State, power_of_two_chunks
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import OutOfMemoryError
from smedjan_common.flops import peak_flops
from smedjan_jax import optim
from smedjan_jax.loss import cross_entropy, forward_loss
from smedjan_jax.model import Model

Batch = tuple[Any, Any, Any]  # inputs, targets, documents (or None), [B, T] each

# measured on an H100 (PERFORMANCE.md): cuBLAS beats XLA's Triton matmuls by 8-11 % at every size
XLA_FLAGS = ("--xla_gpu_enable_triton_gemm=false",)


class JaxBackend:
    """Trains and decodes one model with JAX on the default device."""

    name = "jax"

    def __init__(self, model: ModelConfig, train: TrainConfig):
        configure()
        self.model, self.train = model, train
        self._train_step = jax.jit(self._step, donate_argnums=0)
        self._eval_step = jax.jit(self._evaluate)

    def describe(self) -> Device:
        device = jax.devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
        kind = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
        return Device("jax", kind, device.device_kind, 1, limit, peak_flops(device.device_kind), versions)  # a run uses one device

    def init(self, params: dict[str, np.ndarray]) -> State:
        # copies: a step updates its state in place, and on a CPU JAX may share a NumPy array's memory
        device_params = {name: jnp.array(value, jnp.float32, copy=True) for name, value in params.items()}
        return {"params": device_params, "slots": optim.init(self.train, device_params), "step": jnp.zeros((), jnp.int32)}

    def restore(self, snapshot: Snapshot) -> State:
        state = self.init(snapshot.params)
        slots = {slot: {n: jnp.array(snapshot.optimizer[f"{slot}.{n}"], copy=True) for n in state["params"]} for slot in state["slots"]}
        return {"params": state["params"], "slots": slots, "step": jnp.asarray(snapshot.step, jnp.int32)}

    def train_step(
        self, state: State, inputs: np.ndarray, targets: np.ndarray, lr: float, documents: np.ndarray | None = None
    ) -> tuple[State, Metrics]:
        return _guarded(self._train_step, state, (inputs, targets, documents), np.float32(lr))

    def eval_step(self, state: State, inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None = None) -> Metrics:
        return _guarded(self._eval_step, state["params"], (inputs, targets, documents))

    def read(self, metrics: Metrics) -> dict[str, float]:
        return {name: float(value) for name, value in _guarded(jax.device_get, metrics).items()}

    def save(self, state: State) -> Snapshot:
        host = _guarded(jax.device_get, state)
        optimizer = {f"{slot}.{name}": value for slot, tensors in host["slots"].items() for name, value in tensors.items()}
        return Snapshot(int(host["step"]), host["params"], optimizer)

    def params_of(self, state: State) -> dict[str, Any]:
        return state["params"]

    def decoder(self, params: dict[str, Any], max_len: int) -> "JaxDecoder":
        return JaxDecoder(self.model, params, self.train.dtype, max_len)

    def peak_memory(self) -> int | None:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def _model(self, params: dict[str, jax.Array], gradient_checkpointing: str = "none") -> Model:
        train = self.train
        return Model(self.model, params, train.dtype, train.attention, gradient_checkpointing, train.chunk_size)

    def _loss(self, params: dict[str, jax.Array], batch: Batch, tokens: jax.Array) -> tuple[jax.Array, Metrics]:
        """What is minimised, and what is reported. Both add up over the parts of a step: `tokens` are those of the whole step."""
        inputs, targets, documents = batch
        hidden = self._model(params, self.train.gradient_checkpointing).hidden(inputs, documents)
        objective, loss = cross_entropy(hidden, params["embed.weight"], targets, self.train.z_loss)
        return objective / tokens, {"loss": loss / tokens}

    def _gradients(self, params: dict[str, jax.Array], batch: Batch, tokens: jax.Array):
        """Gradients and what is reported of the whole batch, summed over `grad_accum` parts; each token weighs the same."""
        parts, gradients = self.train.grad_accum, jax.grad(self._loss, has_aux=True)
        if parts == 1:
            return gradients(params, batch, tokens)

        def add(carry, part):
            return jax.tree.map(jnp.add, carry, gradients(params, part, tokens)), None

        split = jax.tree.map(lambda x: x.reshape(parts, -1, x.shape[1]), batch)
        sums = jax.eval_shape(gradients, params, jax.tree.map(lambda x: x[0], split), tokens)
        return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums), split)[0]

    def _step(self, state: State, batch: Batch, lr: jax.Array) -> tuple[State, Metrics]:
        tokens = jnp.sum(batch[1] >= 0)
        grads, metrics = self._gradients(state["params"], batch, jnp.maximum(tokens, 1).astype(jnp.float32))
        norm = optim.global_norm(grads)
        grads = optim.clip(grads, norm, self.train.clip_norm)
        params, slots = optim.update(self.model, self.train, state["params"], grads, state["slots"], state["step"], lr)
        return {"params": params, "slots": slots, "step": state["step"] + 1}, {**metrics, "grad_norm": norm, "tokens": tokens}

    def _evaluate(self, params: dict[str, jax.Array], batch: Batch) -> Metrics:
        inputs, targets, documents = batch
        hidden = self._model(params).hidden(inputs, documents)
        return {"loss_sum": forward_loss(hidden, params["embed.weight"], targets), "tokens": jnp.sum(targets >= 0)}


class JaxDecoder:
    """Decodes one sequence. Prompts are fed in chunks whose lengths are powers of two, so few shapes are compiled."""

    largest_chunk = 512

    def __init__(self, model: ModelConfig, params: dict[str, Any], dtype: str, max_len: int):
        self.model, self.dtype, self.max_len = model, dtype, max_len
        self._params = {name: jnp.asarray(value) for name, value in params.items()}
        self._compiled = _decode_step(model, dtype, max_len)
        self.reset()

    def reset(self) -> None:
        self._state = Model(self.model, self._params, self.dtype).init_state(1, self.max_len)

    def feed(self, ids: list[int]) -> np.ndarray:
        logits = None
        for chunk in power_of_two_chunks(ids, self.largest_chunk):
            logits, self._state = _guarded(self._compiled, self._params, np.asarray([chunk], np.int32), self._state)
        return np.asarray(logits)[0, : self.model.vocab_size]


@functools.lru_cache(maxsize=8)
def _decode_step(model: ModelConfig, dtype: str, max_len: int) -> Callable:
    """The compiled step of decoding; decoders of the same model share it, so a run's samples compile once."""

    def step(params: dict[str, jax.Array], tokens: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        return Model(model, params, dtype).step(tokens, state, max_len)

    return jax.jit(step, donate_argnums=2)


def default_dtype() -> str:
    """bfloat16 on a GPU, float32 on a CPU."""
    configure()
    return "bfloat16" if jax.default_backend() == "gpu" else "float32"


def configure() -> None:
    """Settings that must stand before JAX starts its device: XLA flags, memory share, compilation cache. Idempotent.

    What the user's environment says already is left alone.
    """
    given = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in XLA_FLAGS if flag.split("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if jax.default_backend() == "gpu" and not jax.config.values["jax_compilation_cache_dir"]:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "smedjan" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))


def _guarded(function: Callable, *args: Any) -> Any:
    """Call and turn XLA's out-of-memory error into ours."""
    try:
        return function(*args)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fix = "Lower --batch-size, raise --grad-accum, or add --gradient-checkpointing full."
        raise OutOfMemoryError("The device ran out of memory.", str(error).splitlines()[0][:200].rstrip(".") + ".", fix) from error
