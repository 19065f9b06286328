"""lm-evaluation-harness asks, smedjan answers: a model that its tasks run on (extra `lm-eval`), by its own rules.

What differs from smedjan's own questions: nothing stands before a question, as with the harness's `hf` model, and an empty one begins
after the end-of-text token. Where a token spans the join of question and answer, the harness may be left with an empty answer and end with
an error (its issue 4055); here the text is cut where both agree, as always.

    lm = harness_model(opened);  lm_eval.simple_evaluate(model=lm, tasks=[…])
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smedjan_common.errors import ConfigError, DataError, near
from smedjan_common.evaluation.answers import generate
from smedjan_common.inference.opened import OpenModel
from smedjan_common.inference.request import Request
from smedjan_common.inference.sampling import Sampling
from smedjan_common.inference.scoring import Scorer, beginning, seam
from smedjan_common.nearby import beside

NAME = "smedjan"
MAX_TOKENS = 256  # of an answer whose task does not say


class Answering:
    """The methods of lm_eval's TemplateLM over an open model. `requests`: lm_eval's Instances, whose `args` are what is asked."""

    def __init__(self, opened: OpenModel, scorer: Scorer | None = None):
        super().__init__()
        self.opened, self.scorer = opened, scorer or opened.scorer
        self.tokens = opened.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token between documents."""
        return self.tokens.eot_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context comes after."""
        return beginning(self.tokens)

    @property
    def max_length(self) -> int:
        """The most tokens that are read at once."""
        return self.scorer.context

    @property
    def tokenizer_name(self) -> str:
        """Of the harness's cache."""
        return f"smedjan-{self.tokens.hash[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids, after what the tokenizer puts before every text; special tokens in a text are text."""
        return [*(self._before if add_special_tokens in (None, True) else ()), *self.tokens.encode(string)]

    @property
    def _before(self) -> list[int]:
        return [] if self.tokens.bos_id is None else [self.tokens.bos_id]

    def tok_decode(self, tokens: Sequence[int], **kwargs: Any) -> str:
        """Text."""
        return self.tokens.decode(tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        cut = seam(self.tokens, context, [continuation], self._before)
        return cut.context or [self.prefix_token_id], cut.continuations[0]

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        found = self.scorer.continuations([(context, continuation) for _, context, continuation in requests])
        answers = [(one.logprob, one.greedy) for one in found]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self._kept("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each after the end-of-text token, in windows that do not overlap."""
        texts = [request.args[0] for request in requests]
        scored = self.scorer.documents([np.array([self.prefix_token_id, *self.tokens.encode(text)]) for text in texts])
        sums = [float(logprobs.sum(dtype="float64")) for logprobs in scored]
        for text, total in zip(texts, sums, strict=True):
            self._kept("loglikelihood_rolling", (text,), total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to one of the stop texts."""
        texts = generate(self.opened, [self._request(*request.args) for request in requests])
        for request, text in zip(requests, texts, strict=True):
            self._kept("generate_until", request.args, text)
        return texts

    def _request(self, context: str, settings: dict[str, Any]) -> Request:
        until = settings.get("until") or []
        most = int(settings.get("max_gen_toks", settings.get("max_tokens", MAX_TOKENS)))
        chosen = bool(settings.get("do_sample")) and float(settings.get("temperature", 1.0)) > 0
        sampling = Sampling(
            temperature=float(settings.get("temperature", 1.0)) if chosen else 0.0,
            top_k=int(settings.get("top_k", 0)),
            top_p=float(settings.get("top_p", 1.0)),
            seed=int(settings.get("seed", 0)),
        )
        ids = (self.tok_encode(context) or [self.prefix_token_id])[-max(1, self.max_length - most) :]
        return Request(ids, most, sampling, stop=[until] if isinstance(until, str) else until)

    def _kept(self, kind: str, asked: Any, answer: Any) -> None:
        self.cache_hook.add_partial(kind, asked, answer)  # type: ignore[attr-defined]


@functools.cache
def model_class() -> type[Any]:
    """The class, registered with lm_eval as "smedjan". Raises ConfigError where lm_eval is not installed."""
    try:
        from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found]
        from lm_eval.api.registry import register_model  # type: ignore[import-not-found]
    except ImportError as error:
        fix = "Install it: pip install 'smedjan[lm-eval]'."
        raise ConfigError("lm-evaluation-harness is not installed.", f"{error.name or 'lm_eval'} is missing.", fix) from None
    return register_model(NAME)(type("SmedjanLM", (Answering, TemplateLM), {}))


def harness_model(opened: OpenModel, scorer: Scorer | None = None) -> Any:
    """What `lm_eval.simple_evaluate(model=…)` takes."""
    return model_class()(opened, scorer)


def run_harness(
    opened: OpenModel, scorer: Scorer, names: Sequence[str], *, shots: int | None = None, limit: int = 0, seed: int = 0
) -> dict[str, Any]:
    """The harness's results for tasks: names that it knows, YAML files, or folders of them. limit: the most questions of each, 0 all.

    Raises ConfigError where it is not installed, DataError for tasks that it does not have.
    """
    lm = harness_model(opened, scorer)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lm_eval import simple_evaluate  # type: ignore[import-not-found]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    folders = sorted({str(Path(name) if Path(name).is_dir() else Path(name).parent) for name in names if Path(name).exists()})
    manager = TaskManager(include_path=folders or None, include_defaults=any(not Path(name).exists() for name in names))
    found = simple_evaluate(
        model=lm,
        tasks=[task for name in names for task in _tasks(name, manager)],
        num_fewshot=shots,
        limit=limit or None,
        log_samples=False,
        bootstrap_iters=0,
        task_manager=manager,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert found, "this process has rank 0"
    return {name: found[name] for name in ("results", "n-shot", "n-samples", "versions", "higher_is_better") if name in found}


def _tasks(name: str, manager: Any) -> list[str]:
    """The names of tasks that a word stands for."""
    path = Path(name)
    if path.is_dir():
        found = [each for file in sorted(path.rglob("*.y*ml")) for each in _task_of(file)]
    elif path.is_file():
        found = _task_of(path)
    else:
        found = list(manager.match_tasks([name]))
    if not found:
        known = beside(path) if "/" in name or path.suffix else near(name, manager.all_tasks)
        raise DataError(f"lm-evaluation-harness has no task {name!r}.", known, "`lm_eval ls tasks` lists them; or name a YAML file.")
    return found


def _task_of(file: Path) -> list[str]:
    """What a YAML file calls its task; none where it is no task."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads over the harness's own tags, such as !function."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        record = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no YAML.", f"{str(error).splitlines()[0]}.", "Correct the file.") from None
    task = record.get("task") if isinstance(record, dict) else None
    return [task] if isinstance(task, str) else []
