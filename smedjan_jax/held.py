"""Whether kernels are their plain form on this very device: held against it once, before `auto` takes them.

The conformance suite holds every kernel against its plain form interpreted on a CPU, and on the GPUs that it ran on. A driver, a card or a
version of the compiler that nobody tried is another matter, so `--kernels auto` asks the device itself: one small layer, forward and every
gradient, in both forms, beside the plain form in float32; of decoding, one step and the ring after it. What it answers is kept in the cache
for this device, these versions and these sources; a form that differs, or fails, is not taken, and a note says so.
"""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smedjan_common.config import ModelConfig
from smedjan_common.errors import notice
from smedjan_common.files.atomic_file import write_atomically
from smedjan_common.model.mixers import gated_deltanet
from smedjan_common.model.params import initial_params
from smedjan_jax import kernels
from smedjan_jax.ffn import swiglu
from smedjan_jax.kernels import SHORTEST_RING
from smedjan_jax.model import Model
from smedjan_jax.products import linear

LENGTH, ROWS = 200, 2  # no multiple of a chunk; several documents in each row
SLACK = 2.0, 2e-3  # how much farther from float32 a kernel may be than the plain form of its dtype: times, and plus
DECODING, FLOAT8 = "decoding", "float8"  # names of their kernels, beside those of mixers
# what a kernel computes is written in mixers too, and the scales of float8 beside its plain form
FOLDER, SOURCES = Path(__file__).parent, ("kernels/*.py", "mixers/*.py", "float8.py", "swiglu.py", "held.py")
DRAWS = 4  # of tokens and weights, taken together: a sum of a few values over all positions cancels in one of them by chance


def ask(model: ModelConfig, dtype: str, length: int) -> None:
    """Let `auto` take no kernel of `model` that is not its plain form here. Takes seconds for each mixer, once on a machine."""
    for mixer in dict.fromkeys(model.mixer):
        if mixer == "block-sparse":
            taken = kernels.for_blocks("auto", model, dtype, length) == "pallas"
        else:
            taken = mixer in kernels.SIZES and kernels.chosen(mixer, "auto", model, dtype) == "pallas"
        if taken and (why := _reason(mixer, small(mixer, model), dtype)):
            kernels.REFUSED.add(mixer)
            notice(f"the kernels of {mixer} are not taken on this device: {why}; --kernels pallas takes them all the same.")


