"""A NumPy backend that really learns: a bigram model, logits = E[x] E^T over the table's `embed.weight` [V, D], with AdamW.

The other parameters of the model stay as they are, so checkpoints are whole. Faults can be asked for through the environment:
SMEDJAN_FAKE=nan_at=17, grad_nan_at=17, oom_at=17, seconds=0.05 (of each step), long_at=6 and long=30 (seconds
of that step), nan_logits=1, reference_stops_at=2 (batches of a reference pass), decode_oom=1, decode_seconds=0.05 (of each token),
val_nan=1; several with commas.
"""

import os
import time
from dataclasses import dataclass

import numpy as np

from smedjan_common.backend import Device, Snapshot
from smedjan_common.errors import OutOfMemoryError
from smedjan_common.inference.pieces import scores_in_pieces
from smedjan_common.training.objectives import OBJECTIVES, Rows


class BigramBackend:
    """The Backend protocol. `events` records the order of dispatching and reading."""

    name = "fake"
    own = rows = None

    def __init__(self, model, train, mesh=None):
        self.model, self.train, self.events, self.teacher = model, train, [], None
        self.faults = dict(pair.split("=") for pair in os.environ.get("SMEDJAN_FAKE", "").split(",") if pair)

    def meet(self, wait):
        wait()

    def describe(self):
        return Device("fake", "cpu", "abacus", 1, 1 << 30, 1e9, {"numpy": np.__version__})

    def init(self, params):
        zeros = {f"{slot}.{name}": np.zeros_like(value) for slot in ("mu", "nu") for name, value in params.items()}
        zeros |= {f"ema.{name}": value.copy() for name, value in params.items() if self.train.ema}
        return {"step": 0, "params": {name: value.copy() for name, value in params.items()}, "optimizer": zeros}

    def restore(self, snapshot):
        copies = ({name: value.copy() for name, value in part.items()} for part in (snapshot.params, snapshot.optimizer))
        return dict(zip(("step", "params", "optimizer"), (snapshot.step, *copies), strict=True))

    def learn_from(self, teacher, params, known):
        self.teacher = params["embed.weight"][:known]

    def train_step(self, state, inputs, targets, lr, documents=None, reference=None):
        step = state["step"] + 1
        self.events.append(("dispatch", step))
        time.sleep(float(self.faults.get("long" if step == int(self.faults.get("long_at", -1)) else "seconds", 0)))
        if step == int(self.faults.get("oom_at", -1)):
            raise OutOfMemoryError("The device ran out of memory.", "It is an abacus.", "Lower --batch-size.")
        row, told = OBJECTIVES[self.train.objective], {}
        if row.formula:
            loss, gradient, told = self._weighed(row, state, inputs, targets, documents, reference)
        else:
            loss, gradient = bigram_loss(state["params"]["embed.weight"], inputs.ravel(), targets.ravel())
        if self.teacher is not None:
            told = {"kl": float(np.abs(self.teacher).mean()), "ce": loss}
        self._adamw(state, gradient, lr, step)
        state["step"] = step
        loss = np.nan if step == int(self.faults.get("nan_at", -1)) else loss
        norm = np.inf if step == int(self.faults.get("grad_nan_at", -1)) else np.linalg.norm(gradient)
        return state, {"loss": loss, "grad_norm": norm, "tokens": inputs.size, "of_step": step, **told}

    def _weighed(self, row, state, inputs, targets, documents, reference):
        """Loss, gradient and metrics of an objective with a formula."""
        nll, embed = self.token_losses(state["params"], inputs, targets), state["params"]["embed.weight"]
        weighed = row.formula(np, Rows(nll, targets, documents, reference), self.train)
        units = max(row.units(np, targets, documents, reference), 1)
        counted = targets.ravel() >= 0
        weights = weighed.weights.ravel()[counted] / units
        gradient = bigram_loss(embed, inputs.ravel()[counted], targets.ravel()[counted], weights)[1]
        return float(weighed.loss / units), gradient, {name: value / units for name, value in weighed.metrics.items()}

    def token_losses(self, params, inputs, targets, documents=None):
        self.events.append(("token_losses", len(inputs)))
        if "reference_stops_at" in self.faults and len(self.events) > int(self.faults["reference_stops_at"]):
            raise KeyboardInterrupt
        embed = params["embed.weight"]
        logits = embed[inputs] @ embed.T
        logits -= logits.max(-1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = np.take_along_axis(logprobs, np.maximum(targets, 0)[..., None], -1)[..., 0]
        return np.where(targets >= 0, -picked, 0).astype(np.float32)

    def _adamw(self, state, gradient, lr, step):
        weight, train = state["params"]["embed.weight"], self.train
        mu, nu = (state["optimizer"][f"{slot}.embed.weight"] for slot in ("mu", "nu"))
        mu += (1 - train.beta1) * (gradient - mu)
        nu += (1 - train.beta2) * (gradient**2 - nu)
        scaled = mu / (1 - train.beta1**step) / (np.sqrt(nu / (1 - train.beta2**step)) + train.eps)
        weight -= np.float32(lr) * (scaled + train.weight_decay * weight)
        for name, value in state["params"].items() if train.ema else ():
            decay = np.float32(min(train.ema, step / (9 + step)))
            state["optimizer"][f"ema.{name}"] += (1 - decay) * (value - state["optimizer"][f"ema.{name}"])

    def eval_step(self, state, inputs, targets, documents=None, reference=None):
        row = OBJECTIVES[self.train.objective]
        if row.formula:
            nll = self.token_losses(state["params"], inputs, targets)
            weighed = row.formula(np, Rows(nll, targets, documents, reference), self.train)
            sums = {"loss_sum": weighed.loss, "tokens": (targets >= 0).sum(), "units": row.units(np, targets, documents, reference)}
            return sums | weighed.metrics
        counted = targets.ravel() >= 0
        loss, _ = bigram_loss(self.params_of(state)["embed.weight"], inputs.ravel()[counted], targets.ravel()[counted])
        loss = np.nan if "val_nan" in self.faults else loss
        return {"loss_sum": loss * counted.sum(), "tokens": counted.sum()}

    def read(self, metrics):
        if "of_step" in metrics:
            self.events.append(("read", metrics["of_step"]))
        return {name: float(value) for name, value in metrics.items()}

    def save(self, state):
        copy = self.restore(Snapshot(**state))
        return Snapshot(copy["step"], copy["params"], copy["optimizer"])

    def params_of(self, state):
        return Snapshot(**state).weights

    def place(self, params):
        return params

    def score(self, params, inputs, targets, documents=None, top=0):
        logits = self.logits(params, inputs).reshape(-1, self.model.vocab_size)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))

        def piece(places, chosen):
            its = logprobs[places]
            ids = np.argsort(-its, axis=-1, kind="stable")[:, :top]
            return its[range(len(its)), chosen], its.argmax(-1) == chosen, ids, np.take_along_axis(its, ids, axis=-1)

        return scores_in_pieces(targets, self.model.vocab_size, top, piece)

    def logits(self, params, inputs):
        embed = params["embed.weight"] * np.float32(np.nan if "nan_logits" in self.faults else 1)
        return (embed[inputs] @ embed.T)[..., : self.model.vocab_size]

    def decoder(self, params, max_len, rows=1):
        if "decode_oom" in self.faults:
            raise OutOfMemoryError("The device ran out of memory.", "It is an abacus.", "Lower --max-tokens.")
        embed = params["embed.weight"] * (np.nan if "nan_logits" in self.faults else 1)
        return BigramDecoder(embed, self.model.vocab_size, max_len, rows, float(self.faults.get("decode_seconds", 0)))

    def peak_memory(self):
        return 4096


