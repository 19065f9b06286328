"""RWKV-7's time mix (Peng et al., 2025, "RWKV-7 Goose"): the delta rule with a decay per channel.

    S_t = S_{t-1} Diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,  o_t = S_t r_t,  a = -kk, b = kk * rate

The equations of the projections stand in smedjan_common/reference/rwkv.py. Every layer has this project's feed-forward
beside it, as other mixers have, and not RWKV's channel mix. The heads are of --rwkv-head-dim, whatever --heads says.

A chunk of C positions at once, G the running sum of log w in it (Gx without the position's own):

    R, A, K, B = r e^G, a e^Gx, k e^-G, b e^-G
    X = (I - lower(A B^T))^-1;  U = X lower(A K^T) V;  W = X A          lower: below the diagonal, on it too for R
    o = lower(R K^T) V + lower(R B^T) U + (R + lower(R B^T) W) S^T
    S' = (S + S W^T B + V^T K + U^T B) e^G_C

Since -0.607 < log w < 0, no exponent exceeds 0.607 C: 78 for the largest chunk, 128, and float32 ends at 88. (To count G from the
middle of the chunk would halve that, and let the future into the rounding of the past.)

Shapes: B batch, T positions, D width, H heads, K = V head size, C chunk; in a chunk [N, B, H, C, K].
"""

import jax
import jax.numpy as jnp
from flax import nnx

from smedjan_common.config import ModelConfig
from smedjan_jax.kernels import SHORTEST, around
from smedjan_jax.mixers.chunks import borders, cut, join, matmul, running_sum, scan_states
from smedjan_jax.mixers.triangular import unit_lower_inverse
from smedjan_jax.modules import Carried, Context, Linear, Params, State
from smedjan_jax.sharding import over_tensor

Arrays = tuple[jax.Array, ...]

DECAY = 0.6065306597126334  # e^-1/2
GROUP_NORM_EPS = 64e-5
LARGEST_CHUNK = 128


