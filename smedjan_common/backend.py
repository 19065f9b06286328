"""What a backend gives to the training loop and to generation: the array work and nothing else.

A backend is made for one (ModelConfig, TrainConfig, mesh). Its train state is opaque here; on the host everything is NumPy,
keyed by the names of the parameter table. Nothing but `read`, `save`, `score`, `token_losses`, `logits` and a decoder's `feed`, `step`,
`look` and `block` waits for the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from smedjan_common.errors import OutOfMemoryError
from smedjan_common.model.config import ModelConfig
from smedjan_common.training.config import TrainConfig
from smedjan_common.training.optimizers import EMA

State = Any  # parameters, optimizer state and step, as the backend keeps them

IGNORED = -1  # a target that does not count

Metrics = dict[str, Any]  # name -> scalar or array, perhaps still being computed

LESS_TO_TRAIN = "Lower --batch-size, raise --grad-accum, or add --gradient-checkpointing full."
LESS_TO_DECODE = "Take fewer tokens: a shorter prompt, or a lower --max-tokens (--sample-tokens in training)."
LESS_TO_SCORE = "Take fewer tokens at once: a lower --batch-tokens, or a shorter --context."


def out_of_memory(text: str, fix: str) -> OutOfMemoryError:
    """The error of a device whose framework says `text`; `fix`: what takes less of it."""
    first = (text.strip() or "It said no more").splitlines()[0][:200].rstrip(".")
    return OutOfMemoryError("The device ran out of memory.", f"{first}.", fix)


@dataclass(frozen=True)
class Device:
    """Where a run happens. Unknown figures are None."""

    backend: str
    kind: str  # "gpu" or "cpu"
    name: str
    count: int = 1
    memory_bytes: int | None = None
    peak_flops: float | None = None  # dense bf16, one device
    versions: dict[str, str] = field(default_factory=dict)
    mesh: str = "data=1"  # how a run is spread over `count` devices
    visible: int = 1  # devices that there are
    shares_memory: bool = False  # a GPU whose memory is the machine's
    hosts: int = 1  # processes of the run, whose devices `count` counts
    kernels: str = ""  # what --kernels comes to; empty where nothing reads it

    @property
    def on_host(self) -> bool:
        """Whether it computes in the memory of the machine."""
        return self.kind == "cpu" or self.shares_memory


@dataclass(frozen=True)
class Snapshot:
    """A train state on the host: float32 parameters, optimizer arrays by `{slot}.{parameter}` ("mu.…", "nu.…"), steps done.

    shared: every array is in parts on several hosts, which bring it together when `np.asarray` asks for it: all at the same moment, in
    the order of checkpoint.tensors.write_order, and before the next step.
    """

    step: int
    params: dict[str, Any]
    optimizer: dict[str, Any]
    shared: bool = False

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """What is inferred with: the parameters, those of them that the optimizer averages (--ema) as their averages."""
        mark = f"{EMA}."
        return self.params | {name.removeprefix(mark): value for name, value in self.optimizer.items() if name.startswith(mark)}


class Scores(NamedTuple):
    """What a model gives to the tokens of a text, on the host: NumPy arrays of the shape of the targets.

    logprobs: float32, nats. greedy: bool, whether the target is the most probable token (among equals the one of the smallest id).
    top_ids int32, top_logprobs float32 [..., top]: the most probable tokens, falling, equals by rising id. Of an IGNORED target: 0,
    False, 0, 0.
    """

    logprobs: np.ndarray
    greedy: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


class Saved(Protocol):
    """What a row of a decoder has seen, on the device: of a model by position no longer than that."""

    @property
    def position(self) -> int:
        """Tokens that it has seen."""
        ...

    @property
    def nbytes(self) -> int:
        """Device memory that it holds."""
        ...


class Decoder(Protocol):
    """Token-by-token inference of `rows` sequences side by side, each at its own position; their decode states are on the device.

    max_len: positions whose state a row holds. Past it mixers that keep something of each position see a sliding window of the last
    max_len ones (block-sparse: of whole blocks), recurrent ones all: `feed` and `step` go on without end. What a row gives does not
    depend on the others: in float32, for the same number of rows, not by one bit.

    can_rewind: a row can go back, since all its state is by position. endless: none is, so that nothing is overwritten past max_len.
    """

    rows: int
    max_len: int
    can_rewind: bool
    endless: bool

    def position(self, row: int = 0) -> int:
        """Tokens that a row has consumed. The host knows; nothing is waited for."""
        ...

    def feed(self, ids: Sequence[int], row: int = 0) -> np.ndarray:
        """One row consumes one or more tokens, not none: the logits after the last one, float32 [vocab_size]."""
        ...

    def step(self, tokens: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Every row consumes one of the tokens, int [rows], where `active`, bool [rows]: logits, float32 [rows, vocab_size]. The others
        keep their state bit for bit; their logits say nothing."""
        ...

    def look(self, tokens: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Every row reads T tokens, int [rows, T], where `active`, and stays where it is: logits after each, float32 [rows, T, vocab_size].
        For rows that come to no more than max_len, unless `endless`. What was looked at counts until the next call but `keep`."""
        ...

    def keep(self, counts: np.ndarray) -> None:
        """After a `look`: rows consume the first `counts`, int [rows], of its tokens; where not `can_rewind`, all of them or none."""
        ...

    def block(self, rows: Sequence[Any], steps: int) -> list[Any]:
        """Some rows draw up to `steps` tokens by themselves, on the device: what each is to do (smedjan_common.inference.drawing.Draw, each
        row once at most) -> what it drew (Drawn). For requests of which drawing.on_device says so; few different `steps`, since each is
        compiled."""
        ...

    def reset(self, row: int | None = None) -> None:
        """A row, or all, forgets everything."""
        ...

    def rewind(self, row: int, position: int) -> bool:
        """Forget what came after `position`, which is not past the row's. False, and nothing changes, where what it needs is overwritten:
        the row is past max_len. Only where `can_rewind`."""
        ...

    def save(self, row: int) -> Saved:
        """What a row has seen, to be loaded later, into any row of this decoder."""
        ...

    def load(self, row: int, saved: Any) -> None:
        """The row has seen what was saved (what `save` of this decoder gave), and nothing else."""
        ...


class OwnFormat(Protocol):
    """A backend's own way to store its arrays, beside the neutral one that all backends share (smedjan_common.checkpoint.own)."""

    name: str

    def tensors(self, state: State) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters, and optimizer arrays named as a Snapshot's, where they are."""
        ...

    def begin(self, state: State, folder: Path) -> Callable[[], None]:
        """Start to write the state into the new `folder`; it may change once this returns. What is returned waits for the end.
        Both raise OSError."""
        ...

    def read(self, folder: Path) -> State:
        """The state, bit for bit, on the devices of this run. Raises CheckpointError."""
        ...

    def read_params(self, folder: Path, on_host: bool = False) -> dict[str, Any]:
        """The parameters alone, whatever model they are of. on_host: as NumPy; else those that have the shapes of the run may lie on its
        devices, on several hosts in parts. Raises CheckpointError."""
        ...


class Backend(Protocol):
    """The protocol. `inputs` and `targets` are int32 [batch_size, seq_len]; a target that is IGNORED does not count.

    `documents`, int32 of the same shape, numbers the documents of each row; nothing is read across them. None: a row is one.
    `reference`, float32 [batch_size, M], is what another model gives to the documents of each row, for objectives that need one.
    """

    name: str
    model: ModelConfig
    train: TrainConfig

    @property
    def rows(self) -> np.ndarray | None:
        """The rows of each batch that this process trains on, of a run of several hosts; None: all."""
        ...

    @property
    def own(self) -> OwnFormat | None:
        """Its own form of checkpoint. None: the neutral one is."""
        ...

    def describe(self) -> Device:
        """The device, its memory and peak FLOP/s, and the versions of the frameworks."""
        ...

    def meet(self, wait: Callable[[], object]) -> None:
        """Open the channels to the other hosts of the run, of which `wait` waits for all: frameworks give up soon where one comes late."""
        ...

    def init(self, params: dict[str, np.ndarray]) -> State:
        """A fresh train state at step 0 around these float32 parameters."""
        ...

    def restore(self, snapshot: Snapshot) -> State:
        """The train state of a snapshot, bit for bit. Raises CheckpointError where its optimizer arrays are not those of the run."""
        ...

    def learn_from(self, teacher: ModelConfig, params: dict[str, Any], known: int) -> None:
        """Steps from now on learn from this model too, as training/distillation.py says, by the options of TrainConfig. For objectives
        without a formula, before the first step. `teacher` has as many tokens as the model; known: how many of the first mean something
        to both. params: host or device arrays. Raises ConfigError where it cannot be spread as the model is."""
        ...

    def train_step(
        self,
        state: State,
        inputs: np.ndarray,
        targets: np.ndarray,
        lr: float,
        documents: np.ndarray | None = None,
        reference: np.ndarray | None = None,
        stop: int = 0,
    ) -> tuple[State, Metrics]:
        """One optimizer step (gradient accumulation inside) on the batch, or on those rows of it that `rows` says. Metrics: loss (mean
        cross-entropy of counted tokens, nats, or that of the objective, with its metrics, over its units: training/objectives.py), kl and
        ce with a teacher, grad_norm (before clipping), tokens; of a model with experts expert_load [layers, experts] (shares of the
        choices) and, with the softmax router, balance_loss and router_z_loss (means over the layers, unweighted); of several hosts stop,
        the largest of what they gave. Returns at once; the old state is consumed."""
        ...

    def eval_step(
        self,
        state: State,
        inputs: np.ndarray,
        targets: np.ndarray,
        documents: np.ndarray | None = None,
        reference: np.ndarray | None = None,
    ) -> Metrics:
        """Metrics of one batch with the parameters of `params_of`: loss_sum (nats) and tokens; of an objective with a formula its loss,
        units and metrics, sums all. Returns at once."""
        ...

    def token_losses(
        self, params: dict[str, Any], inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None = None
    ) -> np.ndarray:
        """The loss of each target, float32 [B, T], 0 where it does not count, by the very forward pass of training, over the padded head:
        bit for bit what a step of these weights has. `params` as for `decoder`. Of several hosts all take part, each has the whole batch
        and computes its own rows, and all get the whole."""
        ...

    def read(self, metrics: Metrics) -> dict[str, Any]:
        """Wait for metrics and bring them to the host: floats, and nested lists of floats."""
        ...

    def save(self, state: State) -> Snapshot:
        """Wait for the state and bring it to the host."""
        ...

    def place(self, params: dict[str, Any]) -> dict[str, Any]:
        """Host or device parameters on the device: who scores or decodes more than once sends them there once."""
        ...

    def score(
        self, params: dict[str, Any], inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None = None, top: int = 0
    ) -> Scores:
        """Log-probabilities of the targets [B, T], or of several each [B, T, K], over the model's own `vocab_size` tokens: the rows that
        pad the head take no part. Logits are made where a target counts, in pieces. `params` as for `decoder`."""
        ...

    def logits(self, params: dict[str, Any], inputs: np.ndarray) -> np.ndarray:
        """Logits of the next token at every position, float32 [B, T, vocab_size]."""
        ...

    def decoder(self, params: dict[str, Any], max_len: int, rows: int = 1) -> Decoder:
        """A decoder over host or device parameters (a snapshot's `params`, or `params_of(state)`)."""
        ...

    def params_of(self, state: State) -> dict[str, Any]:
        """The parameters inside a state to infer with, where they are: as Snapshot.weights."""
        ...

    def peak_memory(self) -> int | None:
        """Largest device memory in use so far, bytes; on a CPU the most that the process ever held. None when it is not known."""
        ...
