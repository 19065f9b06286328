"""The decoder in JAX: embedding, pre-norm blocks, final norm, head.

    x = E[tokens];  x = x + mixer(norm(x));  x = x + ffn(norm(x));  logits = norm(x) E^T, or those of a head of its own

Multipliers of the embedding, of what is added and of the logits are 1 unless the model says otherwise.

`Model(config, params)` wraps a flat dict of arrays (names of smedjan_common.model.params) into Flax NNX modules. Building it
moves no data, so a step builds it anew inside its trace and differentiates with respect to the dict.

Shapes: B batch, T positions, D width, V padded vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.inference.chunks import positions_held
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.mixers.shared import Chunked
from smedjan_common.model.params import parameter_table
from smedjan_common.model.rope import settled
from smedjan_common.training.mesh import MeshShape
from smedjan_common.training.precision import PRECISIONS, compute_dtype, multiplied_in_float8
from smedjan_jax.ffn import ffn_class
from smedjan_jax.kernels import chosen, for_float8, for_norms
from smedjan_jax.mixers import mixer_class
from smedjan_jax.modules import Block, Carried, Context, Embedding, Linear, Params, RMSNorm, Rope

State = dict[str, Any]


class Model(nnx.Module):
    """A decoder-only language model.

    params: float32 arrays by name. dtype: a name of PRECISIONS. attention: auto, fused, plain or, in decoders, kernel. kernels: auto,
    pallas or plain.
    gradient_checkpointing: none keeps all activations, dots keeps matmul outputs, full keeps block inputs.
    chunk_size: positions that mixers of linear cost take at once. deterministic: gradients have the same bits every time on a GPU too.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        dtype: str = "float32",
        attention: str = "auto",
        gradient_checkpointing: str = "none",
        chunk_size: int = 64,
        deterministic: bool = False,
        kernels: str = "auto",
    ):
        self.config = config
        self.dtype = compute_dtype(dtype)
        self.gradient_checkpointing = gradient_checkpointing
        self.chunk_size = chunk_size
        self.deterministic = deterministic
        if deterministic and attention == "auto":
            attention = "reproducible"
        self.embed = Embedding(params, "embed")
        self.layers = nnx.List([_block(config, params, layer, attention, kernels, self.dtype) for layer in range(config.layers)])
        if PRECISIONS[dtype].float8:
            for _, module in nnx.iter_modules(self.layers):
                if isinstance(module, Linear):
                    module.float8 = "plain" if multiplied_in_float8(module.weight.shape) else ""
        self.norm = RMSNorm(params, "norm", config.norm_eps)
        self.head = self.embed if config.tied_head else Embedding(params, "head")

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next token at every position of int tokens [B, T], float32 [B, T, V]."""
        return self.head.logits(self.hidden(tokens))

    def hidden(self, tokens: jax.Array, documents: jax.Array | None = None) -> jax.Array:
        """What the head reads, [B, T, D] in the compute dtype. documents: int32 [B, T], see Context; nothing crosses their borders."""
        return self.outputs(tokens, documents)[0]

    def outputs(self, tokens: jax.Array, documents: jax.Array | None = None) -> tuple[jax.Array, Carried]:
        """What the head reads, and what the blocks left beside it (losses and loads of experts)."""
        context = Context(Rope(settled(self.config, tokens.shape[1]), tokens.shape[1]), None, documents, self.chunk_size)
        apply = CHECKPOINTED[self.gradient_checkpointing]
        x_BTD, carried = self._embedded(tokens, self.deterministic), {}
        for block in self.layers:
            x_BTD, carried = apply(block, x_BTD, context, carried)
        return self._read(x_BTD), carried

    def _embedded(self, tokens: jax.Array, deterministic: bool = False) -> jax.Array:
        """Where the residual stream begins, [B, T, D]."""
        x_BTD = self.embed(tokens, self.dtype, deterministic)
        e = self.config.embedding_multiplier
        return x_BTD if e == 1 else x_BTD * e

    def _read(self, x_BTD: jax.Array) -> jax.Array:
        """What the head reads: dividing it divides the logits."""
        d = self.config.logits_divisor
        return self.norm(x_BTD) if d == 1 else self.norm(x_BTD) / d

    def init_state(self, batch: int, max_len: int) -> State:
        """An empty decode state of `batch` rows for `max_len` positions: {"position" [B], "layers": [arrays by name, …]}."""
        layers = []
        for layer in range(self.config.layers):
            specs = MIXERS[self.config.mixer_of(layer)].state(self.config, batch, max_len)
            layers.append({s.name: jnp.zeros(s.shape, self.dtype if s.dtype == "compute" else s.dtype) for s in specs})
        return {"position": jnp.zeros(batch, jnp.int32), "layers": layers}

    def step(self, tokens: jax.Array, state: State, active: jax.Array | None = None, length: int | None = None) -> tuple[jax.Array, State]:
        """Consume T >= 1 new tokens of each row: logits after the last one, float32 [B, V], and the new state. Arguments as of `look`."""
        x_BTD, state = self._consume(tokens, state, active, length)
        return self.head.logits(self._read(x_BTD[:, -1:]))[:, 0], state

    def look(self, tokens: jax.Array, state: State, active: jax.Array | None = None, length: int | None = None) -> tuple[jax.Array, State]:
        """The same with the logits after each of them, float32 [B, T, V].

        active, length: as in Context. T is at most the positions that the state holds (smedjan_common.inference.chunks).
        """
        x_BTD, state = self._consume(tokens, state, active, length)
        return self.head.logits(self._read(x_BTD)), state

    def _consume(self, tokens: jax.Array, state: State, active: jax.Array | None, length: int | None) -> tuple[jax.Array, State]:
        """Through all blocks, [B, T, D], and the new state."""
        position, T = state["position"], tokens.shape[1]
        config = settled(self.config, positions_held(self.config, state["layers"]))
        context = Context(Rope(config, T, position), position, None, self.chunk_size, active, length)
        x_BTD, layers, carried = self._embedded(tokens), [], {}
        for layer, (block, before) in enumerate(zip(self.layers, state["layers"], strict=True)):
            x_BTD, after, carried = block.step(x_BTD, context, before, carried)
            layers.append(self._where_active(active, layer, before, after))
        return x_BTD, {"position": position + (T if active is None else T * active), "layers": layers}

    def _where_active(self, active: jax.Array | None, layer: int, before: State, after: State) -> State:
        """Arrays that sum up the positions change in active rows only; mixers see to those by position themselves."""
        if active is None:
            return after
        summed = {spec.name for spec in MIXERS[self.config.mixer_of(layer)].state(self.config, 1, 1) if spec.axis is None}
        rows = {name: active.reshape(-1, *[1] * (after[name].ndim - 1)) for name in summed}
        return {**after, **{name: jnp.where(rows[name], after[name], before[name]) for name in summed}}


def folded(model: Model, train: TrainConfig, mesh: MeshShape) -> Model:
    """The model of a training step: where that is worth it, with the norms of its blocks in the matrices that read them, and with the
    kernels of float8."""
    if for_norms(model.config, train, mesh.size):
        for block in model.layers:
            block.fold()
    if for_float8(train, mesh.size):
        for _, module in nnx.iter_modules(model.layers):
            if isinstance(module, Linear) and module.float8:
                module.float8 = "pallas"
    return model


def linear_weights(config: ModelConfig) -> set[str]:
    """Names of the weights of linear maps, which are used in the compute dtype only."""
    shapes = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in parameter_table(config).items()}
    modules = nnx.iter_modules(Model(config, shapes))  # type: ignore[arg-type]
    return {".".join(map(str, (*path, "weight"))) for path, module in modules if isinstance(module, Linear)}


def _block(config: ModelConfig, params: Params, layer: int, attention: str, kernels: str, dtype: str) -> Block:
    at, row = f"layers.{layer}", MIXERS[config.mixer_of(layer)]
    implementation = attention
    if row.training is Chunked:
        implementation = chosen(row.name, kernels, config, dtype)
    return Block(
        {name: RMSNorm(params, f"{at}.{name}", config.norm_eps) for name in config.block_norms},
        mixer_class(row.name)(config.at(layer), params, f"{at}.mixer", implementation),
        ffn_class(config.ffn_of(layer))(config, params, f"{at}.ffn"),
        config.residual_multiplier,
    )


def _apply(block: Block, x_BTD: jax.Array, context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
    return block(x_BTD, context, carried)


CHECKPOINTED = {
    "none": _apply,
    "dots": jax.checkpoint(_apply, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": jax.checkpoint(_apply),
}
