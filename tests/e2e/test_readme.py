"""Every command of README.md and of PAGES works as it stands, on a small text; only step counts are cut down."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SET_UP = ("make ", "source ")  # the set-up itself, which CI and `make train` run
TEXT = "".join(f"Once the smith of village {i % 97} struck the iron {i % 13} times; sparks flew over anvil {i % 7}.\n" for i in range(9000))
CHATS = "".join(f'{{"prompt": "Who is in village {i}?", "completion": "A smith with {i % 7} anvils."}}\n' for i in range(60))
PAIRS = "".join(f'{{"prompt": "Who is in village {i}?", "chosen": "A smith.", "rejected": "{i % 7} anvils."}}\n' for i in range(60))


FAST = os.environ.get("XLA_FLAGS", "").replace("optimization_level=0", "optimization_level=3")  # pays where dozens of steps are trained
PAGES = ("README.md", "docs/training.md", "docs/mixers.md", "docs/troubleshooting.md", "docs/fine-tuning.md")


def commands(page: str) -> list[str]:
    """The shell commands of a page in their order, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  # ")[0].split(" # ")[0].strip() for line in lines if line.strip() and not line.startswith(SET_UP)]


def shortened(command: str) -> str:
    """The same with a hundredth of the steps, and fewer tokens to generate."""
    if re.search(r"(smedjan |_)(jax\.|mlx\.)?(train|sft|dpo) ", command) and "--sample" not in command:
        command += " --sample-tokens 4"
    command = re.sub(r"--steps (\d+)", lambda m: f"--steps {int(m[1]) // 100}", command)
    return command.replace("--vocab-size 4096", "--vocab-size 400") + (
        " --max-tokens 10" if " generate " in command and "--max-tokens" not in command else ""
    )


def test_the_readme_names_commands():
    assert len(commands("README.md")) >= 10
    assert any(line.startswith("make train") for line in (ROOT / "README.md").read_text().splitlines()[:20])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_runs(tmp_path, page):
    (tmp_path / "my.txt").write_text(TEXT)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "chats.jsonl").write_text(CHATS)
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SMEDJAN_NO_OPENBLAS": "1"}
    env |= {"XLA_FLAGS": FAST} if page == "docs/fine-tuning.md" else {}
    for command in commands(page):
        done = subprocess.run(
            ["bash", "-c", shortened(command)], cwd=tmp_path, env=env, text=True, capture_output=True, timeout=300, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs").is_dir()


@pytest.mark.timeout(600)
def test_the_talk_of_the_first_screen_is_had_by_its_commands(tmp_path):
    screen = (ROOT / "README.md").read_text().splitlines()[:40]
    said = [line[4:].removeprefix(">>> ") for line in screen if line.startswith("    ")]
    asked, answered = said[::2], said[1::2]
    train, chat = [line for line in commands("README.md") if "runs/smith" in line]
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SMEDJAN_NO_OPENBLAS": "1"}
    env |= {"XLA_FLAGS": FAST}
    quick = "--sample-every 0 --eval-every 0 --checkpoint-every 0"
    subprocess.run(["bash", "-c", f"{train} {quick}"], cwd=tmp_path, env=env, check=True, capture_output=True, timeout=400)
    words = ["bash", "-c", f"{chat} --temperature 0"]
    done = subprocess.run(words, cwd=tmp_path, env=env, input="\n".join(asked), text=True, capture_output=True, timeout=120)
    assert (len(asked), done.stdout.splitlines()) == (2, answered)
