"""cuDNN's flash attention on an NVIDIA GPU, and two forms of attention whose gradients have the same bits every time.

cuDNN adds the gradients of the queries up by atomic operations, in whatever order its blocks end, so two runs differ in the last bits.
It has an ordered form, but XLA cannot build it (jaxlib 0.11.2: an IndexError while compiling). `reproducible` takes JAX's own flash kernel
in Triton, which keeps an order, where it fits: at medium on an H100 it trains at 0.86 of cuDNN's speed. Elsewhere, and should a later
JAX leave that kernel out, it keeps cuDNN's forward pass, whose order is fixed, and computes the gradients by XLA's matrix products (0.49)
from the output O and the softmax's log-sum L (Dao, 2023, "FlashAttention-2", section 3.1):

    P = exp(S - L);  dV = P^T dO;  dS = P * (dO V^T - rowsum(dO * O));  dQ = dS K / sqrt(K);  dK = dS^T Q / sqrt(K)

Queries go in chunks that read only the keys before them, so memory grows with T * QUERIES.

Shapes: B batch, T positions, C queries of a chunk, S keys that they may see, H query heads, G key/value heads, R = H / G, K head size.
"""

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

IMPLEMENTATION = "cudnn"
QUERIES = 256
KERNEL_BLOCK = 128  # queries of a block of the Triton kernel; sequences are whole blocks


def obstacle(query: jax.Array | jax.ShapeDtypeStruct) -> str:
    """Why cuDNN's attention cannot take these queries; empty when it can."""
    if jax.default_backend() != "gpu":
        return "cuDNN attention needs an NVIDIA GPU."
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return "cuDNN attention needs --dtype bfloat16."
    if query.shape[-1] % 8 or query.shape[-1] > 128:
        return "cuDNN attention needs a head size that is a multiple of 8, at most 128."
    return ""


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, documents: jax.Array | None = None, window: int = 0, reproducible: bool = False
) -> jax.Array:
    """Causal attention [B, T, H, K] inside documents int32 [B, T] and, where `window` is not 0, to the newest `window` positions."""
    if reproducible:
        kernel = _kernel() if _kernel_fits(query, window) else None
        return kernel(query, key, value, documents) if kernel else _reproducible(query, key, value, documents, window)
    return _forward(query, key, value, documents, window, residual=False)


def _kernel_fits(query: jax.Array, window: int) -> bool:
    _, T, _, K = query.shape
    return T % KERNEL_BLOCK == 0 and K in (32, 64, 128) and not 0 < window < T


def _kernel() -> Callable[..., jax.Array] | None:
    """JAX's flash attention in Pallas-Triton, for any number of key/value heads; None where JAX no longer has it."""
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha
    except ImportError:
        return None
    blocks = BlockSizes(KERNEL_BLOCK, 64, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, documents: jax.Array | None) -> jax.Array:
        shared = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, shared, axis=2) for x in (key, value))
        return mha(query, key, value, documents, sm_scale=query.shape[-1] ** -0.5, causal=True, block_sizes=blocks)

    return attend


def _forward(query, key, value, documents, window, residual):
    T = query.shape[1]
    mask, near = None, (window - 1, 0) if 0 < window < T else None  # positions before and after its own
    if documents is not None:  # cuDNN takes a mask or a window, not both
        mask, near = _seen(documents, window, 0, T)[:, 0], None
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=True,
        local_window_size=near,
        implementation=IMPLEMENTATION,
        return_residual=residual,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _reproducible(query, key, value, documents, window):
    return _forward(query, key, value, documents, window, residual=False)


def _with_residuals(query, key, value, documents, window):
    out, log_sum_BTH = _forward(query, key, value, documents, window, residual=True)
    return out, (query, key, value, documents, out, log_sum_BTH)


def _gradients(window, residuals, cotangent):
    query, key, value, documents, out, log_sum_BTH = residuals
    B, T, H, K = query.shape
    G = key.shape[2]
    grouped = (B, T, G, H // G, K)
    rows_BTH = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
    query, cotangent = query.reshape(grouped), cotangent.reshape(grouped)
    log_sum, rows = (x.reshape(grouped[:-1]).transpose(0, 2, 3, 1)[..., None] for x in (log_sum_BTH, rows_BTH))
    dquery, dkey, dvalue = [], jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    for start in range(0, T, QUERIES):
        end = min(start + QUERIES, T)
        q, do, k, v = query[:, start:end], cotangent[:, start:end], key[:, :end], value[:, :end]
        seen = _seen(documents, window, start, end)
        scores = _wide("bcgrk,bsgk->bgrcs", q, k) * K**-0.5
        weights = jnp.where(seen, jnp.exp(scores - log_sum[:, :, :, start:end]), 0.0)
        slopes = weights * (_wide("bcgrk,bsgk->bgrcs", do, v) - rows[:, :, :, start:end]) * K**-0.5
        weights, slopes = weights.astype(query.dtype), slopes.astype(query.dtype)
        dquery.append(_wide("bgrcs,bsgk->bcgrk", slopes, k))
        dkey = dkey.at[:, :end].add(_wide("bgrcs,bcgrk->bsgk", slopes, q))
        dvalue = dvalue.at[:, :end].add(_wide("bgrcs,bcgrk->bsgk", weights, do))
    dquery_BTHK = jnp.concatenate(dquery, axis=1).reshape(B, T, H, K)
    return dquery_BTHK.astype(query.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype), None


_reproducible.defvjp(_with_residuals, _gradients)


def _seen(documents: jax.Array | None, window: int, start: int, end: int) -> jax.Array:
    """Which of the keys 0 … end - 1 the queries start … end - 1 see, [C, S] or [B, 1, 1, C, S]."""
    behind = jnp.arange(start, end)[:, None] - jnp.arange(end)[None, :]
    seen = (behind >= 0) & (behind < window) if window else behind >= 0
    if documents is None:
        return seen
    return (seen & (documents[:, start:end, None] == documents[:, None, :end]))[:, None, None]


def _wide(subscripts: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)