class Rwkv(nnx.Module):
    """The mixer `rwkv`: token shift, projections, delta rule, group norm, gate, output projection."""

    def __init__(self, config: ModelConfig, params: Params, name: str, implementation: str = "auto"):
        def vectors(*names: str) -> list:
            return [nnx.data(params[f"{name}.{each}"]) for each in names]

        def linears(*names: str) -> list[Linear]:
            return [Linear(params, f"{name}.{each}") for each in names]

        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = vectors("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
        self.w0, self.a0, self.k_k, self.k_a, self.r_k = vectors("w0", "a0", "k_k", "k_a", "r_k")
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = linears("r_proj", "k_proj", "v_proj", "o_proj")
        self.w1, self.w2, self.a1, self.a2, self.g1, self.g2 = linears("w1", "w2", "a1", "a2", "g1", "g2")
        self.first = f"{name}.v0" not in params
        if not self.first:
            (self.v0,), (self.v1, self.v2) = vectors("v0"), linears("v1", "v2")
        # the token shift blends each feature by itself, so a factor of it may come after
        self.reads = ("r_proj", "k_proj", "v_proj", "w1", "a1", "g1", *([] if self.first else ["v1"]))
        self.ln_x = GroupNorm(params, f"{name}.ln_x")
        self.head_dim, self.implementation = config.rwkv_head_dim, implementation

    def __call__(self, x: jax.Array, context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
        """Training: all positions at once."""
        return self.mix(self.project(x, context), context, carried)

    def project(self, x: jax.Array, context: Context) -> Arrays:
        """r, k, v and what makes decay, rate, gate and (after the first layer) blend of v, all [B, T, D], of x [B, T, D]."""
        if around(self.implementation, context.position):
            from smedjan_jax.kernels import shift

            if not all(_simple(each) for each in self._narrow()):
                mu = jnp.stack([self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g])
                return self._linears(shift.token_shift(x, mu, context.documents))
            pair, *blends = shift.paired(x, jnp.stack([self.x_r, self.x_k, self.x_v]), context.documents)
            return self._by_pairs(pair, *blends)
        return self._project(x, token_shift(x, None, context.documents))

    def mix(self, projected: Arrays, context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
        """What `project` gave, mixed over the positions and projected back to [B, T, D]."""
        if around(self.implementation, context.position):
            return self._by_kernels(projected, context.documents, carried)
        arrays, gate, carried = self._prepare(projected, carried)
        B, T, H, K = arrays[0].shape
        state = jnp.zeros((B, H, K, K), jnp.float32)
        chunk = min(context.chunk_size, LARGEST_CHUNK, T)
        if self.implementation == "pallas":
            o, _ = self._kernel(arrays, state, context.documents)
        else:
            core = jax.checkpoint(dplr_delta_rule, static_argnums=(3,))  # its C x C matrices would be the largest part of the memory
            o, _ = core(arrays, state, context.documents, chunk)
        return self._output(o, arrays, gate), carried

    def step(self, x: jax.Array, context: Context, state: State, carried: Carried) -> tuple[jax.Array, State, Carried]:
        """Decoding: T new tokens after those that made the state: `shift`, the last one's x [B, D], and `S` [B, H, V, K]."""
        arrays, gate, carried = self._prepare(self._project(x, token_shift(x, state["shift"], None)), carried)
        if self.implementation == "pallas" and x.shape[1] >= SHORTEST:
            o, S = self._kernel(arrays, state["S"], None)
        elif x.shape[1] == 1:
            o, S = _one(arrays, state["S"])
        else:
            o, S = dplr_delta_rule(arrays, state["S"], None, min(context.chunk_size, LARGEST_CHUNK, x.shape[1]))
        return self._output(o, arrays, gate), {"shift": x[:, -1], "S": S}, carried

    def _kernel(self, arrays: Arrays, state: jax.Array, documents: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        from smedjan_jax.kernels import channel_decay

        return over_tensor(channel_decay.dplr_delta_rule, (arrays, state, documents), (2, 1, None), (2, 1))

    def _by_kernels(self, projected: Arrays, documents: jax.Array | None, carried: Carried) -> tuple[jax.Array, Carried]:
        """`mix` with what surrounds the core in kernels too: the same equations as `_prepare` and `_output`."""
        from smedjan_jax.kernels import channel_decay
        from smedjan_jax.kernels.rows import rowwise

        r, k, v, decay, rate, gate, *blend = (self._heads(x) for x in projected)
        dtype = v.dtype
        if self.first:
            carried = {**carried, "v_first": v}
        else:
            v, first = rowwise(_blended, (v, carried["v_first"], blend[0]), (self._by_head(self.v0),), (dtype,), through=1)
            carried = {**carried, "v_first": first}
        vectors = tuple(self._by_head(x) for x in (self.w0, self.a0, self.k_k, self.k_a, self.r_k))
        prepare = channel_decay.Prepare(_log_decay, _prepared, 1)
        o, bonus, v = channel_decay.prepared_delta_rule((decay, r, k, rate), vectors, v, documents, prepare)
        vectors = self._by_head(self.ln_x.weight), self._by_head(self.ln_x.bias)
        (y,) = rowwise(_gated, (o, v, gate, bonus), vectors, (dtype,))
        return self.o_proj(y.reshape(*y.shape[:2], -1)), carried

    def _narrow(self) -> list[Linear]:
        """The first factors of what makes decay, rate, gate and (after the first layer) blend of v."""
        return [self.w1, self.a1, self.g1, *([] if self.first else [self.v1])]

    def _by_pairs(self, pair: jax.Array, x_r: jax.Array, x_k: jax.Array, x_v: jax.Array) -> Arrays:
        """What `_linears` gives; the narrow products of x and what it changes by, [B, T, 2 D], in one matmul (kernels/shift.py)."""
        weights = [linear.weight for linear in self._narrow()]
        blends = zip(weights, (self.x_w, self.x_a, self.x_g, self.x_v), strict=False)
        joined = jnp.concatenate([jnp.concatenate([weight, weight * mu], axis=1) for weight, mu in blends]).astype(pair.dtype)
        ends = [sum(weight.shape[0] for weight in weights[: i + 1]) for i in range(len(weights) - 1)]
        decay, rate, gate, *blend = jnp.split(pair @ joined.T, ends, axis=-1)
        wide = self.w2(jnp.tanh(decay)), self.a2(rate), self.g2(jax.nn.sigmoid(gate)), *(self.v2(each) for each in blend)
        return self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v), *wide

    def _by_head(self, vector: jax.Array) -> jax.Array:
        return vector.reshape(-1, self.head_dim)

    def _project(self, x: jax.Array, previous: jax.Array) -> Arrays:
        shift = previous - x
        return self._linears(tuple(x + shift * mu.astype(x.dtype) for mu in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)))

    def _linears(self, blends: Arrays) -> Arrays:
        x_r, x_w, x_k, x_v, x_a, x_g = blends
        decay, rate = self.w2(jnp.tanh(self.w1(x_w))), self.a2(self.a1(x_a))
        gate = self.g2(jax.nn.sigmoid(self.g1(x_g)))
        blend = () if self.first else (self.v2(self.v1(x_v)),)
        return self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v), decay, rate, gate, *blend

    def _prepare(self, projected: Arrays, carried: Carried) -> tuple[Arrays, jax.Array, Carried]:
        """The arrays r, log w, k, v, a, b of the recurrence [B, T, H, K], the gate [B, T, D], and v_first for later layers."""
        r, k, v, decay, rate, gate, *blend = projected
        log_decay = -DECAY * jax.nn.sigmoid(self.w0 + decay.astype(jnp.float32))
        rate = jax.nn.sigmoid(self.a0 + rate.astype(jnp.float32))
        if self.first:
            carried = {**carried, "v_first": v}
        else:
            wide, first = v.astype(jnp.float32), carried["v_first"].astype(jnp.float32)
            v = (wide + (first - wide) * jax.nn.sigmoid(self.v0 + blend[0].astype(jnp.float32))).astype(v.dtype)
        wide = k.astype(jnp.float32)
        kk = self._heads(wide * self.k_k)
        kk = kk * jax.lax.rsqrt(jnp.maximum(jnp.sum(kk * kk, axis=-1, keepdims=True), 1e-24))
        k = (wide * (1 + (rate - 1) * self.k_a)).astype(k.dtype)
        heads = (self._heads(each) for each in (r, log_decay, k, v))
        return (*heads, -kk, kk * self._heads(rate)), gate, carried

    def _heads(self, x: jax.Array) -> jax.Array:
        B, T, D = x.shape
        return x.reshape(B, T, D // self.head_dim, self.head_dim)

    def _output(self, o: jax.Array, arrays: Arrays, gate: jax.Array) -> jax.Array:
        r, _, k, v, _, _ = (each.astype(jnp.float32) for each in arrays)
        bonus = jnp.sum(r * k * self.r_k, axis=-1, keepdims=True) * v
        y = self.ln_x(o.astype(jnp.float32)) + bonus.reshape(gate.shape)
        return self.o_proj((y * gate.astype(jnp.float32)).astype(gate.dtype))


def _simple(linear: Linear) -> bool:
    """Whether it is one whole matrix of plain numbers."""
    return isinstance(linear.weight, jax.Array) and linear.bias is None and linear.lora_a is None and not linear.float8


def _log_decay(row: jax.Array, parameters: list[jax.Array]) -> jax.Array:
    """log w [R, K] of rows of a head (kernels/channel_decay.py)."""
    from smedjan_jax.kernels.special import sigmoid

    return -DECAY * sigmoid(parameters[0] + row)


def _prepared(rows: list[jax.Array], parameters: list[jax.Array]) -> Arrays:
    """r, k, a, b [R, K] and the bonus [R] of rows of a head (kernels/channel_decay.py)."""
    from smedjan_jax.kernels.special import rsqrt, sigmoid
    from smedjan_jax.kernels.tiles import in_columns

    (r, k, rate), (a0, k_k, k_a, r_k) = rows, parameters
    rate = sigmoid(a0 + rate)
    kk = k * k_k
    kk = kk * in_columns(rsqrt(jnp.maximum(jnp.sum(kk * kk, axis=1), 1e-24)), kk)
    k = k * (1 + (rate - 1) * k_a)
    return r, k, -kk, kk * rate, jnp.sum(r * k * r_k, axis=1)


def _blended(tiles: list[jax.Array], parameters: list[jax.Array], valid: jax.Array) -> Arrays:
    """v of a later layer, of rows [R, K] of a head (kernels/rows.py)."""
    from smedjan_jax.kernels.special import sigmoid
    from smedjan_jax.kernels.tiles import in_rows

    v, first, blend = tiles
    return (v + (first - v) * sigmoid(in_rows(parameters[0], v) + blend),)


def _gated(tiles: list[jax.Array], parameters: list[jax.Array], valid: jax.Array) -> Arrays:
    """The core's outputs, normalised, with the bonus [R], times the gate, of rows [R, K] of a head (kernels/rows.py)."""
    from smedjan_jax.kernels.special import rsqrt
    from smedjan_jax.kernels.tiles import in_columns, in_rows

    o, v, gate, bonus = tiles
    weight, bias = (in_rows(each, o) for each in parameters)
    size = jnp.sum(valid.astype(jnp.float32))
    centred = jnp.where(valid[None, :], o - in_columns(jnp.sum(o, axis=1) / size, o), 0.0)
    normed = centred * in_columns(rsqrt(jnp.sum(centred * centred, axis=1) / size + GROUP_NORM_EPS), o)
    return ((normed * weight + bias + in_columns(bonus, v) * v) * gate,)


class GroupNorm(nnx.Module):
    """Every head of [B, T, H, V] normalised by itself, in float32, times a weight [D] plus a bias [D] (Wu & He, 2018)."""

    def __init__(self, params: Params, name: str):
        self.weight, self.bias = nnx.data(params[f"{name}.weight"]), nnx.data(params[f"{name}.bias"])

    def __call__(self, x: jax.Array) -> jax.Array:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + GROUP_NORM_EPS)
        return normed.reshape(*x.shape[:2], -1) * self.weight + self.bias


def token_shift(x: jax.Array, last: jax.Array | None, documents: jax.Array | None) -> jax.Array:
    """The position before each of x [B, T, D]; before the first stands `last` [B, D] or zeros, and zeros before each document's first."""
    first = jnp.zeros_like(x[:, :1]) if last is None else last[:, None].astype(x.dtype)
    previous = jnp.concatenate([first, x[:, :-1]], axis=1)
    if documents is None:
        return previous
    before = jnp.concatenate([documents[:, :1], documents[:, :-1]], axis=1)
    return jnp.where((before == documents)[..., None], previous, 0)


def dplr_delta_rule(arrays: Arrays, state: jax.Array, documents: jax.Array | None, C: int) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, V] in float32 and the state after the last position, in chunks of C <= 128 (the equations stand above).

    arrays: r, log w, k, v, a, b, [B, T, H, K] each; state [B, H, V, K] float32; documents [B, T]. Matmuls in the dtype of r.
    """
    T, dtype = arrays[0].shape[1], arrays[0].dtype
    r, log_decay, k, v, a, b = (cut(each.astype(jnp.float32), C) for each in arrays)
    same, reads, writes, keeps = borders(documents, C)
    upto = same & jnp.tril(jnp.ones((C, C), bool))
    total = running_sum(log_decay, upto)
    up, down, end = jnp.exp(total), jnp.exp(-total), jnp.exp(total[..., -1:, :])
    r, a, k, b = r * up, a * jnp.exp(total - log_decay), k * down, b * down
    below = same & jnp.tril(jnp.ones((C, C), bool), -1)

    def scores(left: jax.Array, right: jax.Array, seen: jax.Array) -> jax.Array:
        return jnp.where(seen, matmul(left, right.swapaxes(-1, -2), dtype), 0.0)

    x = unit_lower_inverse(-scores(a, b, below))
    u = matmul(x, matmul(scores(a, k, below), v, dtype), dtype)
    w = matmul(x, a * reads, dtype)
    from_b = scores(r, b, upto)
    inner = matmul(scores(r, k, upto), v, dtype) + matmul(from_b, u, dtype)
    query = r * reads + matmul(from_b, w, dtype)
    k, b = k * writes, b * writes
    change = matmul(w.swapaxes(-1, -2), b, dtype) * end
    add = (matmul(v.swapaxes(-1, -2), k, dtype) + matmul(u.swapaxes(-1, -2), b, dtype)) * end
    states, last = scan_states(state, end * keeps, change, add, dtype)
    return join(inner + matmul(query, states.swapaxes(-1, -2), dtype), T), last


def _one(arrays: Arrays, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One position, by the recurrence as it stands, in float32."""
    r, log_decay, k, v, a, b = (array[:, 0].astype(jnp.float32) for array in arrays)
    read = jnp.sum(state * a[:, :, None, :], axis=-1)
    state = state * jnp.exp(log_decay)[:, :, None, :] + read[..., None] * b[:, :, None, :] + v[..., None] * k[:, :, None, :]
    return jnp.sum(state * r[:, :, None, :], axis=-1)[:, None], state
