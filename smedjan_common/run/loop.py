"""The training loop, written once: everything that is not array work.

The device never waits for the host: a step is dispatched before the metrics of the one before are read, and at most IN_FLIGHT
steps are queued. Evaluation, samples and checkpoints drain the queue; their time is not counted in tokens_per_second.
A checkpoint's state is taken between two steps and written while the next ones run; a failure surfaces at the step after it.
Batch and learning rate are functions of the step, so a resumed run is the same run.
"""

import contextlib
import functools
import math
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smedjan_common.backend import Backend, Metrics, Snapshot, State
from smedjan_common.checkpoint import Background, latest_checkpoint, read_state, read_weights
from smedjan_common.checkpoint.new_rows import with_new_rows
from smedjan_common.data.batches import batches, held_out
from smedjan_common.errors import NotFiniteError, OutOfMemoryError, SmedjanError
from smedjan_common.files.atomic_directory import remove_leftovers
from smedjan_common.files.names import FINAL, METRICS
from smedjan_common.inference.engine import Engine
from smedjan_common.inference.request import Request
from smedjan_common.inference.sampling import Sampling
from smedjan_common.model.flops import forward_flops_per_token, train_flops_per_token
from smedjan_common.model.params import draw
from smedjan_common.reporting.console import duration, eval_line, printable, say, step_line
from smedjan_common.reporting.displays import make_screen
from smedjan_common.reporting.meter import Meter, RunningMean, Span, timed
from smedjan_common.reporting.metrics import MetricsFile, Row, resumed, routing
from smedjan_common.reporting.pace import Pace
from smedjan_common.reporting.screen import COMPILING, EVALUATING, SAMPLING, SAVING, Screen
from smedjan_common.reporting.status import Status
from smedjan_common.reporting.trackers.thread import begin_tracking
from smedjan_common.run.ending import ending
from smedjan_common.run.evaluate import evaluate
from smedjan_common.run.falling import Falling
from smedjan_common.run.folder import RunConfig, RunFolder
from smedjan_common.run.hosts import ALONE, Hosts
from smedjan_common.run.signals import StopSignals
from smedjan_common.tokenizer.chat import template_of
from smedjan_common.training import distillation
from smedjan_common.training.objectives import OBJECTIVES
from smedjan_common.training.schedule import learning_rate

IN_FLIGHT = 4
_HELLO = "Hello!"  # what a sample of a run that learns answers asks, where --sample-prompt says nothing else
SINCE_LINE = "loss_since_line"  # in a checkpoint's "extra"


def run(config: RunConfig, backend: Backend, hosts: Hosts = ALONE) -> int:
    """Train to the last step, or until SIGINT, SIGTERM or SIGHUP; returns the exit code: 0, or 130/143/129 after saving.

    Raises NotFiniteError, OutOfMemoryError, CheckpointError; nothing saved before is lost by any of them.
    """
    status, pace = Status(config.checkpoint_dir, config.train.steps), Pace(config.train.steps, _cadence(config))
    with StopSignals() as stop, make_screen(status, pace) as screen:
        stop.announce, stop.drawn = screen.announce, screen.drawn
        return _Loop(config, backend, stop, screen, hosts).run()


def _cadence(config: RunConfig) -> dict[str, int]:
    """What is done beside steps, and after how many of them."""
    evaluates = config.eval_every if config.val_data else 0
    return {EVALUATING: evaluates, SAMPLING: config.sample_every, SAVING: config.checkpoint_every}


