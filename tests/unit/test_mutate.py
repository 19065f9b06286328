"""`make mutate`, on a package of two functions, one of which no test sees."""

import ast
from pathlib import Path

import pytest

from tests import import_graph, mutate

SOURCE = '''"""More than 3 words."""

LIMIT: "int | None" = 7


def larger(a, b):
    """Whether a > b."""
    return a > b


def checked(ü, other="x" + "y"):
    if not ü or ü < 0:
        raise ValueError(f"{ü - 1}")
    print(ü)
    return ü + 2.5
'''


def test_changes_are_of_code_alone_and_every_one_is_a_program():
    found = [(each.old, each.new) for each in mutate.mutations(SOURCE)]
    assert found == [
        ("7", "(6)"),
        ("7", "8"),
        ("a > b", "(a >= b)"),
        ("not ü", "(ü)"),
        ("not ü or ü < 0", "(not ü and ü < 0)"),
        ("ü < 0", "(ü <= 0)"),
        ("0", "(-1)"),
        ("0", "1"),
        ('raise ValueError(f"{ü - 1}")', "pass"),
        ("print(ü)", "pass"),
        ("ü + 2.5", "(ü - 2.5)"),
        ("2.5", "5.0"),
    ]
    for each in mutate.mutations(SOURCE):
        text = SOURCE[: each.start] + each.new + SOURCE[each.end :]
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(SOURCE))


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "__init__.py").touch()
    (tmp_path / "toy" / "two.py").write_text("def seen(a, b):\n    return a < b\n\n\ndef unseen(a, b):\n    return a >= b\n")
    (tmp_path / "tests" / "unit").mkdir(parents=True)
    (tmp_path / "tests" / "unit" / "test_two.py").write_text("from toy.two import seen\n\ndef test_it():\n    assert not seen(1, 1)\n")
    (tmp_path / "tests" / "unit" / "test_else.py").write_text("def test_it():\n    assert False\n")
    return tmp_path


def test_what_no_test_sees_survives_and_the_tree_is_left_as_it_was(
    toy: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a pytest starts in a third of the time
    before = (toy / "toy" / "two.py").read_text()
    [survivor] = mutate.run(toy, ["toy"], seed=3)
    assert str(survivor) == "toy/two.py:6  a >= b -> (a > b)"
    out = capsys.readouterr().out
    assert "toy/two.py: tests/unit/test_two.py\n" in out
    assert "killed    toy/two.py:2  a < b -> (a <= b)" in out
    assert out.endswith("2 changes: 1 killed, 1 survived, 0 without tests that pass in 600 s\n")
    assert (toy / "toy" / "two.py").read_text() == before


def test_a_seed_always_chooses_the_same_and_another_others():
    chosen = [mutate.sample(mutate.ROOT, ["smedjan_common"], "smedjan_common/data/order.py", 5, seed) for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 5


def test_the_tests_of_a_module_are_those_of_its_name_and_then_the_nearest():
    """run/loop.py is imported by two tests, and by run/start.py, which is imported by a third; nobody imports it from tests.e2e alone."""
    pairs = [("unit.test_loop", "loop"), ("unit.test_another", "loop"), ("cli.test_train", "start"), ("e2e.test_all", "loop")]
    imports = [import_graph.Import(f"tests.{test}", f"smedjan_common.run.{module}", 1) for test, module in pairs]
    imports.append(import_graph.Import("smedjan_common.run.start", "smedjan_common.run.loop", 1))
    found = mutate.concerned("smedjan_common/run/loop.py", imports)
    assert found == ["tests/unit/test_loop.py", "tests/unit/test_another.py", "tests/cli/test_train.py"]
    assert mutate.concerned("smedjan_common/run/loop.py", imports, most=1) == found[:1]
    assert mutate.concerned("smedjan_common/run/start.py", imports) == ["tests/cli/test_train.py"]
