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

Shapes: B batch, T positions, D width, H heads, K = V head size, C chunk; in a chunk [B, H, N, C, K].
MLX keeps heads before positions, [B, H, T, K]; JAX keeps positions first.
"""

import mlx.core as mx
import mlx.nn as nn

from smedjan_common.config import ModelConfig
from smedjan_mlx.mixers.chunks import borders, cut, join, matmul, running_sum, scan_states
from smedjan_mlx.mixers.triangular import unit_lower_inverse
from smedjan_mlx.modules import Carried, Context, Linear, Params, State

Arrays = tuple[mx.array, ...]

DECAY = 0.6065306597126334  # e^-1/2
GROUP_NORM_EPS = 64e-5
LARGEST_CHUNK = 128


class Rwkv(nn.Module):
    """The mixer `rwkv`: token shift, projections, delta rule, group norm, gate, output projection."""

    def __init__(self, config: ModelConfig, params: Params, name: str, implementation: str = "auto"):
        super().__init__()

        def vectors(*names: str) -> list:
            return [params[f"{name}.{each}"] for each in names]

        def linears(*names: str) -> list[Linear]:
            return [Linear(params, f"{name}.{each}") for each in names]

        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = vectors("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
        self.w0, self.a0, self.k_k, self.k_a, self.r_k = vectors("w0", "a0", "k_k", "k_a", "r_k")
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = linears("r_proj", "k_proj", "v_proj", "o_proj")
        self.w1, self.w2, self.a1, self.a2, self.g1, self.g2 = linears("w1", "w2", "a1", "a2", "g1", "g2")
        self.first = f"{name}.v0" not in params
        if not self.first:
            (self.v0,), (self.v1, self.v2) = vectors("v0"), linears("v1", "v2")
        self.ln_x = GroupNorm(params, f"{name}.ln_x")
        self.head_dim = config.rwkv_head_dim

    def __call__(self, x: mx.array, context: Context, carried: Carried) -> tuple[mx.array, Carried]:
        """Training: all positions at once."""
        return self.mix(self.project(x, context), context, carried)

    def project(self, x: mx.array, context: Context) -> Arrays:
        """r, k, v and what makes decay, rate, gate and (after the first layer) blend of v, all [B, T, D], of x [B, T, D]."""
        return self._project(x, token_shift(x, None, context.documents))

    def mix(self, projected: Arrays, context: Context, carried: Carried) -> tuple[mx.array, Carried]:
        """What `project` gave, mixed over the positions and projected back to [B, T, D]."""
        arrays, gate, carried = self._prepare(projected, carried)
        B, H, T, K = arrays[0].shape
        state = mx.zeros((B, H, K, K), mx.float32)
        chunk = min(context.chunk_size, LARGEST_CHUNK, T)
        core = mx.checkpoint(dplr_delta_rule)  # its C x C matrices would be the largest part of the memory
        o, _ = core(arrays, state, context.documents, chunk)
        return self._output(o, arrays, gate), carried

    def step(self, x: mx.array, context: Context, state: State, carried: Carried) -> tuple[mx.array, State, Carried]:
        """Decoding: T new tokens after those that made the state: `shift`, the last one's x [B, D], and `S` [B, H, V, K]."""
        arrays, gate, carried = self._prepare(self._project(x, token_shift(x, state["shift"], None)), carried)
        if x.shape[1] == 1:
            o, S = _one(arrays, state["S"])
        else:
            o, S = dplr_delta_rule(arrays, state["S"], None, min(context.chunk_size, LARGEST_CHUNK, x.shape[1]))
        return self._output(o, arrays, gate), {"shift": x[:, -1], "S": S}, carried

    def _project(self, x: mx.array, previous: mx.array) -> Arrays:
        shift = previous - x
        x_r, x_w, x_k, x_v, x_a, x_g = (
            x + shift * mu.astype(x.dtype) for mu in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        )
        decay, rate = self.w2(mx.tanh(self.w1(x_w))), self.a2(self.a1(x_a))
        gate = self.g2(mx.sigmoid(self.g1(x_g)))
        blend = () if self.first else (self.v2(self.v1(x_v)),)
        return self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v), decay, rate, gate, *blend

    def _prepare(self, projected: Arrays, carried: Carried) -> tuple[Arrays, mx.array, Carried]:
        """The arrays r, log w, k, v, a, b of the recurrence [B, H, T, K], the gate [B, T, D], and v_first for later layers."""
        r, k, v, decay, rate, gate, *blend = projected
        log_decay = -DECAY * mx.sigmoid(self.w0 + decay.astype(mx.float32))
        rate = mx.sigmoid(self.a0 + rate.astype(mx.float32))
        if self.first:
            carried = {**carried, "v_first": v}
        else:
            wide, first = v.astype(mx.float32), carried["v_first"].astype(mx.float32)
            v = (wide + (first - wide) * mx.sigmoid(self.v0 + blend[0].astype(mx.float32))).astype(v.dtype)
        wide = k.astype(mx.float32)
        kk = self._heads(wide * self.k_k)
        kk = kk * mx.rsqrt(mx.maximum(mx.sum(kk * kk, axis=-1, keepdims=True), 1e-24))
        k = (wide * (1 + (rate - 1) * self.k_a)).astype(k.dtype)
        heads = (self._heads(each) for each in (r, log_decay, k, v))
        return (*heads, -kk, kk * self._heads(rate)), gate, carried

    def _heads(self, x: mx.array) -> mx.array:
        B, T, D = x.shape
        return x.reshape(B, T, D // self.head_dim, self.head_dim).swapaxes(1, 2)

    def _output(self, o: mx.array, arrays: Arrays, gate: mx.array) -> mx.array:
        r, _, k, v, _, _ = (each.astype(mx.float32) for each in arrays)
        bonus = mx.sum(r * k * self.r_k[:, None], axis=-1, keepdims=True) * v
        y = self.ln_x(o) + bonus.swapaxes(1, 2).reshape(gate.shape)
        return self.o_proj((y * gate.astype(mx.float32)).astype(gate.dtype))


class GroupNorm(nn.Module):
    """Every head of [B, H, T, V] normalised by itself, in float32, times a weight [D] plus a bias [D] (Wu & He, 2018)."""

    def __init__(self, params: Params, name: str):
        super().__init__()
        self.weight, self.bias = params[f"{name}.weight"], params[f"{name}.bias"]

    def __call__(self, x: mx.array) -> mx.array:
        centred = x - mx.mean(x, axis=-1, keepdims=True)
        normed = centred * mx.rsqrt(mx.mean(centred * centred, axis=-1, keepdims=True) + GROUP_NORM_EPS)
        return normed.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1) * self.weight + self.bias


