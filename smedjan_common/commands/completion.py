"""`smedjan completion bash|zsh`: a script for the shell, made from the table of commands and the flags of each."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import arg

from smedjan_common.command_line import Flag, flags_of, parse
from smedjan_common.commands.table import COMMANDS
from smedjan_common.errors import run_command

_ZSH = "whence compdef >/dev/null || { autoload -U +X compinit && compinit; }\nautoload -U +X bashcompinit && bashcompinit\n"
_BASH = """_smedjan() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="COMMANDS help"
    else
        case "${COMP_WORDS[1]} $before" in
            "help help") words="COMMANDS" ;;
CHOICES
            *) case "${COMP_WORDS[1]} $word" in
FLAG_NAMES
            esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _smedjan smedjan"""  # no words of ours: the shell's own, which are paths


@dataclass(frozen=True)
class CompletionFlags:
    """Print a script that makes the Tab key complete commands, flags and their values.

    bash: add `eval "$(smedjan completion bash)"` to ~/.bashrc. zsh: `eval "$(smedjan completion zsh)"` to ~/.zshrc.
    """

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional, arg(metavar="SHELL")]
    """The shell."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    flags = parse(CompletionFlags, "smedjan completion", argv, "smedjan completion bash", "smedjan completion zsh")
    return run_command(lambda: _print(flags.shell))


def _print(shell: str) -> int:
    print(script(shell))
    return 0


def script(shell: str) -> str:
    """What the shell evaluates."""
    flags = {name: list(flags_of(command.flags_class())) for name, command in COMMANDS.items()}
    choices = [
        _case(f"{name} {name if each.positional else each.name}", values)  # the word before: the command's own where there is no flag
        for name, of in flags.items()
        for each in of
        if (values := _values(each))
    ]
    names = [_case(f"{name} -", _names(of), rest="*") for name, of in flags.items()]
    text = _BASH.replace("COMMANDS", " ".join(COMMANDS)).replace("CHOICES", "\n".join(choices)).replace("FLAG_NAMES", "\n".join(names))
    return (_ZSH if shell == "zsh" else "") + text


def _case(begin: str, words: list[str], rest: str = "") -> str:
    return f'            "{begin}"{rest}) words="{" ".join(words)}" ;;'


def _values(one: Flag) -> list[str]:
    """What can be given for a flag, where it is one of several names; capitals in a metavar stand for anything."""
    if one.choices:
        return list(one.choices)
    listed = one.metavar.split("|")
    return [name for name in listed if name == name.lower()] if listed[1:] else []


def _names(flags: list[Flag]) -> list[str]:
    named = [each for each in flags if not each.positional]
    return [*(each.name for each in named), *(f"--no-{each.name[2:]}" for each in named if each.negated), "--help"]
