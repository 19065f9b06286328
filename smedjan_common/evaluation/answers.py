"""Questions answered in words: greedy generation, right where it is one of the answers, white space around them aside (exact match)."""

from collections.abc import Callable, Sequence

from smedjan_common.evaluation.choices import Answer, Result, figures
from smedjan_common.evaluation.items import with_examples
from smedjan_common.evaluation.tasks import Task
from smedjan_common.inference.opened import OpenModel
from smedjan_common.inference.request import Request
from smedjan_common.inference.sampling import Sampling
from smedjan_common.inference.scoring import beginning

GREEDY = Sampling(temperature=0.0)
ROWS = 16  # answers that are written side by side
MORE = 8  # tokens past the longest answer: one that goes on is another

Told = Callable[[int, int], None]  # (answers that are written, of how many)


def generate(opened: OpenModel, requests: Sequence[Request], told: Told = lambda done, total: None) -> list[str]:
    """The texts that answer requests, side by side. Raises OutOfMemoryError before anything is written."""
    texts, done = [""] * len(requests), 0
    prompt, most = max(len(request.prompt) for request in requests), max(request.max_tokens or 0 for request in requests)
    engine = opened.engine(opened.rows(min(ROWS, len(requests)), prompt + most), prompt, most)
    for number, piece in engine.run(requests):
        texts[number] += piece.text
        if piece.finish_reason:
            done += 1
            told(done, len(requests))
    engine.close()
    return texts


def write_answers(task: Task, opened: OpenModel, told: Told = lambda done, total: None) -> Result:
    """A task whose items are of the kind `generate`. An answer ends with its line; with an empty one where answers have several."""
    tokenizer = opened.tokenizer
    longest = max(len(tokenizer.encode(text)) for item in task.items for text in item.options)
    stop = "\n\n" if any("\n" in text.strip() for item in task.items for text in item.options) else "\n"
    room = max(1, opened.model.context_length - longest - MORE)
    requests = []
    for number, item in enumerate(task.items):
        text = with_examples(task.examples(number), item.contexts[0], task.delimiter).rstrip()
        ids = [beginning(tokenizer), *tokenizer.encode(text)]
        requests.append(Request(ids[-room:], longest + MORE, GREEDY, stop=(stop,)))
    answers = [
        Answer(item, {"exact match": text.strip() in {each.strip() for each in item.options}}, text=text)
        for item, text in zip(task.items, generate(opened, requests, told), strict=True)
    ]
    return Result(task, figures(answers), answers)
