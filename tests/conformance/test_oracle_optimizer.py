"""The outside: our optimizer is optax's AdamW and torch's, for 20 steps on the same gradients, some clipped, some tiny."""

import numpy as np
import pytest

from smedjan_common.schedule import learning_rate
from tests.conformance import checks, subjects
from tests.conformance.cases import CASES
from tests.conformance.compare import Difference, demand, relative_l2, tensors
from tests.conformance.gates import FLOAT32

pytestmark = pytest.mark.oracle
CASE = next(case for case in CASES.values() if case.model.kv_heads < case.model.heads)


def test_optimizer_equals_optax_adamw(backend: str):
    """optax.chain(clip_by_global_norm, adamw with its mask), as a user of optax would write it."""
    jnp = pytest.importorskip("jax.numpy", reason="optax needs jax, which is not installed")
    optax = pytest.importorskip("optax", reason="optax is not installed")

    case = CASE
    grads = checks.optimizer_gradients(case)
    snapshot = subjects.optimizer_run(backend, case.model, case.train, case.params, grads)
    config = case.train
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda step: jnp.asarray([learning_rate(config, s) for s in range(config.steps)], jnp.float32)[step],
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: {name: value.ndim > 1 for name, value in params.items()},
        ),
    )
    params = {name: jnp.asarray(value) for name, value in case.params.items()}
    state = chain.init(params)
    for grad in grads:
        updates, state = chain.update({name: jnp.asarray(value) for name, value in grad.items()}, state, params)
        params = optax.apply_updates(params, updates)
    demand(tensors(snapshot.params, {name: np.asarray(value) for name, value in params.items()}, FLOAT32.one_op))


def test_optimizer_equals_torch_adamw(backend: str):
    """torch in float64, with its own clipping (which adds 1e-6 to the norm: 4e-7 of a norm near 2.5)."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
    case = CASE
    grads, config = checks.optimizer_gradients(case), case.train
    snapshot = subjects.optimizer_run(backend, case.model, config, case.params, grads)
    params = {name: torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)) for name, value in case.params.items()}
    groups = [
        {"params": [p for p in params.values() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in params.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    for step, grad in enumerate(grads):
        for name, parameter in params.items():
            parameter.grad = torch.tensor(grad[name], dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_(params.values(), config.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(config, step)
        adamw.step()
    demand(Difference(name, relative_l2(snapshot.params[name], value.detach().numpy()), FLOAT32.one_op) for name, value in params.items())
