"""The MLX backend: compiled training, evaluation and decoding over flat dicts of arrays (protocol: smedjan_common.backend).

One compilation per shape, on GPUs; on a CPU mx.compile calls a C++ compiler for half a minute and gains nothing, so steps
run as they are.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from smedjan_common.backend import LESS_TO_SCORE, Device, Metrics, Scores, Snapshot, State
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import ConfigError
from smedjan_common.inference.pieces import logits_in_pieces, scores_in_pieces
from smedjan_common.machine import peak_memory
from smedjan_common.model.adapters import adapter_table, is_frozen, trained_table, with_adapters
from smedjan_common.model.flops import peak_flops
from smedjan_common.model.params import head_name, require_tree
from smedjan_common.training.mesh import ONE_DEVICE, MeshShape, check_mesh, check_mesh_of
from smedjan_common.training.objectives import OBJECTIVES, Counts, Rows
from smedjan_common.training.optimizers import EMA, check_state
from smedjan_common.training.precision import check_precision
from smedjan_mlx import adapters, experts, kernels, optim, spread
from smedjan_mlx.decoder import MlxDecoder
from smedjan_mlx.distillation import distilled_cross_entropy
from smedjan_mlx.guard import guarded
from smedjan_mlx.loss import cross_entropy, forward_loss, token_losses
from smedjan_mlx.model import Model
from smedjan_mlx.precision import exact_float32, on_gpu
from smedjan_mlx.quantized import weight_of
from smedjan_mlx.scores import logits, scores
from smedjan_mlx.teacher import Teacher
from smedjan_mlx.weights import decoding_weights

Batch = tuple[Any, Any, Any, Any]  # inputs, targets, documents (or None), [B, T] each, and reference (or None), [B, M]


class MlxBackend:
    """Trains and decodes one model with MLX on the default device, the only one that it takes."""

    name = "mlx"

    def __init__(self, model: ModelConfig, train: TrainConfig, mesh: MeshShape | None = ONE_DEVICE):
        exact_float32()
        check_mesh_of(self.name, mesh)
        check_precision(self.name, train.dtype)
        if train.dtype != "float32" and not on_gpu():
            why = "MLX multiplies bfloat16 on a CPU value by value, a hundred times slower."
            raise ConfigError(f"--dtype {train.dtype} needs a GPU with MLX.", why, "Take --dtype float32.")
        self.model, self.train = model, train
        self._kernels = kernels.summary(train.kernels, model, train.dtype)
        self.own = None  # the neutral checkpoint is MLX's own
        self._mesh = MeshShape(data=spread.parts())
        check_mesh(self._mesh, model, train.batch_size, train.grad_accum)
        self.rows = _own_rows(train) if self._mesh.size > 1 else None
        self._trained = frozenset(adapter_table(model, train.adapters) if train.adapters else trained_table(model, None))
        self._frozen_head = is_frozen(model, train.adapters, head_name(model))
        compiled: Callable[[Callable], Callable] = mx.compile if on_gpu() else lambda function: function
        self._compiled, self._teacher = compiled, cast(Teacher | None, None)
        self._train_step, self._part = self._compiled_step()
        self._finish = compiled(self._apply)
        self._eval_step = compiled(self._evaluate)
        self._each_loss = compiled(self._token_losses)
        self._hidden = compiled(lambda params, inputs, documents: self._model(params).hidden(inputs, documents))

    def describe(self) -> Device:
        info = mx.device_info()
        name = str(info.get("device_name", info.get("architecture", "unknown")))
        metal = "max_recommended_working_set_size" in info  # what Metal lets a process have of the machine's memory
        memory = info.get("max_recommended_working_set_size", info.get("total_memory"))
        versions = {package: importlib.metadata.version(package) for package in ("mlx", "numpy")}
        among = {"mesh": str(self._mesh), "visible": self._mesh.size, "hosts": self._mesh.size, "kernels": self._kernels}
        if not on_gpu():
            return Device("mlx", "cpu", name, self._mesh.size, versions=versions, **among)
        known = self._mesh.size, int(memory) if memory else None, peak_flops(name), versions
        return Device("mlx", "gpu", name, *known, shares_memory=metal, **among)

    def meet(self, wait: Callable[[], object]) -> None:
        wait()
        mx.eval(spread.total(mx.ones(1)))

    def init(self, params: dict[str, np.ndarray]) -> State:
        params = with_adapters(self.model, self.train.adapters, params, self.train.seed)
        device_params = {name: mx.array(np.asarray(value, np.float32)) for name, value in params.items()}
        state = {"params": device_params, "slots": optim.init(self.model, self.train, device_params), "step": mx.array(0, mx.int32)}
        mx.eval(state)
        return state

    def restore(self, snapshot: Snapshot) -> State:
        check_state(self.model, self.train.optimizer, snapshot.optimizer, self.train.ema, self.train.adapters)
        state = self.init(snapshot.params)
        slots = {slot: {n: mx.array(snapshot.optimizer[f"{slot}.{n}"]) for n in tensors} for slot, tensors in state["slots"].items()}
        return {"params": state["params"], "slots": slots, "step": mx.array(snapshot.step, mx.int32)}

    def learn_from(self, teacher: ModelConfig, params: dict[str, Any], known: int) -> None:
        require_tree(teacher, params)
        weights = guarded(decoding_weights, teacher, params, self.train.dtype, False)
        self._teacher = Teacher(teacher, self.train, weights, known)
        self._train_step, self._part = self._compiled_step()

    def train_step(
        self,
        state: State,
        inputs: np.ndarray,
        targets: np.ndarray,
        lr: float,
        documents: np.ndarray | None = None,
        reference: np.ndarray | None = None,
        stop: int = 0,
    ) -> tuple[State, Metrics]:
        step = self._split_step if self.train.grad_accum > 1 else self._train_step
        batch = _on_device(inputs, targets, documents, reference)
        said = {"stop": spread.largest(mx.array(stop, mx.int32))} if self._mesh.size > 1 else {}
        mx.async_eval(said)
        new, metrics = guarded(step, state, batch, mx.array(lr, mx.float32), *self._taught())
        metrics |= said
        state.clear()  # the last reference to the old arrays: their memory is used for the new ones
        guarded(mx.async_eval, new, metrics)
        return new, metrics

    def eval_step(
        self,
        state: State,
        inputs: np.ndarray,
        targets: np.ndarray,
        documents: np.ndarray | None = None,
        reference: np.ndarray | None = None,
    ) -> Metrics:
        batch = _on_device(*map(spread.own, (inputs, targets, documents, reference)))
        metrics = guarded(self._eval_step, _averaged(state), batch)
        guarded(mx.async_eval, metrics)
        return metrics

    def token_losses(
        self, params: dict[str, Any], inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None = None
    ) -> np.ndarray:
        batch = _on_device(*map(spread.own, (inputs, targets, documents, None)))
        return guarded(lambda: np.array(spread.all_rows(self._each_loss(self.place(params), batch))))

    def read(self, metrics: Metrics) -> dict[str, Any]:
        guarded(mx.eval, metrics)
        return {name: value.tolist() if value.ndim else float(value.item()) for name, value in metrics.items()}

    def save(self, state: State) -> Snapshot:
        guarded(mx.eval, state)
        optimizer = {f"{slot}.{name}": np.array(value) for slot, tensors in state["slots"].items() for name, value in tensors.items()}
        params = {name: np.array(value) for name, value in state["params"].items() if name in self._trained}
        return Snapshot(int(state["step"].item()), params, optimizer)

    def params_of(self, state: State) -> dict[str, Any]:
        params = _averaged(state)
        return adapters.merged(self.model, self.train.adapters, params) if self.train.adapters else params

    def place(self, params: dict[str, Any]) -> dict[str, Any]:
        return {name: value if isinstance(value, mx.array) else mx.array(value) for name, value in params.items()}

    def score(
        self, params: dict[str, Any], inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None = None, top: int = 0
    ) -> Scores:
        params, vocab = self.place(params), self.model.vocab_size
        head = weight_of(params, head_name(self.model))
        hidden = guarded(self._hidden, params, *_on_device(inputs, documents), fix=LESS_TO_SCORE)

        def piece(places: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, ...]:
            return tuple(map(np.array, scores(hidden, head, mx.array(places), mx.array(chosen), vocab, top)))

        return guarded(scores_in_pieces, targets, vocab, top, piece, fix=LESS_TO_SCORE)

    def logits(self, params: dict[str, Any], inputs: np.ndarray) -> np.ndarray:
        params, vocab = self.place(params), self.model.vocab_size
        head = weight_of(params, head_name(self.model))
        hidden = guarded(self._hidden, params, *_on_device(inputs, None), fix=LESS_TO_SCORE)

        def piece(places: np.ndarray) -> np.ndarray:
            return np.array(logits(hidden, head, mx.array(places), vocab))

        return guarded(logits_in_pieces, inputs.shape, vocab, piece, fix=LESS_TO_SCORE)

    def decoder(self, params: dict[str, Any], max_len: int, rows: int = 1) -> MlxDecoder:
        return MlxDecoder(self.model, params, self.train.dtype, max_len, rows)

    def peak_memory(self) -> int | None:
        return mx.get_peak_memory() if on_gpu() else peak_memory()

    def _compiled_step(self) -> tuple[Callable, Callable]:
        """A step of (state, batch, lr), and of what `_taught` gives; and the loss and gradients of a part of one."""
        return self._compiled(self._step), self._compiled(self._gradients)

    def _taught(self) -> tuple[dict[str, mx.array], ...]:
        """The weights of the teacher, where there is one."""
        return (self._teacher.params,) if self._teacher else ()

    def _model(self, params: dict[str, mx.array], gradient_checkpointing: str = "none") -> Model:
        train = self.train
        options = gradient_checkpointing, train.chunk_size, train.deterministic, train.kernels
        return Model(self.model, params, train.dtype, train.attention, *options)

    def _loss(
        self, params: dict[str, mx.array], batch: Batch, counts: tuple[mx.array, mx.array], *taught: dict[str, mx.array]
    ) -> tuple[mx.array, Metrics]:
        """What is minimised, and what is reported. Both add up over the parts of a step: `counts` are those of the whole step.

        taught: the weights of the teacher, where there is one.
        """
        inputs, targets, documents, _ = batch
        params = adapters.adapted(self.model, self.train.adapters, params)
        hidden, carried = self._model(params, self.train.gradient_checkpointing).outputs(inputs, documents)
        counted = Counts(*counts)
        objective, told = self._head(hidden, params[head_name(self.model)], batch, counted, *taught)
        share = spread.batch_mean(mx.sum(targets >= 0) / counted.tokens)
        objective = objective / counted.tokens + share * experts.auxiliary_loss(self.train, carried)
        return objective, {**told, **experts.measured(self.model, carried, share)}

    def _head(
        self, hidden: mx.array, head: mx.array, batch: Batch, counts: Counts, *taught: dict[str, mx.array]
    ) -> tuple[mx.array, Metrics]:
        """What is minimised, over a token of the step, and the objective's share of what is reported."""
        inputs, targets, documents, reference = batch
        row, z_loss = OBJECTIVES[self.train.objective], self.train.z_loss
        if self._teacher:
            given, mixed = self._teacher.read(taught[0], inputs, documents), self._teacher.mixed
            objective, ce, kl = distilled_cross_entropy(hidden, head, targets, given, mixed, z_loss, self._frozen_head)
            return objective, {name: value / counts.tokens for name, value in mixed.told(ce, kl).items()}
        if row.formula is None:
            objective, loss = cross_entropy(hidden, head, targets, z_loss, frozen=self._frozen_head)
            return objective, {"loss": loss / counts.tokens}
        nll = token_losses(mx.stop_gradient(hidden), mx.stop_gradient(head), targets)
        weighed = row.formula(mx, Rows(nll, targets, documents, reference), self.train)
        weights = weighed.weights * (counts.tokens / counts.units)
        objective, _ = cross_entropy(hidden, head, targets, z_loss, weights, self._frozen_head)
        return objective, {name: value / counts.units for name, value in {"loss": weighed.loss, **weighed.metrics}.items()}

    def _counts(self, batch: Batch) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        """The tokens of a step that count, and what its means are over: at least 1."""
        tokens, of_objective = spread.totals((mx.sum(batch[1] >= 0), self._units(*batch[1:])))
        whole, units = (mx.maximum(count, 1).astype(mx.float32) for count in (tokens, of_objective))
        return tokens, (whole, units)

    def _gradients(self, params: dict[str, mx.array], batch: Batch, counts: tuple[mx.array, mx.array], *taught: dict[str, mx.array]) -> Any:
        """What `_loss` gives, and gradients of what is trained."""
        trained = {name: value for name, value in params.items() if name in self._trained}
        frozen = {name: value for name, value in params.items() if name not in self._trained}
        return mx.value_and_grad(lambda moving: self._loss({**frozen, **moving}, batch, counts, *taught))(trained)

    def _step(self, state: State, batch: Batch, lr: mx.array, *taught: dict[str, mx.array]) -> tuple[State, Metrics]:
        tokens, counts = self._counts(batch)
        (_, metrics), grads = self._gradients(state["params"], batch, counts, *taught)
        return self._apply(state, metrics, grads, tokens, lr)

    def _split_step(self, state: State, batch: Batch, lr: mx.array, *taught: dict[str, mx.array]) -> tuple[State, Metrics]:
        """A step over `grad_accum` parts; each token weighs the same. Parts are evaluated one by one to bound memory."""
        (tokens, counts), parts = self._counts(batch), self.train.grad_accum
        total: list[Any] = []
        for part in zip(*([None] * parts if array is None else mx.split(array, parts) for array in batch), strict=True):
            (_, metrics), grads = self._part(state["params"], part, counts, *taught)
            total = tree_map(mx.add, total, [metrics, grads]) if total else [metrics, grads]
            mx.async_eval(total)
        return self._finish(state, total[0], total[1], tokens, lr)

    def _apply(self, state: State, metrics: Metrics, grads: dict[str, mx.array], tokens: mx.array, lr: mx.array) -> tuple[State, Metrics]:
        metrics, grads = spread.totals((metrics, grads))
        norm = optim.global_norm(grads)
        grads = optim.clip(grads, norm, self.train.clip_norm)
        params, slots = optim.update(self.model, self.train, state["params"], grads, state["slots"], state["step"], lr)
        if not self.train.adapters:
            params = experts.move_biases(self.model, params, metrics, self.train.router_bias_rate * (tokens > 0))
        metrics = {**experts.summarised(self.model, metrics), "grad_norm": norm, "tokens": tokens}
        return {"params": params, "slots": slots, "step": state["step"] + 1}, metrics

    def _evaluate(self, params: dict[str, mx.array], batch: Batch) -> Metrics:
        inputs, targets, documents, reference = batch
        params = adapters.adapted(self.model, self.train.adapters, params)
        hidden = self._model(params).hidden(inputs, documents)
        head, tokens = params[head_name(self.model)], mx.sum(targets >= 0)
        row = OBJECTIVES[self.train.objective]
        if row.formula is None:
            return spread.totals({"loss_sum": forward_loss(hidden, head, targets), "tokens": tokens})
        weighed = row.formula(mx, Rows(token_losses(hidden, head, targets), targets, documents, reference), self.train)
        found = {"loss_sum": weighed.loss, "tokens": tokens, "units": self._units(targets, documents, reference), **weighed.metrics}
        return spread.totals(found)

    def _token_losses(self, params: dict[str, mx.array], batch: Batch) -> mx.array:
        inputs, targets, documents, _ = batch
        return token_losses(self._model(params).hidden(inputs, documents), params[head_name(self.model)], targets)

    def _units(self, targets: mx.array, documents: mx.array | None, reference: mx.array | None) -> mx.array:
        """How many units of the objective the loss of these rows is a sum over."""
        units = OBJECTIVES[self.train.objective].units
        return mx.sum(targets >= 0) if units is None else units(mx, targets, documents, reference)


def _averaged(state: State) -> dict[str, Any]:
    """The parameters in a state, those that are averaged (--ema) as their averages."""
    return {**state["params"], **state["slots"].get(EMA, {})}


def _own_rows(train: TrainConfig) -> np.ndarray:
    """The rows of this host: of each part of a step its share of the rows that one process would take for it."""
    every = np.arange(train.batch_size).reshape(train.grad_accum, -1)
    return np.concatenate([spread.own(part) for part in every])


def default_dtype() -> str:
    """bfloat16 on a GPU, float32 on a CPU."""
    exact_float32()
    return "bfloat16" if on_gpu() else "float32"


def _on_device(*arrays: np.ndarray | None) -> tuple[Any, ...]:
    return tuple(None if array is None else mx.array(array) for array in arrays)
