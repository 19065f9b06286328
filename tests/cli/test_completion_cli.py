"""`smedjan completion`: a real shell completes what a user begins to type."""

import shutil
import subprocess

import pytest

from smedjan_common import cli
from smedjan_common.command_line import flags_of
from smedjan_common.commands.completion import script
from smedjan_common.run.flags import TrainFlags, flag_names

NEGATED = {f"--no-{each.name[2:]}" for each in flags_of(TrainFlags) if each.negated}
ASK = 'COMP_WORDS=({words}); COMP_CWORD={last}; _smedjan; printf "%s\\n" "${{COMPREPLY[@]}}"'


def completed(*words):
    """What bash offers for the last of these words."""
    line = ASK.format(words=" ".join(f"'{word}'" for word in words), last=len(words) - 1)
    done = subprocess.run(["bash", "-uc", f"{script('bash')}\n{line}"], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("smedjan", ""), {*cli.COMMANDS, "help"}),
        (("smedjan", "pr"), {"prepare", "process"}),
        (("smedjan", "help", ""), set(cli.COMMANDS)),
        (("smedjan", "train", "--batch"), {"--batch-size"}),
        (("smedjan", "train", "--"), {*flag_names(), *NEGATED, "--help"}),
        (("smedjan", "train", "my.txt", "--lr-schedule", ""), {"cosine", "linear", "wsd", "invsqrt", "constant"}),
        (("smedjan", "train", "--resume", ""), {"auto", "never"}),
        (("smedjan", "convert", "runs/a", "out", "--to", "h"), {"hf"}),
        (("smedjan", "completion", ""), {"bash", "zsh"}),
        (("smedjan", "generate", "ru"), set()),  # a path: the shell's own completion
        (("smedjan", "nonsense", "--"), set()),
    ],
)
def test_bash_offers_what_can_be_there(words, offered):
    assert set(completed(*words)) == offered


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_the_script():
    done = subprocess.run(["zsh", "-fc", script("zsh") + "\nprint -r -- $_comps[smedjan]"], capture_output=True, text=True, check=True)
    assert (done.stderr, "_smedjan" in done.stdout) == ("", True)


def test_the_script_is_printed_and_another_shell_is_refused(capsys):
    assert cli.main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == script("bash") + "\n"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["completion", "fish"])
    assert stopped.value.code == 2
    assert "SHELL cannot be 'fish'. It must be one of bash, zsh." in " ".join(capsys.readouterr().err.split())
