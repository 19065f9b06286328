"""Makes tests/fixtures/preferences-trl.json: what the loss functions of TRL give to pairs of answers, in float64.

    pip install --no-deps --target DIR trl==1.16.0 accelerate==1.15.0          (beside torch, transformers and datasets)
    PYTHONPATH=DIR python -m tests.trl_preferences > tests/fixtures/preferences-trl.json

Nothing of TRL is copied: its methods are called with plain objects in place of a trainer and of a model, whose log-probabilities are given.
Derivatives by the log-probability of each token are autograd's. `dpo` with label smoothing, which TRL's DPOTrainer has no more, is the
"sigmoid" of its CPOTrainer over ratios to the reference; the loss of ORPO is computed there in float32, which is undone here.
"""

import contextlib
import importlib.metadata
import json
from types import SimpleNamespace

import numpy as np
import torch
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer import dpo_trainer

CASES = [  # objective, the options that it has
    ("dpo", {"beta": 0.1}),
    ("dpo", {"beta": 0.5, "label_smoothing": 0.15}),
    ("dpo", {"beta": 0.1, "nll_weight": 0.7}),
    ("ipo", {"beta": 0.1}),
    ("ipo", {"beta": 0.4}),
    ("simpo", {"beta": 2.0, "gamma": 1.0}),
    ("simpo", {"beta": 2.5, "gamma": 0.3}),
    ("orpo", {"beta": 0.1, "nll_weight": 1.0}),
    ("orpo", {"beta": 0.3, "nll_weight": 0.5}),
]
ACCELERATOR = SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value, gather=lambda value: value)


class Metrics(dict):
    """Metrics that nobody reads."""

    def __missing__(self, key):
        return self.setdefault(key, Metrics() if key in ("train", "eval") else [])


def by_dpo_trainer(kinds, weights, options, chosen, rejected, reference):
    """DPOTrainer's loss of one pair; its rows have a token of the question first."""
    length = max(len(chosen), len(rejected))
    logps, mask = torch.zeros(2, length, dtype=torch.float64), torch.zeros(2, 1 + length, dtype=torch.int64)
    for row, side in enumerate((chosen, rejected)):
        logps = torch.cat([logps[:row], torch.cat([side, logps[row, len(side) :]])[None], logps[row + 1 :]])
        mask[row, 1 : 1 + len(side)] = 1
    zeros = torch.zeros_like(logps)
    outputs = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=kinds,
        loss_weights=weights,
        label_smoothing=0.0,
        use_weighting=False,
        beta=options["beta"],
        args=SimpleNamespace(),
        _metrics=Metrics(),
        _total_train_tokens=0,
    )
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs |= {"ref_chosen_logps": reference[:1], "ref_rejected_logps": reference[1:]}
    return dpo_trainer.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)


def by_cpo_trainer(kind, options, chosen, rejected):
    """CPOTrainer's, of the figures of both answers."""
    smoothing = options.get("label_smoothing", 0.0)
    trainer = SimpleNamespace(alpha=0.0, accelerator=ACCELERATOR, loss_type=kind, beta=options["beta"], label_smoothing=smoothing)
    trainer.simpo_gamma = options.get("gamma", 0.0)
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]


def loss_of(name, options, chosen, rejected, reference):
    """The loss of one pair by TRL."""
    weight = options.get("nll_weight", 0.0)
    if name == "dpo" and "label_smoothing" in options:
        return by_cpo_trainer("sigmoid", options, chosen.sum()[None] - reference[:1], rejected.sum()[None] - reference[1:])
    if name in ("dpo", "ipo"):
        kind = {"dpo": "sigmoid", "ipo": "ipo"}[name]
        return by_dpo_trainer([kind, "sft"] if weight else [kind], [1.0, weight][: 1 + bool(weight)], options, chosen, rejected, reference)
    if name == "simpo":
        return by_cpo_trainer("simpo", options, chosen.mean()[None], rejected.mean()[None])
    trainer = SimpleNamespace(beta=options["beta"], accelerator=ACCELERATOR)
    ratio = ORPOTrainer.odds_ratio_loss(trainer, chosen.mean()[None], rejected.mean()[None])[0]
    return -weight * chosen.mean() - ratio


def main():
    torch.Tensor.float = torch.Tensor.double  # ORPO's
    dpo_trainer.disable_gradient_checkpointing = lambda *_: contextlib.nullcontext()
    rng, rows = np.random.default_rng(0), []
    for name, options in CASES:
        for _ in range(3):
            sides = [-rng.gamma(2.0, 0.6, size) for size in rng.integers(1, 7, 2)]
            reference = [float(side.sum() + rng.normal(0, 2)) for side in sides]
            chosen, rejected = (torch.tensor(side, requires_grad=True) for side in sides)
            loss = loss_of(name, options, chosen, rejected, torch.tensor(reference, dtype=torch.float64)).sum()
            slopes = torch.autograd.grad(loss, [chosen, rejected])
            pair = {"chosen": sides[0].tolist(), "rejected": sides[1].tolist(), "reference": reference}
            told = {"loss": loss.item(), "by_chosen": slopes[0].tolist(), "by_rejected": slopes[1].tolist()}
            rows.append({"objective": name, "options": options, **pair, **told})
    versions = {name: importlib.metadata.version(name) for name in ("trl", "torch")}
    command = "PYTHONPATH=DIR python -m tests.trl_preferences > tests/fixtures/preferences-trl.json"
    lines = ",\n".join(map(json.dumps, rows))
    print(f'{{\n"made_with": {json.dumps(versions)},\n"command": {json.dumps(command)},\n"rows": [\n{lines}\n]\n}}')


if __name__ == "__main__":
    main()
