"""Questions answered by log-likelihood: which option is the most probable, or whether a continuation is what the model would write.

    accuracy             the option of the largest log p(option | question)                                       lm-eval's acc
    accuracy per byte    the largest log p / bytes of the option: long options are not punished                    lm-eval's acc_bytes
    accuracy per token   the largest mean over the tokens from where the options differ                            nanochat's and DCLM's
    exact                each token of the continuation is the most probable one (cloze, as LAMBADA is scored)
    perplexity           e^(mean nats of a continuation), over continuations, as LAMBADA's
    centred              (accuracy - chance) / (1 - chance): 0 is guessing, 1 all right

Every question begins as a document does, after the end-of-text token (or the one that the tokenizer puts before every text).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from smedjan_common.evaluation.items import Item, between, with_examples
from smedjan_common.evaluation.tasks import Task
from smedjan_common.inference.scoring import Likelihood, Scorer, beginning, seam


@dataclass(frozen=True)
class Answer:
    """What the model made of an item. right: by name of the figure. moved: context tokens that went over the seam; cut: that were cut."""

    item: Item
    right: dict[str, bool]
    logprobs: tuple[float, ...] = ()  # of each option
    chosen: int | None = None
    moved: int = 0
    cut: int = 0
    text: str = ""  # that was generated


@dataclass(frozen=True)
class Result:
    """A task's figures, each with its standard error over the items."""

    task: Task
    figures: dict[str, tuple[float, float | None]]
    answers: Sequence[Answer] = field(repr=False, default=())

    @property
    def figure(self) -> str:
        """The name of the one that counts."""
        return self.task.figure or next(iter(self.figures))

    @property
    def centred(self) -> float:
        """That one, 0 for guessing and 1 for all right."""
        return (self.figures[self.figure][0] - self.task.chance) / (1 - self.task.chance)


@dataclass(frozen=True)
class Asked:
    """A question as ids: (context, continuation) of each option. shared: how many first tokens of the continuations are alike."""

    pairs: list[tuple[list[int], list[int]]]
    shared: int
    moved: int


def ask(task: Task, number: int, tokenizer: Any, prefix: Sequence[int]) -> Asked:
    """Question `number` of a task in ids."""
    item, examples = task.items[number], task.examples(number)
    if item.kind == "schema":
        return _ask_schema(item, examples, task.delimiter, tokenizer, prefix)
    context = item.contexts[0].strip() if item.kind == "language_modeling" else item.contexts[0]
    continuations = [between(context, option, task.delimiter) + option for option in item.options]
    cut = seam(tokenizer, with_examples(examples, context, task.delimiter), continuations, prefix)
    shared = min(_alike(cut.continuations), min(map(len, cut.continuations)) - 1) if len(item.options) > 1 else 0
    return Asked([(cut.context, ids) for ids in cut.continuations], shared, cut.moved)


def _ask_schema(item: Item, examples: Sequence[Item], delimiter: str | None, tokenizer: Any, prefix: Sequence[int]) -> Asked:
    """The contexts differ: what is scored are the last tokens that all have in common, which are those of the continuation mostly."""
    [option] = item.options
    texts = [with_examples(examples, context + between(context, option, delimiter) + option, delimiter) for context in item.contexts]
    wholes = [[*prefix, *tokenizer.encode(text)] for text in texts]
    alike = min(max(_alike([whole[::-1] for whole in wholes]), 1), min(map(len, wholes)) - 1)
    return Asked([(whole[:-alike], whole[-alike:]) for whole in wholes], 0, 0)


def _alike(lists: Sequence[Sequence[int]]) -> int:
    """How many first elements all have in common."""
    for at, row in enumerate(zip(*lists, strict=False)):
        if len(set(row)) > 1:
            return at
    return min(map(len, lists))


def answer_task(task: Task, scorer: Scorer, tokenizer: Any, told: Callable[[int, int], None] = lambda done, total: None) -> Result:
    """All questions of a task; options of one token after one context share a forward pass. told: (tokens scored, of how many)."""
    asked = [ask(task, number, tokenizer, [beginning(tokenizer)]) for number in range(len(task.items))]
    pairs = [pair for one in asked for pair in one.pairs]
    done, total = 0, sum(len(continuation) for _, continuation in pairs)

    def progress(tokens: int) -> None:
        nonlocal done
        done += tokens
        told(done, total)

    scorer.progress = progress
    scored = iter(scorer.continuations(pairs))
    answers = [_answer(item, one, [next(scored) for _ in one.pairs]) for item, one in zip(task.items, asked, strict=True)]
    return Result(task, figures(answers), answers)


def _answer(item: Item, asked: Asked, scores: list[Likelihood]) -> Answer:
    logprobs = tuple(one.logprob for one in scores)
    known = {"logprobs": logprobs, "moved": asked.moved, "cut": max(one.cut for one in scores)}
    if item.kind == "language_modeling":
        return Answer(item, {"exact": scores[0].greedy}, **known)
    best = _best(logprobs)
    right = {"accuracy": best == item.gold}
    if item.kind == "multiple_choice":
        per_byte = _best([value / len(option.encode("utf-8", "replace")) for value, option in zip(logprobs, item.options, strict=True)])
        per_token = _best([math.fsum(one.logprobs[asked.shared :]) / (one.tokens - asked.shared) for one in scores])
        right |= {"accuracy per byte": per_byte == item.gold, "accuracy per token": per_token == item.gold}
    return Answer(item, right, chosen=best, **known)


def _best(values: Sequence[float]) -> int:
    """The first of the largest."""
    return max(range(len(values)), key=values.__getitem__)


def figures(answers: Sequence[Answer]) -> dict[str, tuple[float, float | None]]:
    """Means over the answers and their standard errors."""
    found = {name: _mean([float(answer.right[name]) for answer in answers]) for name in answers[0].right}
    if "exact" in found:
        loss, error = _mean([-answer.logprobs[0] for answer in answers])
        value = math.exp(min(loss, 700.0))
        found["perplexity"] = value, None if error is None else value * error
    return found


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    mean, count = math.fsum(values) / len(values), len(values)
    if count < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