def token_shift(x: mx.array, last: mx.array | None, documents: mx.array | None) -> mx.array:
    """The position before each of x [B, T, D]; before the first stands `last` [B, D] or zeros, and zeros before each document's first."""
    first = mx.zeros_like(x[:, :1]) if last is None else last[:, None].astype(x.dtype)
    previous = mx.concatenate([first, x[:, :-1]], axis=1)
    if documents is None:
        return previous
    before = mx.concatenate([documents[:, :1], documents[:, :-1]], axis=1)
    return mx.where((before == documents)[..., None], previous, 0)


def dplr_delta_rule(arrays: Arrays, state: mx.array, documents: mx.array | None, C: int) -> tuple[mx.array, mx.array]:
    """o [B, H, T, V] in float32 and the state after the last position, in chunks of C <= 128 (the equations stand above).

    arrays: r, log w, k, v, a, b, [B, H, T, K] each; state [B, H, V, K] float32; documents [B, T]. Matmuls in the dtype of r.
    """
    T, dtype = arrays[0].shape[2], arrays[0].dtype
    r, log_decay, k, v, a, b = (cut(each.astype(mx.float32), C) for each in arrays)
    same, reads, writes, keeps = borders(documents, C)
    upto = same & mx.tril(mx.ones((C, C), dtype=mx.bool_))
    total = running_sum(log_decay, upto)
    up, down, end = mx.exp(total), mx.exp(-total), mx.exp(total[..., -1:, :])
    r, a, k, b = r * up, a * mx.exp(total - log_decay), k * down, b * down
    below = same & mx.tril(mx.ones((C, C), dtype=mx.bool_), -1)

    def scores(left: mx.array, right: mx.array, seen: mx.array) -> mx.array:
        return mx.where(seen, matmul(left, right.swapaxes(-1, -2), dtype), 0.0)

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


def _one(arrays: Arrays, state: mx.array) -> tuple[mx.array, mx.array]:
    """One position, by the recurrence as it stands, in float32."""
    r, log_decay, k, v, a, b = (array[:, :, 0].astype(mx.float32) for array in arrays)
    read = mx.sum(state * a[:, :, None, :], axis=-1)
    state = state * mx.exp(log_decay)[:, :, None, :] + read[..., None] * b[:, :, None, :] + v[..., None] * k[:, :, None, :]
    return mx.sum(state * r[:, :, None, :], axis=-1)[:, :, None], state
