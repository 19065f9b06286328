"""docs/add-a-mixer.md adds a mixer: applied to a copy of the tree, the suite's checks hold on it, and it has its flags."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "add-a-mixer.md"
COPIED = ("smedjan_common", "smedjan_jax", "smedjan_mlx", "convert", "tests", "docs", "pyproject.toml")
CHECKS = (  # names and shapes, forward, gradients, prefill == step, causality, of both backends; the mirror; the options; the flags
    "test_train_state_holds_the_tensors_of_the_table_bit_for_bit",
    "test_tensors_are_found_under_the_attribute_path_of_their_name",
    "test_decode_state_is_what_the_row_says",
    "test_the_reference_step_by_step_equals_the_whole",
    "test_logits_equal_the_reference",
    "test_every_gradient_equals_the_slope_of_the_reference",
    "test_every_gradient_of_both_backends_is_equal",
    "test_feeding_tokens_equals_the_whole_sequence",
    "test_later_tokens_change_no_bit_and_have_zero_gradient",
    "test_public_names_and_signatures_are_the_same",
    "test_every_option_of_a_row_is_a_field_of_the_model_and_a_flag_with_its_default",
    "test_an_unknown_choice_of_a_row_in_use_is_refused_and_of_another_row_is_not",
    "test_every_option_of_a_mixer_belongs_to_a_row_and_is_refused_without_it",
)
FILES = (
    *(f"tests/conformance/test_{name}.py" for name in ("equivalence", "decoding", "causality", "mirror")),
    *("tests/unit/test_options.py", "tests/unit/test_flags.py"),
)


def steps() -> list[tuple[str, str, str]]:
    """The page's blocks for files: (file, python for a new one or diff, text). A block is of the file that was named last."""
    found, file = [], ""
    for named, kind, text in re.findall(r"^`([\w./-]+)`$|^```(\w+)\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S):
        file = named or file
        if kind in ("python", "diff"):
            found.append((file, kind, text))
    return found


def apply(tree: Path) -> None:
    for file, kind, text in steps():
        path = tree / file
        if kind == "python":
            assert not path.exists(), f"{file} is there already"
            path.write_text(text)
            continue
        lines = text.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        before = path.read_text()
        assert before.count(old) == 1, f"{PAGE.name} wants to change what is not in {file}:\n{old}"
        path.write_text(before.replace(old, new))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the project with the page's mixer."""
    folder = tmp_path_factory.mktemp("with-ema")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "rows", "images"))
        else:
            shutil.copy(ROOT / name, folder)
    apply(folder)
    return folder


def run(tree: Path, *words: str, expected: int = 0) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "SMEDJAN_TEST_FULL": "1"}
    done = subprocess.run([sys.executable, *words], cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == expected, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_page_names_new_files_and_lines_of_old_ones():
    new = [file for file, kind, _ in steps() if kind == "python"]
    changed = {file for file, kind, _ in steps() if kind == "diff"}
    assert [Path(file).name for file in new] == ["ema.py"] * 4
    assert all((ROOT / file).is_file() for file in changed)
    added = [line for _, kind, text in steps() if kind == "diff" for line in text.splitlines() if line[0] == "+"]
    assert len(added) <= 10, "lines of other files that a mixer with two options takes"


def test_the_checks_of_the_suite_hold_on_the_mixer(tree):
    """One process for all: the frameworks take seconds to import."""
    chosen = f"(ema and not +ema and not experts and not all- and ({' or '.join(CHECKS)})) or test_the_list_of_flags"
    told = run(tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", "-rA", "-k", chosen, *FILES)
    for check in (*CHECKS, "test_the_list_of_flags_is_the_frozen_one"):
        assert f"::{check}" in told, f"{check} did not run"
    for backend in ("jax", "mlx"):
        for form in ("", "-no-gate"):
            assert re.search(rf"PASSED .*test_logits_equal_the_reference\[ema-swiglu-mha{form}-{backend}\]", told)
    assert "SKIPPED" not in told


def test_the_command_line_has_its_flags(tree):
    text = "import sys; from smedjan_common.cli import main; sys.exit(main(sys.argv[1:]))"
    told = " ".join(run(tree, "-c", text, "train", "--help").replace("│", " ").split())
    assert "--ema-dim INT ema: channels that are averaged. (default: --dim)" in told
    assert "--ema-gate silu|none ema: what multiplies the average. (default: silu)" in told
    sizes = run(tree, "-c", text, "sizes", "--size", "tiny", "--mixer", "ema", "--ema-dim", "64", "--json")
    assert '"parameters"' in sizes
    wrong = run(tree, "-c", text, "sizes", "--size", "tiny", "--mixer", "ema", "--ema-gate", "sil", expected=2)
    assert "--ema-gate 'sil' is unknown" in wrong
    assert "Did you mean silu?" in wrong
    (tree / "my.txt").write_text("the cat sat on the mat\n" * 50)
    words = ["train", "--dataset", "my.txt", "--mixer", "ema", "--ema-gate", "none", "--backend", "jax", "--dry-run"]
    assert "1.97M parameters" in run(tree, "-c", text, *words)  # attention has 2.10M
    assert "--ema-dim would do nothing" in run(tree, "-c", text, "train", "--dataset", "my.txt", "--ema-dim", "8", expected=2)
