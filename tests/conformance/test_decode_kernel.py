"""The kernel of attention in decoding against its definition: rings of every length, before and after they are full."""

import importlib.util

import numpy as np
import pytest

if importlib.util.find_spec("jax") is None:
    pytest.skip("jax is not installed here", allow_module_level=True)

CASES = {  # B rows, H and G heads, L entries, reach, position of each row, programs of a head
    "heads that share keys": (3, 4, 2, 100, 100, (0, 57, 99), 1),
    "past the end": (2, 4, 4, 64, 64, (63, 200), 3),
    "three heads a key, a window": (3, 6, 2, 130, 20, (5, 129, 1000), 1),
    "eight heads a key": (2, 8, 1, 70, 70, (68, 75), 2),
}
K = 32


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_attention_over_what_a_row_sees(name: str):
    import jax.numpy as jnp

    from smedjan_jax.kernels.decode_attention import attend

    B, H, G, L, reach, positions, splits = CASES[name]
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal(shape).astype(np.float32) for shape in ((B, H, K), (B, G, L, K), (B, G, L, K)))
    for row, position in enumerate(positions):  # what was never written shall not be seen
        key[row, :, position + 1 :] = value[row, :, position + 1 :] = 1e30
    got = attend(*map(jnp.asarray, (query, key, value)), jnp.asarray(positions, jnp.int32), reach, splits)
    for row, position in enumerate(positions):
        seen = [at % L for at in range(max(0, position + 1 - min(reach, L)), position + 1)]
        for head in range(H):
            k, v = (array[row, head * G // H, seen].astype(np.float64) for array in (key, value))
            scores = k @ query[row, head] / np.sqrt(K)
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(got[row, head], weights @ v / weights.sum(), rtol=0, atol=2e-6)


def test_it_is_taken_on_a_gpu_only():
    import jax

    from smedjan_jax.kernels import decoding_obstacle

    if jax.default_backend() != "gpu":
        assert "GPU" in decoding_obstacle(8, 8, 64, 1024, "bfloat16")