def decoding(model: ModelConfig, dtype: str, entries: int) -> bool:
    """Whether a decoder may take the kernel of one new token's attention. entries: of its rings, whose blocks divide them or do not."""
    length = LENGTH if entries % SHORTEST_RING else 4 * SHORTEST_RING
    heads = 256 // model.head_dim
    sizes = {"dim": 256, "heads": heads, "kv_heads": heads if model.kv_heads == model.heads else heads // 2}
    layer = ModelConfig.build(vocab_size=64, layers=1, ffn_dim=64, context_length=length, init_std=0.1, **sizes)
    if why := _reason(DECODING, layer, dtype):
        notice(f"the kernel of decoding is not taken on this device: {why}.")
    return not why


def float8(dtype: str) -> None:
    """Let no run take the kernels of float8 that are not their plain form here. dtype: in which it computes otherwise."""
    # sides that the largest tile of every kernel divides, so that these are the programs that models of usual sizes run
    feed = ModelConfig.build(vocab_size=64, layers=1, dim=256, heads=2, ffn_dim=512, context_length=LENGTH)
    if why := _reason(FLOAT8, feed, dtype):
        kernels.REFUSED.add(FLOAT8)
        notice(f"the kernels of float8 are not taken on this device: {why}.")


def small(mixer: str, model: ModelConfig) -> ModelConfig:
    """A layer of the mixer with the heads and states of `model`, and little else."""
    dim = 2 * max(model.head_dim, 128)
    heads = dim // model.head_dim
    kv_heads = heads if model.kv_heads == model.heads else max(1, heads // 2)
    sizes = {"vocab_size": 64, "dim": dim, "layers": 1, "heads": heads, "kv_heads": kv_heads, "ffn_dim": 64, "head_size": 0}
    if mixer == "gated-deltanet":
        own = gated_deltanet.heads(model)
        sizes |= {"delta_key_heads": 2, "delta_value_heads": 2 * min(2, own.values // own.keys)}
        sizes |= {"delta_key_size": own.key_dim, "delta_value_size": own.value_dim}
    return dataclasses.replace(model, **sizes, mixer=(mixer,), ffn=("swiglu",), context_length=LENGTH, init_std=0.1, tied_head=True)


@functools.lru_cache(maxsize=32)
def _reason(mixer: str, model: ModelConfig, dtype: str) -> str:
    """Why the kernels are not taken, from the cache or anew; empty where they are their plain form."""
    key, file = _key(model, dtype), _file()
    known = _read(file)
    if key not in known:
        known[key] = _compare(mixer, model, dtype)
        _write(file, known)
    return known[key]


def _compare(mixer: str, model: ModelConfig, dtype: str) -> str:
    """The same by computing both."""
    try:
        exact, plain, kernel = (_layers(mixer, model, *form) for form in (("float32", "plain"), (dtype, "plain"), (dtype, "kernel")))
    except Exception as error:  # whatever the compiler or the device says
        return f"they fail ({str(error).splitlines()[0][:120] if str(error) else type(error).__name__})"
    times, plus = SLACK
    for name, right in exact.items():
        if not _distance(kernel[name], right) <= times * _distance(plain[name], right) + plus:
            return f"{name} differs by {_distance(kernel[name], right):.1e}, the plain form by {_distance(plain[name], right):.1e}"
    return ""


def _layers(mixer: str, model: ModelConfig, dtype: str, form: str) -> dict[str, np.ndarray]:
    """What the layer gives, and the gradient of every parameter, of every draw [DRAWS, ...], on the host."""
    if mixer == DECODING:
        return _steps(model, dtype, form)
    if mixer == FLOAT8:
        return _fed(model, dtype, form)
    forms: dict[str, Any]
    if mixer == "block-sparse":
        forms = {"attention": "plain" if form == "plain" else "reproducible"}  # which is its kernel wherever that can run
    else:
        forms = {"kernels": "plain" if form == "plain" else "pallas"}

    def given(params: dict[str, jax.Array], tokens: Any, documents: Any, weight: Any) -> tuple[jax.Array, jax.Array]:
        hidden = Model(model, params, dtype, **forms).hidden(tokens, documents)
        return jnp.sum(hidden.astype(jnp.float32) * weight), hidden

    gradients = jax.jit(jax.grad(given, has_aux=True))
    draws = []
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        # a tensor that begins as zeros would leave the gradients of all before it zero, and compare nothing
        params = {name: _not_zero(rng, value) for name, value in initial_params(model, seed).items()}
        tokens = rng.integers(0, model.vocab_size, (ROWS, LENGTH)).astype(np.int32)
        documents = None if mixer == "block-sparse" else np.cumsum(rng.random((ROWS, LENGTH)) < 0.02, axis=1).astype(np.int32)
        weight = rng.standard_normal((ROWS, LENGTH, model.dim)).astype(np.float32)
        found, hidden = gradients(params, tokens, documents, weight)
        draws.append({"the output": hidden, **{f"the gradient of {name}": value for name, value in found.items()}})
    return {name: np.stack([np.asarray(draw[name], np.float32) for draw in draws]) for name in draws[0]}


def _steps(model: ModelConfig, dtype: str, form: str) -> dict[str, np.ndarray]:
    """The logits of one new token of each of several rows, one of them past what its ring holds, and the rings, on the host."""
    L = model.context_length
    positions = np.array([1, L // 2 + 1, L - 1, 2 * L + 5], np.int32)
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(value) for name, value in initial_params(model, 0).items()}
    step = jax.jit(lambda params, tokens, state: Model(model, params, dtype, form).step(tokens, state))
    state = Model(model, params, dtype).init_state(len(positions), L)
    layers = [{name: jnp.asarray(rng.standard_normal(a.shape), a.dtype) for name, a in layer.items()} for layer in state["layers"]]
    tokens = rng.integers(0, model.vocab_size, (len(positions), 1)).astype(np.int32)
    logits, after = step(params, tokens, {"position": jnp.asarray(positions), "layers": layers})
    return {"the output": np.asarray(logits)} | {f"the {name}": np.asarray(a, np.float32) for name, a in after["layers"][0].items()}


def _fed(model: ModelConfig, dtype: str, form: str) -> dict[str, np.ndarray]:
    """What a projection and SwiGLU give in float8 (form "plain" in float32: without it), and every gradient, on the host."""
    from smedjan_jax.swiglu import swiglu_by_kernels

    rng, D, F = np.random.default_rng(0), model.dim, model.ffn_dim
    x, weight = (jnp.asarray(rng.standard_normal((256, D)), dtype) for _ in range(2))
    weights = [jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32) for shape in ((D, D), (F, D), (F, D), (D, F))]
    by = "pallas" if form == "kernel" else "" if dtype == "float32" else "plain"

    def fed(x: jax.Array, first: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        x = linear(x, [first], by)
        if form == "kernel":
            return swiglu_by_kernels(x, (gate, up), down)
        return linear(swiglu(linear(x, [gate], by), linear(x, [up], by)), [down], by)

    y, pull = jax.jit(functools.partial(jax.vjp, fed))(x, *weights)
    names = "the output", *(f"the gradient of {name}" for name in ("the input", "the projection", "gate", "up", "down"))
    found = zip(names, (y, *pull(weight)), strict=True)
    return {name: np.asarray(value, np.float32) for name, value in found}


def _not_zero(rng: np.random.Generator, value: np.ndarray) -> jax.Array:
    return jnp.asarray(value if value.any() else 0.1 * rng.standard_normal(value.shape).astype(np.float32))


def _distance(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(found - right) / max(float(np.linalg.norm(right)), 1e-30))


def _key(model: ModelConfig, dtype: str) -> str:
    """This device, these versions, these sources, these sizes."""
    device = jax.devices()[0]
    sources = b"".join(path.read_bytes() for pattern in SOURCES for path in sorted(FOLDER.glob(pattern)))
    said = [device.device_kind, jax.__version__, str(getattr(device.client, "platform_version", "")), dtype, model.to_dict()]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode() + sources).hexdigest()


def _file() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "smedjan" / "kernels.json"


def _read(file: Path) -> dict[str, str]:
    try:
        known = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return {key: why for key, why in known.items() if isinstance(why, str)} if isinstance(known, dict) else {}


def _write(file: Path, known: dict[str, str]) -> None:
    """Kept for the next start; a folder that cannot be written costs the seconds again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(known, indent=1).encode())
    except OSError:
        pass
