"""The files of the repository that no program reads: the workflow, the licence, the guide, the Makefile on a Mac."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):(?!=)", MAKEFILE, re.MULTILINE))


def test_the_workflow_runs_the_two_commands_of_the_makefile_and_nothing_else():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github/workflows/checks.yml").read_text())
    [job] = workflow["jobs"].values()
    steps = [step["run"] for step in job["steps"] if "run" in step]
    assert steps == [f"make {target} PYTHON=python${{{{ matrix.python }}}}" for target in ("lint", "test")]
    assert {step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step} == {"actions/checkout", "actions/setup-python"}
    machines = [(row["os"].partition("-")[0], row["python"]) for row in job["strategy"]["matrix"]["include"]]
    assert machines == [("ubuntu", "3.11"), ("ubuntu", "3.13"), ("macos", "3.13")]


def test_pythons_of_the_workflow_are_among_the_classifiers():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tested = re.findall(r'python: "([\d.]+)"', (ROOT / ".github/workflows/checks.yml").read_text())
    assert {f"Programming Language :: Python :: {version}" for version in tested} <= set(project["classifiers"])
    assert project["license"] == "MIT"
    assert [(ROOT / name).read_text().startswith("MIT License") for name in project["license-files"]] == [True]


def test_the_makefile_keeps_to_what_gnu_make_3_81_of_macos_knows():
    newer = [r"^\.ONESHELL", r"^\.RECIPEPREFIX", r"\$\(file ", r"!=(?=.*\$\(shell)", r"^\w+ != ", r"::=", r"^undefine ", r"^private ", "&:"]
    assert not [pattern for pattern in newer if re.search(pattern, MAKEFILE, re.MULTILINE)]


def test_what_the_guide_tells_to_run_is_there():
    told = {name for page in ("CONTRIBUTING.md", "README.md") for name in re.findall(r"make ([a-z-]+)`", (ROOT / page).read_text())}
    assert {"lint", "test"} <= told <= TARGETS
    links = re.findall(r"\]\(([\w./-]+)\)", (ROOT / "CONTRIBUTING.md").read_text())
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_readme_links_every_page_once_in_lines_that_fit():
    readme = (ROOT / "README.md").read_text()
    pages = sorted(re.findall(r"\]\((docs/[\w-]+\.md)\)", readme))
    assert pages == sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
    assert [line for line in readme.splitlines() if len(line) > 140] == []


def test_every_command_of_the_makefile_is_phony():
    phony = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
    assert phony == TARGETS


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_has_a_line_for_every_command_and_bare_make_trains():
    above = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    out = subprocess.run(["make", "help"], cwd=ROOT, env=above, capture_output=True, text=True, check=True).stdout
    lines = {line.split()[1]: line for line in out.splitlines()}
    assert lines.keys() == TARGETS
    assert all(len(line.split()) > 3 and len(line) < 120 for name, line in lines.items() if name != "help")
    assert re.search(r"^([a-z-]+):(?!=)", MAKEFILE, re.MULTILINE)[1] == "train"


def test_constraints_pin_each_package_once_by_a_version_and_from_nowhere_in_particular():
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [line for line in lines if line]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == [], "no address, folder or range"
    names = [re.sub(r"[-_.]+", "-", line.partition("=")[0]).lower() for line in pins]
    assert [name for name in names if names.count(name) > 1] == []
    assert pins == sorted(pins, key=str.lower)
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"://|Editable|file:|@", text)