@dataclass(frozen=True)
class BigramSaved:
    position: int
    last: int
    nbytes: int = 8


class BigramDecoder:
    """Looks at the last token only."""

    can_rewind, endless = False, True  # the token before is not kept

    def __init__(self, embed, vocab_size, max_len, rows=1, seconds=0.0):
        self.embed, self.vocab_size, self.max_len, self.rows, self.seconds = embed, vocab_size, max_len, rows, seconds
        self.reset()

    def reset(self, row=None):
        if row is None:
            self.positions, self.last = np.zeros(self.rows, int), np.zeros(self.rows, int)
        else:
            self.positions[row] = self.last[row] = 0

    def position(self, row=0):
        return int(self.positions[row])

    def feed(self, ids, row=0):
        assert len(ids), "nothing was fed"
        self.positions[row] += len(ids)
        self.last[row] = ids[-1]
        return (self.embed @ self.embed[ids[-1]])[: self.vocab_size]

    def step(self, tokens, active):
        time.sleep(self.seconds)
        logits = np.zeros((self.rows, self.vocab_size), np.float32)
        for row in np.flatnonzero(active):
            logits[row] = self.feed(tokens[row : row + 1], row)
        return logits

    def look(self, tokens, active):
        time.sleep(self.seconds)
        self.looked = tokens
        return (self.embed[tokens] @ self.embed.T)[..., : self.vocab_size]

    def keep(self, counts):
        for row in np.flatnonzero(counts):
            self.feed(self.looked[row], row)

    def rewind(self, row, position):
        raise AssertionError("it cannot")

    def save(self, row):
        return BigramSaved(self.position(row), int(self.last[row]))

    def load(self, row, saved):
        self.positions[row], self.last[row] = saved.position, saved.last


def bigram_loss(embed, inputs, targets, weights=None):
    """Mean cross-entropy in nats, and its gradient [V, D]; with a weight for each token the gradient of the weighted sum."""
    hidden = embed[inputs]
    logits = hidden @ embed.T
    logits -= logits.max(-1, keepdims=True)
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(-1, keepdims=True)
    rows = np.arange(len(targets))
    loss = -np.log(probabilities[rows, targets]).mean()
    probabilities[rows, targets] -= 1
    probabilities *= 1 / len(targets) if weights is None else weights[:, None]
    gradient = probabilities.T @ hidden
    np.add.at(gradient, inputs, probabilities @ embed)
    return float(loss), gradient.astype(np.float32)


def load(deterministic=False):
    """What smedjan_{jax,mlx}.train.load gives."""
    return BigramBackend, "float32"
