"""The kernel of one new token's attention gives what its plain form gives, interpreted on a CPU, and a decoder with it the same logits."""

import jax
import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.inference import chunks
from smedjan_common.inference.drawing import Draw
from smedjan_common.inference.sampling import Sampling
from smedjan_common.model.params import initial_params
from tests.conformance.compare import Difference, demand, demand_equal_bits, largest

pytest.importorskip("jax", reason="jax is not installed here")
jnp = jax.numpy

MODEL = ModelConfig.build(vocab_size=97, dim=64, layers=1, heads=4, kv_heads=2, context_length=256, init_std=0.3, window=50)
HELD, ROWS = 64, 3


@pytest.mark.parametrize(
    ("entries", "block", "splits", "sharing", "reach", "dtype"),
    [
        (48, 16, 1, 4, 48, "float32"),
        (48, 16, 3, 1, 20, "float32"),
        (40, 16, 2, 3, 40, "float32"),  # blocks do not divide it
        (40, 16, 1, 1, 1, "float32"),
        (64, 32, 2, 2, 64, "bfloat16"),
    ],
)
def test_the_kernel_is_the_plain_form(entries: int, block: int, splits: int, sharing: int, reach: int, dtype: str):
    """Rows that begin, that are nearly full, full and far past it; one is not active."""
    from smedjan_jax.kernels.decode_attention import Launch, Plan, attend
    from smedjan_jax.mixers.attention import masked_attention

    rng, K, G = np.random.default_rng(entries + splits), 16, 2
    position = np.array([0, 5, 17, entries - 1, entries, 3 * entries + 7], np.int32)
    active, B = np.arange(len(position)) != 2, len(position)
    query = jnp.asarray(rng.standard_normal((B, G, sharing, K)), dtype)
    new = tuple(jnp.asarray(rng.standard_normal((B, G, K)), dtype) for _ in range(2))
    ring = tuple(jnp.asarray(rng.standard_normal((B, G, entries, K)), dtype) for _ in range(2))
    out, after = attend(query, new, ring, position, active, reach, Plan(block, splits, Launch()))
    slot, wide = position % entries, [x.astype(jnp.float32) for x in (query, *new, *ring)]
    written = [x.at[np.arange(B), :, slot].set(y) for x, y in zip(wide[3:], wide[1:3], strict=True)]
    behind = (position[:, None] - np.arange(entries)) % entries
    seen = (behind <= position[:, None]) & (behind < reach)
    want = masked_attention(wide[0].reshape(B, 1, -1, K), *(x.swapaxes(1, 2) for x in written), jnp.asarray(seen[:, None]))
    found = np.asarray(out, np.float32).reshape(B, -1)[active]
    demand([Difference("outputs", largest(found, np.asarray(want).reshape(B, -1)[active]), 1e-6 if dtype == "float32" else 2e-2)])
    for got, before, changed in zip(after, wide[3:], written, strict=True):
        right = np.where(active[:, None, None, None], changed, before)
        np.testing.assert_array_equal(np.asarray(got, np.float32), right)


def decoder(monkeypatch: pytest.MonkeyPatch, by_kernel: bool):
    from smedjan_jax import held, kernels
    from smedjan_jax.decoder import JaxDecoder

    monkeypatch.setattr(kernels, "for_decoding", lambda *_: by_kernel)
    monkeypatch.setattr(held, "decoding", lambda *_: True)
    return JaxDecoder(MODEL, initial_params(MODEL, 0), "float32", HELD, ROWS)


def story(decoder) -> np.ndarray:
    """Logits of rows of several lengths that are fed, step, are forked, look ahead, draw blocks, and go on past what they hold."""
    rng, rows, seen = np.random.default_rng(1), np.arange(ROWS), []
    for row, length in enumerate((48, 16, 1)):
        seen.append(decoder.feed(rng.integers(0, 97, length).tolist(), row))
    for turn in range(3):
        active = rows != turn
        seen += list(decoder.step(rng.integers(0, 97, ROWS), active)[active])
    decoder.load(2, decoder.save(1))
    seen += list(decoder.step(np.full(ROWS, 5), rows >= 0))
    seen += list(decoder.look(rng.integers(0, 97, (ROWS, 3)), rows > 0)[1:].reshape(-1, 97))
    decoder.keep(np.array([0, 2, 1]))
    greedy = Sampling(temperature=0)
    texts = [given.tokens for given in decoder.block([Draw(row, row, [row], greedy, 16) for row in rows], 16)]
    assert [len(text) for text in texts] == [16] * ROWS
    assert decoder.position(0) > HELD
    seen += list(decoder.step(np.array([text[-1] for text in texts]), rows >= 0))
    return np.stack(seen)


def test_a_decoder_gives_the_same_with_the_kernel(monkeypatch: pytest.MonkeyPatch):
    by_kernel, plain = story(decoder(monkeypatch, True)), story(decoder(monkeypatch, False))
    demand([Difference("logits", largest(by_kernel, plain), 1e-5)])


def test_a_step_is_compiled_once_whatever_the_rows_hold(monkeypatch: pytest.MonkeyPatch):
    """And its bits are the same whatever the others hold."""
    monkeypatch.setattr(chunks, "SHORTEST_READ", 16)
    it, bits = decoder(monkeypatch, True), []
    for others in (1, 36):
        it.reset()
        it.feed([3, 4, 5, 6], 0)
        it.feed(list(range(others)), 1)
        bits.append(it.step(np.array([7, 8, 0]), np.array([True, True, False]))[0])
    assert it._compiled.step._cache_size() == 1
    demand_equal_bits({"logits": bits[0]}, {"logits": bits[1]})


@pytest.mark.parametrize(("rows", "entries"), [(64, 1024), (1, 1000)])
def test_the_kernel_is_lowered_for_a_gpu_by_the_installed_jax(rows: int, entries: int, monkeypatch: pytest.MonkeyPatch):
    from jax import export

    from smedjan_jax.kernels import decode_attention

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    B, G, R, K = rows, 4, 2, 64
    shapes = (B, G, R, K), (B, G, K), (B, G, entries, K)
    query, new, ring = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    position, active = jax.ShapeDtypeStruct((B,), jnp.int32), jax.ShapeDtypeStruct((B,), bool)

    def attend(*arrays):
        return decode_attention.attend.__wrapped__(*arrays, reach=entries)

    allowed = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    given = export.export(jax.jit(attend), platforms=["cuda"], disabled_checks=allowed)(query, (new, new), (ring, ring), position, active)
    assert "triton" in given.mlir_module()


def test_where_the_kernel_is_taken(monkeypatch: pytest.MonkeyPatch):
    from smedjan_jax import kernels

    wide = ModelConfig.build(vocab_size=97, dim=512, layers=2, heads=8, context_length=256, mixer=("attention", "ssm"))
    assert not kernels.for_decoding("auto", wide, "bfloat16", 256), "there is no GPU"
    device = type("Device", (), {"compute_capability": "9.0"})()
    monkeypatch.setattr(kernels, "_no_device", lambda: "")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    assert kernels.for_decoding("auto", wide, "bfloat16", 256)
    assert not kernels.for_decoding("plain", wide, "bfloat16", 256)
    assert not kernels.for_decoding("auto", wide, "float32", 256)
    assert not kernels.for_decoding("auto", wide, "bfloat16", 63)
    assert not kernels.for_decoding("auto", wide, "bfloat16", 256, 2)
    assert not kernels.for_decoding("auto", MODEL, "bfloat16", 256), "heads of 16"
    device.compute_capability = "8.0"
    assert not kernels.for_decoding("auto", wide, "bfloat16", 256)
