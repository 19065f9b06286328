"""The backward pass that takes the place of cuDNN's gives the gradients of attention; the forward pass is XLA's here."""

import numpy as np
import pytest

from tests.conformance.compare import Difference, demand, largest
from tests.conformance.gates import FLOAT32

jax = pytest.importorskip("jax", reason="jax is not installed here")
jnp = jax.numpy


@pytest.mark.parametrize(
    ("kv_heads", "window", "several", "chunk"),
    [(4, 0, False, 256), (4, 3, True, 4), (2, 0, True, 13), (2, 40, False, 4), (1, 3, False, 5)],
)
def test_reproducible_gradients_are_those_of_attention(kv_heads, window, several, chunk, monkeypatch):
    from smedjan_jax.mixers import cudnn

    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(cudnn, "QUERIES", chunk)
    rng = np.random.default_rng(kv_heads + window)
    query, key, value, weight = (jnp.asarray(rng.standard_normal((2, 13, heads, 8)), jnp.float32) for heads in (4, kv_heads, kv_heads, 4))
    documents = jnp.asarray(np.cumsum(rng.random((2, 13)) < 0.2, axis=1), jnp.int32) if several else None

    def gradients(reproducible):
        def total(*tensors):
            return (cudnn.attention(*tensors, documents, window, reproducible) * weight).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(query, key, value)

    pairs = zip("query key value".split(), gradients(True), gradients(False), strict=True)
    demand([Difference(f"gradient of the {name}", largest(np.asarray(got), np.asarray(want)), FLOAT32.one_op) for name, got, want in pairs])
