"""The JAX backend: compiled training, evaluation and decoding over flat dicts of arrays (protocol: smedjan_common.backend).

One compilation per shape; the train state is donated, so a step updates it in place. On several devices the same functions run
on each device's rows of the batch (smedjan_jax.sharding).
"""

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smedjan_common.backend import LESS_TO_SCORE, Device, Metrics, Scores, Snapshot, State
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.inference.pieces import logits_in_pieces, scores_in_pieces
from smedjan_common.machine import peak_memory
from smedjan_common.model.adapters import adapter_table, is_frozen, trained_table, with_adapters
from smedjan_common.model.flops import peak_flops
from smedjan_common.model.mixers.mla import rope_dim
from smedjan_common.model.params import head_name, parameter_table, require_tree
from smedjan_common.training.mesh import ONE_DEVICE, MeshShape, check_mesh
from smedjan_common.training.objectives import OBJECTIVES, Counts, Rows
from smedjan_common.training.optimizers import EMA, check_state
from smedjan_common.training.precision import PRECISIONS, compute_dtype
from smedjan_jax import adapters, experts, held, kernels, optim, sharding
from smedjan_jax.checkpoint import Orbax
from smedjan_jax.decoder import JaxDecoder, decoder_class
from smedjan_jax.distillation import distilled_cross_entropy
from smedjan_jax.float8 import refuse_float8
from smedjan_jax.guard import guarded
from smedjan_jax.loss import cross_entropy, cross_entropy_by_kernel, forward_loss, token_losses
from smedjan_jax.mixers.attention import refuse_fused
from smedjan_jax.model import Model, folded, linear_weights
from smedjan_jax.quantized import weight_of
from smedjan_jax.scores import logits, scores
from smedjan_jax.startup import configure
from smedjan_jax.teacher import Teacher, placed

Batch = tuple[Any, Any, Any, Any]  # inputs, targets, documents (or None), [B, T] each, and reference (or None), [B, M]


