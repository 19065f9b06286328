"""Questions: how they are read and asked, what guessing scores, and that each figure is what its name says."""

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from smedjan_common.errors import DataError
from smedjan_common.evaluation import generated
from smedjan_common.evaluation.choices import answer_task, ask
from smedjan_common.evaluation.items import Item, parse_item, read_items
from smedjan_common.evaluation.report import groups, task_row
from smedjan_common.evaluation.tasks import find_tasks, make_task
from smedjan_common.evaluation.texts import find_texts
from smedjan_common.inference.scoring import Likelihood
from smedjan_common.tokenizer import Tokenizer


def line(**fields) -> bytes:
    return json.dumps(fields).encode()


FORMS = [
    (dict(query="a?", choices=["x", "y"], gold=1), "multiple_choice", ("a?",), ("x", "y"), 1),
    (dict(question="a?", options=["x", "y", "z"], answer="C"), "multiple_choice", ("a?",), ("x", "y", "z"), 2),
    (dict(question="a?", choices={"text": ["x", "y"], "label": ["A", "B"]}, answer="y"), "multiple_choice", ("a?",), ("x", "y"), 1),
    (dict(context="", choices=[1, 2], label="1"), "multiple_choice", ("",), ("1", "2"), 0),
    (dict(context_options=["a", "b"], continuation="c", gold=0), "schema", ("a", "b"), ("c",), 0),
    (dict(context="a", continuation="b"), "language_modeling", ("a",), ("b",), 0),
    (dict(prompt="a", answer="b"), "generate", ("a",), ("b",), 0),
    (dict(question="a", target=["b", "c"], id=7), "generate", ("a",), ("b", "c"), 0),
]


