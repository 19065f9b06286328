"""RWKV's mixer all in kernels, what surrounds its core with it, and its plain form (the core by itself: test_kernels.py)."""

import os
from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from tests.conformance.compare import Difference, demand, relative_l2
from tests.conformance.gates import FLOAT32

jax = pytest.importorskip("jax", reason="jax is not installed here")
jnp = jax.numpy
FULL = os.environ.get("SMEDJAN_TEST_FULL") == "1"


@pytest.mark.parametrize("joined", [True, *([False] if FULL else [])])  # narrow products as one, or (dear) each by itself
def test_rwkv_in_kernels_is_its_plain_form_with_every_gradient(joined: bool, monkeypatch: pytest.MonkeyPatch):
    """Two layers, of which the second blends the first one's v; documents, and features that fill no tile."""
    from smedjan_common.model.params import initial_params
    from smedjan_jax.mixers import rwkv
    from smedjan_jax.modules import Context, Rope

    B, T, D = 2, 37, 24
    model = ModelConfig.build(vocab_size=64, dim=D, layers=2, heads=2, mixer=("rwkv",), rwkv_head_dim=12, context_length=T)
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(x + 0.1 * rng.standard_normal(x.shape), jnp.float32) for name, x in initial_params(model, 0).items()}
    x, documents = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32), jnp.asarray(np.cumsum(rng.random((B, T)) < 0.1, axis=1))
    monkeypatch.setattr(rwkv, "_simple", lambda linear: joined)

    def total(params: Any, x: jax.Array, implementation: str) -> Any:
        carried: Any = {}
        for layer in range(model.layers):
            mixer = rwkv.Rwkv(model, params, f"layers.{layer}.mixer", implementation)
            y, carried = mixer(x, Context(Rope(model, T), None, documents, 16), carried)
            x = x + y
        return jnp.sum(jnp.sin(x)), x

    found = {}
    for name in ("plain", "pallas"):
        (_, y), (dparams, dx) = jax.jit(jax.value_and_grad(lambda p, x, n=name: total(p, x, n), (0, 1), has_aux=True))(params, x)
        found[name] = {"outputs": y, "x": dx} | {each: value for each, value in dparams.items() if ".mixer." in each}
    demand(
        [
            Difference(each, relative_l2(np.asarray(found["pallas"][each]), np.asarray(value)), FLOAT32.one_op)
            for each, value in found["plain"].items()
        ]
    )