class JaxBackend:
    """Trains and decodes one model with JAX. mesh: how it is spread over devices; None: the batch over all GPUs.

    shapes: the train state's arrays as ShapeDtypeStructs, each with the sharding that says where it lies.
    """

    name = "jax"

    def __init__(self, model: ModelConfig, train: TrainConfig, mesh: MeshShape | None = ONE_DEVICE):
        configure(train.deterministic)
        self.model, self.train = model, train
        self.mesh = sharding.default_shape(train) if mesh is None else mesh
        check_mesh(self.mesh, model, train.batch_size, train.grad_accum)
        self._kernels = self._choose_kernels()
        by_kernel = kernels.for_loss(train.kernels, model.padded_vocab_size, compute_dtype(train.dtype), self.mesh.tensor)
        self._cross_entropy = cross_entropy_by_kernel if by_kernel else cross_entropy
        self._frozen_head = is_frozen(model, train.adapters, head_name(model))
        self._devices = sharding.make_mesh(self.mesh)
        self._table = trained_table(model, train.adapters)
        self._trained = frozenset(adapter_table(model, train.adapters) if train.adapters else self._table)
        self.shapes = self._state_shapes()
        self.own = Orbax(self.shapes)
        self._hidden = jax.jit(lambda params, inputs, documents: self._model(params).hidden(inputs, documents))
        self._teacher: Teacher | None = None
        self._teacher_spread: sharding.Spread | None = None
        self._scores = jax.jit(scores, static_argnames=("vocab", "top"))
        self._logits = jax.jit(logits, static_argnames="vocab")
        self._own_rows = sharding.OwnRows(self._devices, train.batch_size) if jax.process_count() > 1 else None
        self.rows = self._own_rows.of(sharding.deal(np.arange(train.batch_size), self.mesh, train.grad_accum)) if self._own_rows else None
        places, own = self.shardings, parameter_table(model)
        merge = functools.partial(adapters.merged, model, train.adapters) if train.adapters else None
        whole_model = {name: places["params"][name] for name in own}
        self._merge = jax.jit(merge, out_shardings=whole_model) if merge else None
        if self.mesh.size == 1:
            self._spread = self._spread_whole = None
            self._eval_step = jax.jit(self._evaluate)
            self._each_loss = jax.jit(self._token_losses)
        else:
            again = train.gradient_checkpointing != "full"
            self._spread = self._spread_of(model, again, self._table, self._trained)
            self._spread_whole = self._spread_of(model, again) if train.adapters else self._spread
            whole, rows = sharding.everywhere(self._devices), sharding.rows(self._devices)
            self._eval_step = jax.jit(self._evaluate, in_shardings=(places["params"], rows), out_shardings=whole)
            each = self._spread_whole.rows(self._token_losses)
            found = whole if self._own_rows else rows  # every host asks for all of them
            self._each_loss = jax.jit(each, in_shardings=(whole_model, rows), out_shardings=found)
        self._train_step = self._compiled_step()

    def _choose_kernels(self) -> str:
        """What computes the layers, in words; "auto" asks the device first which kernels are right there."""
        model, train, dtype = self.model, self.train, compute_dtype(self.train.dtype)
        if train.kernels == "auto":
            held.ask(model, dtype, train.seq_len)
            if kernels.for_float8(train, self.mesh.size):
                held.float8(dtype)
        attention = "reproducible" if train.deterministic and train.attention == "auto" else train.attention
        told = kernels.summary(train.kernels, model, dtype), kernels.blocks_summary(attention, model, dtype, train.seq_len)
        return ", ".join(filter(None, told))

    @property
    def shardings(self) -> State:
        """Where each array of the train state lies."""
        return jax.tree.map(lambda shape: shape.sharding, self.shapes)

    def describe(self) -> Device:
        device = jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
        kind = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
        peak = peak_flops(device.device_kind)
        seen = str(self.mesh), len(jax.devices())
        return Device(
            "jax", kind, device.device_kind, self.mesh.size, limit, peak, versions, *seen, hosts=jax.process_count(), kernels=self._kernels
        )

    def meet(self, wait: Callable[[], object]) -> None:
        sums = sharding.sums_over_hosts(self._devices)
        wait()
        sums()

    def init(self, params: dict[str, np.ndarray]) -> State:
        params = with_adapters(self.model, self.train.adapters, params, self.train.seed)
        places = self.shardings
        if self._own_rows:  # what comes from Orbax is in its place already
            here = {name: value for name, value in params.items() if isinstance(value, jax.Array)}
            there = {name: np.asarray(value, np.float32) for name, value in params.items() if name not in here}
            device_params = here | sharding.place(there, {name: places["params"][name] for name in there})
            init = functools.partial(optim.init, self.model, self.train)
            slots = jax.jit(init, out_shardings=places["slots"])(device_params)
            return {"params": device_params, "slots": slots, "step": sharding.place(np.zeros((), np.int32), places["step"])}
        device_params = sharding.place({name: np.asarray(value, np.float32) for name, value in params.items()}, places["params"])
        slots = jax.tree.map(jax.device_put, optim.init(self.model, self.train, device_params), places["slots"])
        return {"params": device_params, "slots": slots, "step": sharding.place(np.zeros((), np.int32), places["step"])}

    def restore(self, snapshot: Snapshot) -> State:
        check_state(self.model, self.train.optimizer, snapshot.optimizer, self.train.ema, self.train.adapters)
        places = self.shardings
        slots = {slot: {n: snapshot.optimizer[f"{slot}.{n}"] for n in tensors} for slot, tensors in places["slots"].items()}
        return sharding.place({"params": snapshot.params, "slots": slots, "step": np.array(snapshot.step, np.int32)}, places)

    def learn_from(self, teacher: ModelConfig, params: dict[str, Any], known: int) -> None:
        require_tree(teacher, params)
        check_mesh(self.mesh, teacher, self.train.batch_size, self.train.grad_accum)
        if self.train.kernels == "auto":
            held.ask(teacher, compute_dtype(self.train.dtype), self.train.seq_len)
        self._teacher_spread = self._spread_of(teacher, again=False) if self._spread else None
        self._teacher = Teacher(teacher, self.train, guarded(placed, teacher, self.train, params, self._devices), known)
        self._train_step = self._compiled_step()

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
        batch = inputs, targets, documents, reference
        if self._own_rows:
            said = sharding.each_device(self._devices, stop)
            return guarded(self._train_step, state, self._own_rows.spread(batch), np.float32(lr), said, *self._taught())
        batch = sharding.deal(batch, self.mesh, self.train.grad_accum)
        return guarded(self._train_step, state, batch, np.float32(lr), *self._taught())

    def eval_step(
        self,
        state: State,
        inputs: np.ndarray,
        targets: np.ndarray,
        documents: np.ndarray | None = None,
        reference: np.ndarray | None = None,
    ) -> Metrics:
        return guarded(self._eval_step, _averaged(state), self._own_part((inputs, targets, documents, reference)))

    def token_losses(
        self, params: dict[str, Any], inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None = None
    ) -> np.ndarray:
        batch = self._own_part((inputs, targets, documents, None))
        return guarded(lambda: jax.device_get(self._each_loss(params, batch)))

    def read(self, metrics: Metrics) -> dict[str, Any]:
        return {name: value.tolist() if value.ndim else float(value) for name, value in guarded(jax.device_get, metrics).items()}

    def save(self, state: State) -> Snapshot:
        params = {name: value for name, value in state["params"].items() if name in self._trained}
        state = {**state, "params": params}
        if self._own_rows and not all(array.is_fully_replicated for array in jax.tree.leaves(state)):
            whole = sharding.everywhere(self._devices)
            params, slots = self.own.tensors(jax.tree.map(lambda array: sharding.Gathered(array, whole), state))
            return Snapshot(int(state["step"]), params, slots, shared=True)
        host = guarded(jax.device_get, state)
        optimizer = {f"{slot}.{name}": value for slot, tensors in host["slots"].items() for name, value in tensors.items()}
        return Snapshot(int(host["step"]), host["params"], optimizer)

    def params_of(self, state: State) -> dict[str, Any]:
        params = _averaged(state)
        return guarded(self._merge, params) if self._merge else params

    def place(self, params: dict[str, Any]) -> dict[str, Any]:
        if self._spread:  # what comes from Orbax is in its place already
            there = {name: np.asarray(value, np.float32) for name, value in params.items() if not isinstance(value, jax.Array)}
            places = {name: self.shardings["params"][name] for name in there}
            return guarded(lambda: params | sharding.place(there, places), fix=LESS_TO_SCORE)
        return guarded(lambda: {name: jnp.asarray(value) for name, value in params.items()}, fix=LESS_TO_SCORE)

    def score(
        self, params: dict[str, Any], inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None = None, top: int = 0
    ) -> Scores:
        hidden, vocab = guarded(self._hidden, params, inputs, documents, fix=LESS_TO_SCORE), self.model.vocab_size
        head = weight_of(params, head_name(self.model))

        def piece(places: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, ...]:
            return jax.device_get(self._scores(hidden, head, places, chosen, vocab=vocab, top=top))

        return guarded(scores_in_pieces, targets, vocab, top, piece, fix=LESS_TO_SCORE)

    def logits(self, params: dict[str, Any], inputs: np.ndarray) -> np.ndarray:
        hidden, vocab = guarded(self._hidden, params, inputs, None, fix=LESS_TO_SCORE), self.model.vocab_size
        head = weight_of(params, head_name(self.model))

        def piece(places: np.ndarray) -> np.ndarray:
            return np.asarray(self._logits(hidden, head, places, vocab=vocab))

        return guarded(logits_in_pieces, inputs.shape, vocab, piece, fix=LESS_TO_SCORE)

    def decoder(self, params: dict[str, Any], max_len: int, rows: int = 1) -> JaxDecoder:
        return decoder_class(self.train.kernels)(self.model, params, compute_dtype(self.train.dtype), max_len, rows)

    def peak_memory(self) -> int | None:
        if self._devices.local_devices[0].platform == "cpu":
            return peak_memory()
        return max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in self._devices.local_devices) or None

    def _own_part(self, batch: Any) -> Any:
        """A batch that every host knows whole, of several hosts as one of which each has its rows."""
        if not self._own_rows:
            return batch
        own = sharding.OwnRows(self._devices, len(batch[0]))
        return own.spread(jax.tree.map(own.of, batch))

    def _state_shapes(self) -> State:
        """Every array of the optimizer lies where its parameter lies."""
        places, whole = sharding.param_shardings(self._table, self._devices), sharding.everywhere(self._devices)
        params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in self._table.items()}
        slots = jax.eval_shape(functools.partial(optim.init, self.model, self.train), params)

        def placed(tensors: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
            return {name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=places[name]) for name, array in tensors.items()}

        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        return {"params": placed(params), "slots": {slot: placed(tensors) for slot, tensors in slots.items()}, "step": step}

    def _spread_of(
        self, model: ModelConfig, again: bool, table: sharding.Table | None = None, trained: frozenset[str] | None = None
    ) -> sharding.Spread:
        table = table or parameter_table(model)
        return sharding.Spread(table, self._devices, linear_weights(model), compute_dtype(self.train.dtype), again, trained)

    def _compiled_step(self) -> Any:
        """A step of (state, batch, lr), of what the hosts say where there are several, and of what `_taught` gives."""
        if self.mesh.size == 1:
            return jax.jit(self._step, donate_argnums=0)
        whole, rows, places = sharding.everywhere(self._devices), sharding.rows(self._devices), self.shardings
        taught = (sharding.param_shardings(parameter_table(self._teacher.config), self._devices),) if self._teacher else ()
        step, said = (self._step_of_hosts, (None,)) if self._own_rows else (self._step, ())
        return jax.jit(step, in_shardings=(places, rows, whole, *said, *taught), out_shardings=(places, whole), donate_argnums=0)

    def _taught(self) -> tuple[dict[str, jax.Array], ...]:
        """The weights of the teacher, where there is one."""
        return (self._teacher.params,) if self._teacher else ()

    def _model(self, params: dict[str, jax.Array], gradient_checkpointing: str = "none") -> Model:
        train = self.train
        options = gradient_checkpointing, train.chunk_size, train.deterministic, train.kernels
        return Model(self.model, params, train.dtype, train.attention, *options)

    def _whole(self, params: dict[str, jax.Array]) -> dict[str, Any]:
        """The parameters as the modules take them."""
        return adapters.adapted(self.model, self.train.adapters, self._spread.gather(params) if self._spread else params)

    def _loss(self, params: dict[str, jax.Array], batch: Batch, counts: Counts, *taught: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        """What is minimised, and what is reported. Both add up over the parts of a step: `counts` are those of the whole step.

        taught: the weights of the teacher, where there is one.
        """
        inputs, targets, documents, _ = batch
        params = self._whole(params)
        hidden, carried = folded(self._model(params, self.train.gradient_checkpointing), self.train, self.mesh).outputs(inputs, documents)
        objective, told = self._head(hidden, params[head_name(self.model)], batch, counts, *taught)
        share = jnp.sum(targets >= 0) / counts.tokens
        objective = objective / counts.tokens + share * experts.auxiliary_loss(self.train, carried)
        return objective, {**told, **experts.measured(self.model, carried, share)}

    def _head(
        self, hidden: jax.Array, head: jax.Array, batch: Batch, counts: Counts, *taught: dict[str, jax.Array]
    ) -> tuple[jax.Array, Metrics]:
        """What is minimised, over a token of the step, and the objective's share of what is reported."""
        inputs, targets, documents, reference = batch
        row, z_loss = OBJECTIVES[self.train.objective], self.train.z_loss
        if self._teacher:
            weights, mixed = taught[0], self._teacher.mixed
            given = self._teacher.read(self._teacher_spread.gather(weights) if self._teacher_spread else weights, inputs, documents)
            objective, ce, kl = distilled_cross_entropy(hidden, head, targets, given, mixed, z_loss, self._frozen_head)
            return objective, {name: value / counts.tokens for name, value in mixed.told(ce, kl).items()}
        if row.formula is None:
            objective, loss = self._cross_entropy(hidden, head, targets, z_loss, frozen=self._frozen_head)
            return objective, {"loss": loss / counts.tokens}
        nll = token_losses(jax.lax.stop_gradient(hidden), jax.lax.stop_gradient(head), targets)
        weighed = row.formula(jnp, Rows(nll, targets, documents, reference), self.train)
        weights = weighed.weights * (counts.tokens / counts.units)
        objective, _ = self._cross_entropy(hidden, head, targets, z_loss, weights, self._frozen_head)
        return objective, {name: value / counts.units for name, value in {"loss": weighed.loss, **weighed.metrics}.items()}

    def _gradients(self, params: dict[str, jax.Array], batch: Batch, counts: Counts, *taught: dict[str, jax.Array]):
        """Gradients of what is trained and what is reported, summed over the `grad_accum` parts of a batch; each token weighs the same."""
        trained = {name: value for name, value in params.items() if name in self._trained}
        frozen = {name: value for name, value in params.items() if name not in self._trained}
        parts, gradients = self.train.grad_accum, jax.grad(lambda moving, *rest: self._loss({**frozen, **moving}, *rest), has_aux=True)
        if parts == 1:
            return gradients(trained, batch, counts, *taught)

        def add(carry, part):
            return jax.tree.map(jnp.add, carry, gradients(trained, part, counts, *taught)), None

        split = jax.tree.map(lambda x: x.reshape(parts, -1, x.shape[1]), batch)
        sums = jax.eval_shape(gradients, trained, jax.tree.map(lambda x: x[0], split), counts, *taught)
        return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums), split)[0]

    def _step(self, state: State, batch: Batch, lr: jax.Array, *taught: dict[str, jax.Array]) -> tuple[State, Metrics]:
        tokens = jnp.sum(batch[1] >= 0)
        gradients = self._gradients
        if self._spread:
            beside = (self._teacher_spread.params,) if self._teacher_spread else ()
            gradients = self._spread.gradients(gradients, *beside)
        units = self._units(*batch[1:])
        counts = Counts(*(jnp.maximum(count, 1).astype(jnp.float32) for count in (tokens, units)))
        grads, metrics = gradients(state["params"], batch, counts, *taught)
        norm = optim.global_norm(grads)
        grads = optim.clip(grads, norm, self.train.clip_norm)
        params, slots = optim.update(self.model, self.train, state["params"], grads, state["slots"], state["step"], lr)
        if not self.train.adapters:
            params = experts.move_biases(self.model, params, metrics, self.train.router_bias_rate * (tokens > 0))
        metrics = {**experts.summarised(self.model, metrics), "grad_norm": norm, "tokens": tokens}
        return {"params": params, "slots": slots, "step": state["step"] + 1}, metrics

    def _step_of_hosts(
        self, state: State, batch: Batch, lr: jax.Array, said: jax.Array, *taught: dict[str, jax.Array]
    ) -> tuple[State, Metrics]:
        """A step, and the largest of what the hosts said."""
        state, metrics = self._step(state, batch, lr, *taught)
        return state, {**metrics, "stop": jnp.max(said)}

    def _evaluate(self, params: dict[str, jax.Array], batch: Batch) -> Metrics:
        return (self._spread.sums(self._evaluate_rows) if self._spread else self._evaluate_rows)(params, batch)

    def _evaluate_rows(self, params: dict[str, jax.Array], batch: Batch) -> Metrics:
        inputs, targets, documents, reference = batch
        params = self._whole(params)
        hidden = self._model(params).hidden(inputs, documents)
        head, tokens = params[head_name(self.model)], jnp.sum(targets >= 0)
        row = OBJECTIVES[self.train.objective]
        if row.formula is None:
            return {"loss_sum": forward_loss(hidden, head, targets), "tokens": tokens}
        weighed = row.formula(jnp, Rows(token_losses(hidden, head, targets), targets, documents, reference), self.train)
        return {"loss_sum": weighed.loss, "tokens": tokens, "units": self._units(targets, documents, reference), **weighed.metrics}

    def _token_losses(self, params: dict[str, jax.Array], batch: Batch) -> jax.Array:
        inputs, targets, documents, _ = batch
        params = self._spread_whole.gather(params) if self._spread_whole else params
        return token_losses(self._model(params).hidden(inputs, documents), params[head_name(self.model)], targets)

    def _units(self, targets: jax.Array, documents: jax.Array | None, reference: jax.Array | None) -> jax.Array:
        """How many units of the objective the loss of these rows is a sum over."""
        units = OBJECTIVES[self.train.objective].units
        return jnp.sum(targets >= 0) if units is None else units(jnp, targets, documents, reference)


def training_backend(model: ModelConfig, train: TrainConfig, mesh: MeshShape | None = ONE_DEVICE) -> JaxBackend:
    """The backend of a run. Raises ConfigError where --attention fused or --dtype float8 cannot run, as the first step would find."""
    if PRECISIONS[train.dtype].float8:
        refuse_float8()
    if train.attention == "fused":
        sizes = {"attention": model.head_dim, "mla": model.head_dim + rope_dim(model)}
        for name in sizes.keys() & set(model.mixer):
            refuse_fused(jax.ShapeDtypeStruct((1, 1, model.heads, sizes[name]), compute_dtype(train.dtype)))
    return JaxBackend(model, train, mesh)


def _averaged(state: State) -> dict[str, Any]:
    """The parameters in a state, those that are averaged (--ema) as their averages."""
    return {**state["params"], **state["slots"].get(EMA, {})}


def default_dtype() -> str:
    """bfloat16 on a GPU, float32 on a CPU."""
    configure()
    return "bfloat16" if jax.default_backend() == "gpu" else "float32"
