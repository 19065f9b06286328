"""The outside: our optimizers are optax's, and AdamW is torch's too, for 20 steps on the same gradients, some clipped, some tiny."""

import dataclasses

import numpy as np
import pytest

from smedjan_common.training.optimizers import OPTIMIZERS
from smedjan_common.training.schedule import learning_rate
from tests.conformance import checks, subjects
from tests.conformance.cases import CASES, Case, train_config
from tests.conformance.compare import Difference, demand, relative_l2, tensors
from tests.conformance.gates import FLOAT32

pytestmark = pytest.mark.oracle
CASE = next(case for case in CASES.values() if case.model.kv_heads < case.model.heads)
EXPERTS = next((case for case in CASES.values() if "experts" in case.model.ffn), CASE)


def decayed(params):
    return {name: getattr(value, "ndim", 0) > 1 for name, value in params.items()}  # optax hides the others behind nodes


def optax_adamw(optax, config, rate):
    return optax.adamw(rate, b1=config.beta1, b2=config.beta2, eps=config.eps, weight_decay=config.weight_decay, mask=decayed)


def optax_lion(optax, config, rate):
    return optax.lion(rate, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=decayed)


def optax_muon(optax, config, rate):
    """Its AdamW part decays all tensors or none: we decay the embedding and no vector, so that part is put beside it by hand."""
    from optax.contrib import MuonDimensionNumbers, muon

    def label(name, value):
        return "muon" if value.ndim > 1 and name != "embed.weight" else "adamw"

    return optax.partition(
        {
            "muon": muon(
                rate,
                ns_steps=config.muon_steps,
                beta=config.muon_momentum,
                nesterov=config.muon_nesterov,
                eps=config.eps,
                weight_decay=config.weight_decay,
                consistent_rms=0.2,
                # ours are [out, in], and experts are a batch of them
                muon_weight_dimension_numbers=lambda params: {
                    name: MuonDimensionNumbers(value.ndim - 1, value.ndim - 2) if hasattr(value, "ndim") else None
                    for name, value in params.items()
                },
            ),
            "adamw": optax_adamw(optax, config, rate),
        },
        lambda params: {name: label(name, value) for name, value in params.items()},
    )


ORACLES = {"adamw": optax_adamw, "lion": optax_lion, "muon": optax_muon}
SETTINGS = {
    "adamw": {},
    "lion": {},
    "muon": {},
    "muon, three iterations, no look ahead": {"muon_steps": 3, "muon_nesterov": False, "muon_momentum": 0.9},
}


def test_every_optimizer_has_an_oracle():
    assert ORACLES.keys() == OPTIMIZERS.keys() == {name.split(",")[0] for name in SETTINGS}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("oracle_case", [pytest.param(CASE, id="dense"), pytest.param(EXPERTS, id="experts")])
def test_optimizer_equals_optax(backend: str, oracle_case: Case, setting: str):
    """optax.chain(clip_by_global_norm, the optimizer with its mask), as a user of optax would write it."""
    jax = pytest.importorskip("jax", reason="optax needs jax, which is not installed")
    jnp = pytest.importorskip("jax.numpy")
    optax = pytest.importorskip("optax", reason="optax is not installed")

    name = setting.split(",")[0]
    config = train_config(optimizer=name, **SETTINGS[setting])
    case = dataclasses.replace(oracle_case, train=config)
    grads = checks.optimizer_gradients(case)
    snapshot = subjects.optimizer_run(backend, case.model, config, case.params, grads)

    def rate(step):
        return jnp.asarray([learning_rate(config, s) for s in range(config.steps)], jnp.float32)[step]

    chain = optax.chain(optax.clip_by_global_norm(config.clip_norm), ORACLES[name](optax, config, rate))
    params = {name: jnp.asarray(value) for name, value in case.params.items()}
    state = chain.init(params)
    update = jax.jit(chain.update)
    for grad in grads:
        updates, state = update({name: jnp.asarray(value) for name, value in grad.items()}, state, params)
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
