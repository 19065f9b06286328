"""A trained model with all that it takes to infer: where it is from, its tokenizer, a backend, its weights on the device, an engine.

Each is made when it is first asked for, so that whatever can be refused is refused before a framework is imported and before weights are
read. From `use` on everything belongs to one thread: a framework may bind its arrays to the thread that made them.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from smedjan_common.backend import Backend, Decoder
from smedjan_common.checkpoint import AVERAGED, CheckpointInfo, check_readable, keeps_averages, no_averages, read_averages, read_weights
from smedjan_common.errors import ConfigError, unknown
from smedjan_common.inference.engine import Engine
from smedjan_common.inference.memory import state_bytes
from smedjan_common.inference.open import Foreign, decoding_config, open_model
from smedjan_common.inference.room import check_room, rows_that_fit
from smedjan_common.inference.scoring import Scorer, row, windows
from smedjan_common.inference.speculation import AHEAD, MOST, Speculator
from smedjan_common.inference.ticket import Scored
from smedjan_common.model.quantization import FORMAT
from smedjan_common.tokenizer.growing import extends

DTYPES = ("auto", "float32", "bfloat16")  # to infer in

# imports a framework: -> (the backend's class, the dtype that auto means here)
Load = Callable[[], tuple[Callable[..., Backend], str]]


class OpenModel:
    """`info`, `tokenizer`: what is known before anything is computed. draft: the path of a smaller model that guesses tokens ahead, and
    draft_tokens how many (None: 4), see smedjan_common.inference.speculation. ema: take the averages of the weights that a run with --ema
    keeps: those beside the weights of a step checkpoint; final/ has them as its weights.

    Raises CheckpointError and what `open_model` raises, ConfigError for a draft that cannot be one.
    """

    def __init__(self, path: str | os.PathLike, draft: str | os.PathLike | None = None, draft_tokens: int | None = None, ema: bool = False):
        self.path = str(path)
        self.info, self.tokenizer = open_model(path)
        self._averages = ema and _averages(self.info)
        self.model = self.info.model
        self.draft, self.ahead = (None, 0) if draft is None else (OpenModel(draft), AHEAD if draft_tokens is None else draft_tokens)
        if draft_tokens is not None:
            _check_ahead(draft_tokens, self.draft)
        if self.draft and not _alike(self.tokenizer, self.draft.tokenizer):
            raise ConfigError(
                f"The draft {self.draft.path} has another tokenizer than {self.path}.",
                "Its tokens stand for other texts.",
                "Take a smaller model that was trained with the same tokenizer: smedjan hash shows it.",
            )

    @property
    def averaged(self) -> float:
        """The decay of the moving average that its weights are (--ema); 0 where they are those of a step."""
        if isinstance(self.info, Foreign):
            return 0.0
        train = self.info.train
        return train.ema if train and self._averages else float((self.info.extra or {}).get(AVERAGED) or 0.0)

    @property
    def name(self) -> str:
        """Of the run, or of the directory."""
        parts = [part for part in self.info.path.absolute().parts if part not in ("final",) and not part.startswith(("step-", "orbax-"))]
        return parts[-1]

    def use(self, name: str, load: Load, dtype: str = "float32") -> None:
        """Compute with the backend `name`, which `load` imports. dtype: auto is what is fastest on its device.

        Raises CheckpointError for a checkpoint that it cannot read, ConfigError for an unknown dtype.
        """
        if isinstance(self.info, CheckpointInfo):
            check_readable(self.info, name)
        if dtype not in DTYPES:
            raise unknown("--dtype", dtype, DTYPES)
        make_backend, auto = load()
        config = decoding_config(self.info, auto if dtype == "auto" else dtype)
        self.backend, self.dtype = make_backend(self.model, config), config.dtype
        if self.draft:
            self.draft.use(name, load, dtype)

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """The weights, on the device, as the checkpoint has them. Raises OutOfMemoryError before they are read."""
        check_room(self.info, self.backend.describe(), self.dtype, 0, 0, scores=True)
        return self.backend.place(self._read())

    def rows(self, wanted: int, length: int, keep_rows: int = 0, scores: bool = False) -> int:
        """How many of `wanted` texts of up to `length` tokens are decoded side by side: as many as memory holds, at least one. keep_rows,
        scores: as for the engine that is to have them."""
        length += 2 * self.ahead
        fit = rows_that_fit(self.info, self.backend.describe(), self.dtype, length, wanted + keep_rows, scores, self._beside)
        return max(1, fit - keep_rows)

    def engine(
        self, rows: int, prompt: int, max_tokens: int, keep_rows: int = 0, keep_answers: bool = True, scores: bool = False
    ) -> Engine:
        """An engine of `rows` rows that hold the state of `prompt` + `max_tokens` tokens each, or of the context; of what comes after,
        mixers that look back see the last ones. keep_rows: how many states of earlier texts may be kept besides. scores: prompts will be
        echoed with log-probabilities, which takes the weights as the checkpoint has them beside those that are decoded with.

        Raises OutOfMemoryError before anything is allocated.
        """
        prompt += 2 * self.ahead  # the last tokens are looked at with some to come
        check_room(self.info, self.backend.describe(), self.dtype, prompt, max_tokens, rows + keep_rows, scores, self._beside)
        length = min(prompt + max_tokens, self.model.context_length)
        keep = keep_rows * (state_bytes(self.model, 1, length, self.dtype) + 4 * self.model.vocab_size)
        return Engine(
            self._decoder(rows, length, scores),
            self.tokenizer,
            keep_bytes=keep,
            keep_answers=keep_answers,
            blocks=self._draws,
            score=self._score,
            speculator=self._speculator(rows, length) if self.draft else None,
        )

    @property
    def _beside(self) -> CheckpointInfo | Foreign | None:
        return self.draft.info if self.draft else None

    @property
    def _draws(self) -> bool:
        """Whether its device draws tokens by itself; where not, compiling that costs more."""
        return self.backend.describe().kind == "gpu" and self.model.vocab_size == self.tokenizer.vocab_size

    def _decoder(self, rows: int, length: int, scores: bool = False) -> Decoder:
        quantized = self.info.format == FORMAT  # nothing of it is cast
        shared = scores or quantized or self.dtype == "float32" or "params" in self.__dict__  # else a decoder alone holds them, cast
        return self.backend.decoder(self.params if shared else self._read(), length, rows)

    def _speculator(self, rows: int, length: int) -> Speculator:
        draft, own = self.draft, self.tokenizer
        assert draft
        decoder = draft._decoder(rows, min(length, draft.model.context_length))
        return Speculator(decoder, self.ahead, own.vocab_size, draft.tokenizer.vocab_size, draft.tokenizer.eot_id, draft._draws)

    def _read(self) -> dict[str, Any]:
        if isinstance(self.info, Foreign):
            return self.info.read()
        return read_averages(self.info) if self._averages else read_weights(self.info, self.backend.own)

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Log-probabilities of texts."""
        return Scorer(self.backend, self.params, self.model.context_length)

    def _score(self, ids: Sequence[int], top: int) -> Scored:
        """Of each token its log-probability after those before it, as far as the context reaches back, and the most probable ones."""
        array = np.asarray(ids, np.int32)
        cuts = list(windows(len(array), self.model.context_length))
        found: list[tuple[float | None, tuple[tuple[int, float], ...]]] = [(None, ())]
        for window, scores in zip(cuts, self.scorer.rows([row(array, window) for window in cuts], top), strict=True):
            for at in range(window.first - window.begin - 1, window.end - window.begin - 1):
                best = zip(scores.top_ids[at].tolist(), scores.top_logprobs[at].tolist(), strict=True)
                found.append((float(scores.logprobs[at]), tuple(best)))
        return found


def _averages(info: CheckpointInfo | Foreign) -> bool:
    """Whether the averages of the weights stand beside them. Raises CheckpointError where there are none."""
    if isinstance(info, Foreign):
        raise no_averages(info.path)
    return keeps_averages(info)


def _alike(one: Any, other: Any) -> bool:
    """Whether their tokens stand for the same texts, up to special tokens that one of them has besides."""
    return extends(one, other) or extends(other, one)


def _check_ahead(tokens: int, draft: OpenModel | None) -> None:
    if draft is None:
        raise ConfigError("--draft-tokens needs a draft.", "It says how many tokens that one guesses.", "Add --draft PATH.")
    if not 1 <= tokens <= MOST:
        raise ConfigError(f"--draft-tokens is {tokens}.", "That is out of range.", f"Take 1 to {MOST}; {AHEAD} is the default.")