@pytest.mark.parametrize(("fields", "kind", "contexts", "options", "gold"), FORMS)
def test_the_fields_say_which_kind_of_question_it_is(fields, kind, contexts, options, gold):
    assert parse_item(line(**fields), "q.jsonl:1") == Item(kind, contexts, options, gold, "q.jsonl:1")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"query": "a"', "is not JSON"),
        (b"[1, 2]", "no JSON object"),
        (b'{"query": "\xff"}', "not UTF-8"),
        (line(text="a"), "no question of a known kind"),
        (line(query="a", choices=["x"], gold=0), "has 1 choices"),
        (line(query="a", choices="xy", gold=0), "no list of"),
        (line(query="a", choices=["x", ""], gold=0), "no text"),
        (line(query="a", choices=["x", None], gold=0), "no text"),
        (line(query="a", choices=["x", "y"]), "does not say which option"),
        (line(query="a", choices=["x", "y"], gold=2), "names no option"),
        (line(query="a", choices=["x", "y"], gold=-1), "names no option"),
        (line(query="a", choices=["x", "y"], gold=True), "names no option"),
        (line(query="a", choices=["x", "y"], gold="why"), "names no option"),
        (line(query="a", choices=["x", "y"], gold="\u00b2"), "names no option"),
        (line(query="a", choices=["x", "y"], gold="\u00df"), "names no option"),
        (line(query="a", choices=["x", "y"], gold="1" * 5000), "names no option"),
        (line(choices=["x", "y"], gold=0), "lacks 'query'"),
        (line(context="a", continuation=" "), "no text"),
        (line(context=["a"], continuation="b"), "no text"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_told_with_its_place(tmp_path: Path, bad: bytes, words: str):
    (tmp_path / "q.jsonl").write_bytes(line(query="a", choices=["x", "y"], gold=0) + b"\n\n" + bad + b"\n")
    with pytest.raises(DataError, match=words) as caught:
        list(read_items(tmp_path / "q.jsonl"))
    assert "q.jsonl:3" in str(caught.value)


def test_questions_of_two_kinds_and_empty_files_are_refused(tmp_path: Path):
    (tmp_path / "two.jsonl").write_bytes(line(context="a", continuation="b") + b"\n" + line(prompt="a", answer="b"))
    with pytest.raises(DataError, match=r"two.jsonl:2 is of another kind"):
        list(read_items(tmp_path / "two.jsonl"))
    (tmp_path / "none.jsonl").write_bytes(b"\n\n")
    with pytest.raises(DataError, match="has no items"):
        list(read_items(tmp_path / "none.jsonl"))


class Codepoints:
    """A tokenizer whose ids are code points: what is asked can be read."""

    eot_id, bos_id = 0, None

    def encode(self, text):
        return list(map(ord, text))


def text_of(ids):
    return "".join(map(chr, ids))


def test_examples_are_others_with_their_answers_and_the_same_as_nanochats():
    """The order is Random(1337)'s, the examples of question i Random(1234 + i)'s."""
    items = [Item("multiple_choice", (f"q{n}",), (f"a{n}", f"b{n}"), n % 2) for n in range(6)]
    task = make_task("t", items, shots=2, limit=5)
    order = list(range(6))
    random.Random(1337).shuffle(order)
    assert [item.contexts[0] for item in task.items] == [f"q{n}" for n in order[:5]]
    for number, item in enumerate(task.items):
        drawn = random.Random(1234 + number).sample([at for at in range(5) if at != number], 2)
        asked = ask(task, number, Codepoints(), [0])
        shown = "".join(f"q{order[at]} {'ab'[order[at] % 2]}{order[at]}\n\n" for at in drawn)
        assert [text_of(context) for context, _ in asked.pairs] == ["\0" + shown + item.contexts[0]] * 2
        assert [text_of(ids) for _, ids in asked.pairs] == [f" {option}" for option in item.options]
    with pytest.raises(DataError, match="--shots 5"):
        make_task("t", items, shots=6, limit=0)


def test_what_the_tokenizer_puts_before_every_text_is_before_a_question_and_a_document(tmp_path: Path):
    """As Llama's <|begin_of_text|>, which is another token than the one between documents."""

    class Beginning(Codepoints):
        bos_id = 1

        def encode_array(self, text):
            return np.array(self.encode(text))

    seen = []

    class Looking(Told):
        def continuations(self, pairs):
            seen.extend(pairs)
            return super().continuations(pairs)

    table = {text: Likelihood((-1.0, -2.0), greedy=False) for text in (" x", " y")}
    answer_task(make_task("t", [Item("multiple_choice", ("q",), ("x", "y"), 0)], shots=0, limit=0), Looking(table), Beginning())
    assert [text_of(context) for context, _ in seen] == ["\1q", "\1q"]
    (tmp_path / "a.txt").write_text("abc")
    [text] = find_texts([str(tmp_path / "a.txt")], Beginning())
    assert [text_of(document.ids) for document in text.documents(Beginning(), "text")] == ["\1abc\0"]


def test_a_schema_is_scored_where_its_texts_end_alike():
    task = make_task("t", [Item("schema", ("the cup since the cup", "the cup since the bag"), ("was small",), 1)] * 1, shots=0, limit=0)
    asked = ask(task, 0, Codepoints(), [0])
    assert [text_of(ids) for _, ids in asked.pairs] == [" was small"] * 2
    assert [text_of(ids) for ids, _ in asked.pairs] == ["\0the cup since the cup", "\0the cup since the bag"]


class Told:
    """A scorer that says what it is told to: log-probabilities by the text of the continuation."""

    def __init__(self, table):
        self.table = table

    def continuations(self, pairs):
        return [self.table[text_of(continuation)] for _, continuation in pairs]


def test_each_accuracy_is_the_one_of_its_name():
    """`ab` is the most probable, `abcdé` per byte (six of them) and per token from where they differ."""
    table = {" ab": (-0.5, -0.5, -2.0), " abcdé": (-0.5, -0.5, -2.0, -1.0, -1.0, -0.4), " x": (-9.0, -9.0)}
    scorer = Told({text: Likelihood(values, greedy=False) for text, values in table.items()})
    for gold, right in ((0, ("accuracy",)), (1, ("accuracy per byte", "accuracy per token")), (2, ())):
        task = make_task("t", [Item("multiple_choice", ("q",), ("ab", "abcdé", "x"), gold)], shots=0, limit=0)
        result = answer_task(task, scorer, Codepoints())
        assert {name for name, (value, _) in result.figures.items() if value} == set(right)
        assert result.answers[0].logprobs == (-3.0, -5.4, -18.0)
        assert result.task.chance == pytest.approx(1 / 3)


def test_cloze_is_exact_and_its_perplexity_is_over_continuations():
    table = {" b": Likelihood((-1.0,), greedy=True), " cd": Likelihood((-1.0, -2.0), greedy=False)}
    items = [Item("language_modeling", ("a ",), ("b",)), Item("language_modeling", ("a",), ("cd",))]
    result = answer_task(make_task("t", items, shots=0, limit=0), Told(table), Codepoints())
    assert result.figures["exact"] == (0.5, pytest.approx(0.5))
    assert result.figures["perplexity"][0] == pytest.approx(math.exp(2))


ASKED = [(name, size) for name, row in generated.ROWS.items() for size in row.sizes]


@pytest.mark.parametrize(("name", "size"), ASKED)
def test_generated_questions_are_right_and_their_answers_of_one_length(name: str, size: int):
    items = generated.make(name, size, 60, seed=3)
    assert items == generated.make(name, size, 60, seed=3)
    assert items != generated.make(name, size, 60, seed=4)
    for item in items:
        [context], right = item.contexts, item.options[item.gold].strip()
        assert len(set(map(len, item.options))) == 1
        assert right == SOLVED[name](context)
    assert len({item.gold for item in items}) == len(items[0].options)


def _closing(context: str) -> str:
    opened = []
    for sign in context.split():
        if sign in "([{":
            opened.append(sign)
        else:
            assert opened.pop() + sign in ("()", "[]", "{}")
    return {"(": ")", "[": "]", "{": "}"}[opened[-1]]


def _recalled(context: str) -> str:
    pairs = dict(pair.split(": ") for pair in context.rpartition(", ")[0].split(", "))
    return pairs[context.rpartition(", ")[2].rstrip(":")]


def _followed(context: str) -> str:
    words = context.split()
    return words[words.index(words[-1]) + 1]


SOLVED = {
    "sums": lambda context: str(sum(map(int, context.rstrip("=").split("+")))),
    "copy": lambda context: context.rstrip(" |"),
    "reverse": lambda context: context.rstrip(" >")[::-1],
    "brackets": _closing,
    "recall": _recalled,
    "induction": _followed,
}


def _by_pairs_of_signs(seed: int):
    """What a model that cannot read the question might go by: how likely an answer is in itself."""
    table = np.random.default_rng(seed).normal(size=(256, 256))
    return lambda context, option: sum(table[ord(a), ord(b)] for a, b in itertools.pairwise(option))


def _latest(context: str, option: str) -> int:
    return context.rfind(option)


@pytest.mark.parametrize(
    ("name", "size"), [(name, sizes[-1]) for name, (_, _, sizes, _) in generated.ROWS.items()] + [("sums", 1), ("copy", 4)]
)
def test_who_does_not_read_the_question_is_right_as_often_as_chance(name: str, size: int):
    """Within 4 standard errors over 1500 questions: for answers that are changes of the right one it was 1 of 8."""
    items = generated.make(name, size, 1500, seed=0)
    for guess in (_by_pairs_of_signs(0), _by_pairs_of_signs(1), *([_latest] if name in ("recall", "induction") else [])):
        right = sum(
            max(range(len(item.options)), key=lambda at, item=item: guess(item.contexts[0], item.options[at])) == item.gold
            for item in items
        )
        chance = 1 / len(items[0].options)
        assert abs(right / len(items) - chance) < 4 * math.sqrt(chance * (1 - chance) / len(items))


CORE = """
icl_tasks:
- {label: pick, dataset_uri: pick.jsonl, num_fewshot: [1], icl_task_type: multiple_choice}
- {label: fill, dataset_uri: sub/fill.jsonl, num_fewshot: [0], icl_task_type: language_modeling, continuation_delimiter: ""}
"""


@pytest.fixture
def core(tmp_path: Path) -> Path:
    """A folder as DCLM and nanochat have theirs."""
    (tmp_path / "eval_data" / "sub").mkdir(parents=True)
    pick, fill = tmp_path / "eval_data" / "pick.jsonl", tmp_path / "eval_data" / "sub" / "fill.jsonl"
    pick.write_bytes(b"\n".join(line(query=f"q{n}", choices=["a", "b"], gold=n % 2) for n in range(4)))
    fill.write_bytes(b"\n".join(line(context=f"c{n} ", continuation="d") for n in range(2)))
    (tmp_path / "core.yaml").write_text(CORE)
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Task Category,Random baseline\npick,x,40.0\nfill,x,0.0\n")
    return tmp_path


def test_a_folder_says_how_its_tasks_are_asked(core: Path):
    pick, fill = find_tasks([str(core)])
    assert (pick.name, pick.shots, pick.delimiter, pick.chance, pick.figure) == ("pick", 1, " ", 0.4, "accuracy per token")
    assert (fill.name, fill.shots, fill.delimiter, fill.chance, fill.figure) == ("fill", 0, "", 0.0, "exact")
    assert [task.shots for task in find_tasks([str(core)], shots=0)] == [0, 0]
    values = {" a": (-0.5, -1.0), " b": (-0.5, -2.0), "d": (-3.0,)}
    table = {text: Likelihood(logprobs, greedy=text == "d") for text, logprobs in values.items()}
    rows = [task_row(answer_task(task, Told(table), Codepoints())) for task in (pick, fill)]
    assert [row["centred"] for row in rows] == pytest.approx([(0.5 - 0.4) / 0.6, 1.0])
    assert groups(rows) == {core.name: {"tasks": 2, "centred": pytest.approx(((0.5 - 0.4) / 0.6 + 1) / 2)}}


def test_a_folder_without_a_table_of_contents_gives_each_file(core: Path):
    (core / "core.yaml").unlink()
    assert [(task.name, task.chance) for task in find_tasks([str(core)])] == [("pick", 0.4), ("fill", 0.0)]


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("core.yaml", "icl_tasks: 3", "does not say which tasks"),
        ("core.yaml", "icl_tasks: [{label: a, dataset_uri: gone.jsonl}]", "There is no"),
        ("core.yaml", CORE.replace("type: multiple_choice", "type: schema"), "another kind"),
        *(("core.yaml", CORE.replace("[1]", wrong), "wrong num_fewshot for 'pick'") for wrong in ("[]", "-1", "few", "[1.5]")),
        ("core.yaml", CORE.replace('""', "3"), "wrong continuation_delimiter for 'fill'"),
        ("eval_meta_data.csv", "a,b\n1,2\n", "what guessing scores"),
        *(("eval_meta_data.csv", f"Eval Task,Random baseline\npick,{wrong}\n", "what guessing scores") for wrong in ("100", "nan", "-1")),
    ],
)
def test_a_damaged_folder_is_told(core: Path, file: str, text: str, words: str):
    (core / file).write_text(text)
    with pytest.raises(DataError, match=words):
        find_tasks([str(core)])


def test_an_unknown_task_is_told_with_the_near_ones():
    with pytest.raises(DataError, match="Did you mean recall"):
        find_tasks(["recal"])


def test_a_question_of_a_real_tokenizer_keeps_every_sign():
    tokenizer = Tokenizer.train_from_texts(["The answer is the right one. "] * 9, vocab_size=280)
    task = make_task("t", [Item("multiple_choice", ("The answer is the",), ("right", "rig", "one"), 0)], shots=0, limit=0)
    for (context, continuation), option in zip(ask(task, 0, tokenizer, [tokenizer.eot_id]).pairs, task.items[0].options, strict=True):
        assert context[0] == tokenizer.eot_id
        assert tokenizer.decode([*context[1:], *continuation]) == f"The answer is the {option}"