@dataclass
class _Loop:
    config: RunConfig
    backend: Backend
    stop: StopSignals
    screen: Screen
    hosts: Hosts = ALONE
    queue: deque[tuple[int, float, Metrics, Span]] = field(default_factory=deque)  # (step, lr, metrics, when) dispatched, not read yet
    last: Row = field(default_factory=dict)  # newest figures, for checkpoint.json
    saved: int | None = None  # step of the newest checkpoint, written or being written
    kept: int | None = None  # step of the newest checkpoint that is whole
    compiling: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # open from the first step until it is complete
    writes: Background = field(default_factory=Background)
    told_validation: bool = False  # that its loss is not finite
    initial: str | None = None  # digest of the initial values, where this start drew them

    def __post_init__(self) -> None:
        self.begun = time.perf_counter()
        self.told = (*OBJECTIVES[self.config.train.objective].metrics, *(distillation.METRICS if self.config.teacher else ()))
        self.status, self.pace = self.screen.status, self.screen.pace
        self.begin = self.reached = 0  # steps done when the run began, and dispatched by now
        self.stop.lost = self.lost
        self.model, self.train = self.config.model, self.config.train
        self.device = self.backend.describe()
        self.folder = RunFolder(self.config, self.device, self.hosts)
        self.hosts.lost_work, self.hosts.writing = self.lost, self.writing_alone
        self.agreed = 0  # of several hosts: the signal by which all stop after the same step
        train = self.train
        cut = train.seq_len, train.batch_size, train.seed, train.packing, train.mask_documents
        self.batches = batches(self.config.train_data, *cut, self.config.reference.train)
        self.falling = Falling(train, self.config.reference.train is not None)
        self.tokens_per_step = self.train.batch_size * self.train.seq_len
        self.meter = Meter(self.tokens_per_step)
        start = self.config.start
        self.mean_loss = RunningMean.of((start.extra or {}).get(SINCE_LINE) if start else None)
        peak = self.device.peak_flops
        self.peak_flops = peak * self.device.count if peak else None
        self.flops_per_token = train_flops_per_token(self.model, self.train.seq_len, adapters=self.train.adapters)
        if teacher := self.config.teacher:
            self.flops_per_token += forward_flops_per_token(teacher.model, self.train.seq_len)

    def run(self) -> int:
        if self.hosts.first:
            remove_leftovers(self.config.checkpoint_dir)  # of a run that was killed while it saved
        state, self.begin = self.hosts.together("start", self.start)
        self.reached = self.begin
        if self.train.ema:
            say(f"Validation, samples and {FINAL}/ take the moving average of the weights (--ema {self.train.ema:g}).")
        config = self.folder.write_config(self.initial)
        self.metrics = MetricsFile(self.config.checkpoint_dir, self.begin, self.config.history, self.hosts.first)
        self.elapsed_before = max((row.get("elapsed_seconds") or 0.0 for row in self.metrics.rows), default=0.0)
        self.trackings = begin_tracking(
            self.config.tracker if self.hosts.first else (), self.config.checkpoint_dir, self.begin, config, say
        )
        code = 1  # of a run that ends by an error, to trackers
        try:
            while self.reached < self.train.steps and not self.stopping:
                self.reached += 1
                state = self.step(state, self.reached)
            self.stop.speak()
            self.drain(0)
            code = self.finish(state, self.reached, self.reached > self.begin)
            return code
        finally:
            for tracking in self.trackings:
                tracking.finish(code)
            self.metrics.close()
            self.abandon()

    def writing_alone(self) -> bool:
        """Whether a checkpoint is being written that needs no other host."""
        return self.writes.busy() and self.config.checkpoint_format == "neutral"

    @property
    def stopping(self) -> int:
        """The signal by which the run stops, 0 for none: of several hosts one that all know of."""
        return self.stop.received if self.hosts.alone else self.agreed

    def start(self) -> tuple[State, int]:
        """The state that the run begins with, and its step."""
        if teacher := self.config.teacher:
            self.backend.learn_from(teacher.model, teacher.weights(self.backend.own), teacher.known)
            say(f"Learning from {teacher.info.path} too.")
        if info := self.config.start:
            say(f"Going on from {info.path}, step {info.step} of {self.train.steps}.")
            self.saved = self.kept = info.step if info.path.parent == self.config.checkpoint_dir else None
            return read_state(info, self.backend), info.step
        if info := self.config.pretrained:
            say(f"Starting from the weights of {info.path}.")
            gained, tokenizer = self.config.gained, self.config.tokenizer
            weights = read_weights(info, self.backend.own, on_host=gained > 0)
            if gained:
                say(f"The tokenizer has {gained} tokens more; their rows begin as the mean of the others.")
                weights = with_new_rows(weights, self.model, tokenizer.vocab_size - gained, tokenizer.vocab_size)
            return self.backend.init(weights), 0
        params, self.initial = draw(self.model, self.train.seed)
        return self.backend.init(params), 0

    def step(self, state: State, step: int) -> State:
        """One step, and what is due after it."""
        if step == self.begin + 1:
            state = self.first_step(state, step)
        else:
            state = self.dispatch(state, step)
            self.written()
            self.drain(1 if self.is_logged(step - 1) else IN_FLIGHT)
        self.after(state, step)
        if self.stop.asked:
            self.stop.asked = False
            say(self.status.line())
        return state

    def first_step(self, state: State, step: int) -> State:
        """The step that the framework compiles: it is waited for."""
        if info := self.config.start:
            self.metrics.write(resumed(self.begin, self.backend.name, info.framework.get("name")))
        with self.compiling:
            self.compiling.enter_context(self.screen.doing(COMPILING))
            state = self.dispatch(state, step)
            self.drain(0)
        self.meter.start(step)
        return state

    def dispatch(self, state: State, step: int) -> State:
        """Queue one optimizer step on the device."""
        lr = learning_rate(self.train, step - 1)
        batch = self.batches.batch(step - 1, self.backend.rows)
        arrays = batch.inputs, batch.targets, lr, *batch[2:]
        said = {} if self.hosts.alone else {"stop": self.stop.received}
        (state, metrics), when = timed(functools.partial(self.backend.train_step, **said), state, *arrays)
        self.queue.append((step, lr, metrics, when))
        return state

    def drain(self, leave: int) -> None:
        """Read the oldest metrics until only `leave` steps are in flight; log and check them."""
        while len(self.queue) > leave:
            step, lr, metrics, dispatched = self.queue.popleft()
            values, read = timed(self.backend.read, metrics)
            self.compiling.close()
            self.agreed = self.agreed or int(values.pop("stop", 0))
            self.check_finite(step, values)
            self.last |= {"step": step, "loss": self.mean_loss.add(values["loss"])}
            self.pace.stepped(read.ended)
            self.status.step, self.status.left = step, self.pace.left(step)
            self.status.figures |= {"lr": lr, "grad_norm": values["grad_norm"]}
            if told := self.falling.add(values):
                say(told)
            if self.is_logged(step):
                self.log(step, lr, values, self.meter.lap(step, dispatched, read))
                self.mean_loss.clear()

    def is_logged(self, step: int) -> bool:
        every = self.config.log_every
        return step in (1, self.train.steps) or (every > 0 and step % every == 0)

    def log(self, step: int, lr: float, values: dict[str, Any], speed: float | None) -> None:
        row = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "loss": self.last["loss"],
            "batch_loss": values["loss"],
            "lr": lr,
            "grad_norm": values["grad_norm"],
            "tokens_per_second": speed,
            "mfu": speed * self.flops_per_token / self.peak_flops if speed and self.peak_flops else None,
            "peak_memory_bytes": self.backend.peak_memory(),
            "elapsed_seconds": self.elapsed_before + time.perf_counter() - self.begun,
            **routing(values),
            **{name: values[name] for name in self.told if name in values},
        }
        self.report(row)
        self.status.figures |= row
        say(step_line(row, self.train.steps, None if self.screen.drawn else self.status.left))

    def report(self, row: Row) -> None:
        """Into metrics.jsonl, and to the trackers."""
        self.metrics.write(row)
        for tracking in self.trackings:
            tracking.log(row)

    def check_finite(self, step: int, values: dict[str, Any]) -> None:
        for name, what in (("loss", "The loss is"), ("grad_norm", "The norm of the gradients is")):
            if not math.isfinite(values[name]):
                self.written(wait=True)
                good = latest_checkpoint(self.config.checkpoint_dir, verify=False)
                where = f"The newest good checkpoint is {good}" if good else "There is no checkpoint yet"
                raise NotFiniteError(
                    f"{what} {values[name]} at step {step}.",
                    "The run has diverged; this state is not saved.",
                    f"{where}: go on with a lower --lr, a longer --warmup or a smaller --clip-norm.",
                )

    def after(self, state: State, step: int) -> None:
        """What is due after a step: validation, a sample, a checkpoint."""
        last = step == self.train.steps
        evaluates = self.config.val_data is not None and self.config.eval_every > 0 and (last or step % self.config.eval_every == 0)
        samples = self.config.sample_every > 0 and (last or step % self.config.sample_every == 0)
        saves = last or (self.config.checkpoint_every > 0 and step % self.config.checkpoint_every == 0)
        if not (evaluates or samples or saves):
            return
        self.drain(0)
        with self.meter.paused():
            if evaluates:
                with self.screen.doing(EVALUATING):
                    self.evaluate(state, step)
            if samples:
                with self.screen.doing(SAMPLING):
                    self.sample(state, step)
            if saves and not last:
                with self.screen.doing(SAVING):
                    self.save(state, step)

    def evaluate(self, state: State, step: int) -> None:
        assert self.config.val_data is not None
        parts = self.train.grad_accum  # as much memory as training takes
        batches_of = held_out(
            self.config.val_data,
            self.train.seq_len,
            self.train.batch_size // parts,
            self.config.eval_batches * parts,
            self.train.mask_documents,
            self.config.reference.val,
        )
        row = {"step": step, **evaluate(self.backend, state, batches_of, self.config.tokenizer.token_bytes())}
        self.report(row)
        self.last |= {"val_loss": row["val_loss"], "val_bits_per_byte": row["val_bits_per_byte"]}
        self.status.figures |= self.last
        if row["val_loss"] is not None:
            say(eval_line(row, self.train.steps))
        elif not self.told_validation:
            self.told_validation = True
            say(f"note: the validation loss of step {step} is not finite; {METRICS} has null for it. This is said once.")

    def sample(self, state: State, step: int) -> None:
        tokenizer, asked = self.config.tokenizer, self.config.sample_prompt
        template = template_of(None, tokenizer) if self.config.objective != "lm" else None
        if template:
            asked = asked or _HELLO
            prompt, shown = template.encode(tokenizer, [{"role": "user", "content": asked}]), f"{asked}\n"
        else:
            prompt, shown = tokenizer.begin(asked), asked
        length = min(len(prompt) + self.config.sample_tokens, self.model.context_length)
        sampling, stop_ids = Sampling(temperature=0.8, seed=self.train.seed), template.stop_ids(tokenizer) if template else None
        request = Request(prompt, max(0, length - len(prompt)), sampling, special=not template, stop_ids=stop_ids)
        try:
            engine = Engine(self.backend.decoder(self.backend.params_of(state), length), tokenizer, reuse=False)
            ticket = engine.submit(request)
            text = shown + "".join(piece.text for _, piece in engine.answer([ticket]))
            if ticket.error:
                raise ticket.error
        except (NotFiniteError, OutOfMemoryError) as error:  # whether the run itself goes on is for its next step to say
            say(f"note: no sample: {error.what}")
            return
        self.folder.save_sample(step, text)
        for tracking in self.trackings:
            tracking.text(step, text)
        say("  | " + printable(text).rstrip("\n").replace("\n", "\n  | "))

    def save(self, state: State, step: int, snapshot: Snapshot | None = None) -> None:
        """Take the state for a step checkpoint, which is written from here on; redraw the plot. snapshot: the state where it is known."""
        self.written(wait=True)
        metrics, rows, extra = dict(self.last), list(self.metrics.rows), {SINCE_LINE: self.mean_loss.to_json()}
        if step == self.saved:
            self.folder.draw(rows)
            return
        own = self.backend.own
        if own and own.name == self.config.checkpoint_format:
            write = self.folder.start_own(own, state, step, metrics, extra)
        else:
            snapshot = snapshot or self.backend.save(state)
            write = functools.partial(self.folder.save, snapshot, metrics, extra)
        self.saved = step

        def write_and_draw() -> Path:
            path = write()
            self.kept = step
            self.folder.draw(rows)
            return path

        if snapshot and snapshot.shared:
            say(f"saved {write_and_draw()}")  # while nobody takes a step
            return
        self.writes.start(write_and_draw)

    def written(self, wait: bool = False) -> None:
        """Tell of a checkpoint that has been written since. Raises CheckpointError when it could not be."""
        if path := self.writes.take(wait):
            say(f"saved {path}")

    def lost(self) -> str:
        """What a process that ended now would lose."""
        safe = self.begin if self.kept is None else self.kept
        if self.reached == safe:
            return "Nothing is lost."
        steps = f"Step {self.reached} is" if self.reached == safe + 1 else f"Steps {safe + 1} to {self.reached} are"
        return f"{steps} lost: " + (f"the same command goes on from step {safe}." if safe else "there is no checkpoint yet.")

    def abandon(self) -> None:
        """The run ends by an error: what is being written may still become whole, and its own failure is only told."""
        try:
            self.written(wait=True)
        except SmedjanError as error:
            say(f"note: {error}")

    def finish(self, state: State, step: int, moved: bool) -> int:
        """The last checkpoint, and `final/` when all steps are done."""
        if finished := step == self.train.steps:
            with self.screen.doing(SAVING):
                snapshot = self.backend.save(state)
                self.save(state, step, snapshot)
                self.written(wait=True)
                say(f"saved {self.folder.save_final(snapshot, self.last)}")
        elif moved:
            with self.screen.doing(SAVING):
                self.save(state, step)
                self.written(wait=True)
        seconds = time.perf_counter() - self.begun
        if not self.hosts.alone:
            self.stop.received = self.agreed
        if finished:
            say(f"Done: {step} steps in {duration(self.elapsed_before + seconds)}.")
        else:
            say(f"Stopped after step {step} of {self.train.steps}{self.stop.by}. The same command goes on from here.")
        say(ending(self.config.checkpoint_dir, self.metrics.rows, self.pace, seconds, finished))
        return self.stop.exit_code
