"""What a command line asks for: the value of every flag, and which of them were given."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from smedjan_common.run.flags import ALL_GROUPS, ChatFlags, DpoFlags, PairFlags, SftFlags, TrainFlags
from smedjan_common.run.recorded import to_record


@dataclass(frozen=True)
class Asked:
    """flags: every value, defaults included. given: names of the flags of the command line; the others a run may complete."""

    flags: TrainFlags
    given: frozenset[str]

    @property
    def command(self) -> str:
        """The command that is given."""
        return next((name for name, kind in _COMMANDS.items() if isinstance(self.flags, kind)), "train")

    @property
    def chats(self) -> ChatFlags | PairFlags | None:
        """How conversations or pairs of answers are learned; None where texts are."""
        return self.flags.chats if isinstance(self.flags, SftFlags | DpoFlags) else None

    @property
    def pairs(self) -> PairFlags | None:
        """How preferences are learned; None where something else is."""
        return self.flags.chats if isinstance(self.flags, DpoFlags) else None

    @property
    def teacher(self) -> str | None:
        """The checkpoint to learn from; None where there is none, or the command takes none."""
        return self.value("teacher_checkpoint") if hasattr(self.flags.run, "teacher_checkpoint") else None

    def value(self, name: str) -> Any:
        """The value of a flag by the name of its field: "batch_size"."""
        return getattr(getattr(self.flags, _group_of(name)), name)

    def is_given(self, name: str) -> bool:
        """Whether the command line has it."""
        return name in self.given

    def given_values(self) -> dict[str, Any]:
        """Field -> value of the flags that were given, in the order of the help; paths of the run's inputs absolute."""
        from_anywhere = to_record(self.flags)
        return {
            name: from_anywhere.get(name, self.value(name))
            for group in ALL_GROUPS.values()
            for name in group.__dataclass_fields__
            if name in self.given
        }

    def having(self, **values: Any) -> "Asked":
        """The same with other values; what was given stays as it is."""
        groups = {}
        for name, value in values.items():
            groups.setdefault(_group_of(name), {})[name] = value
        changed = {group: dataclasses.replace(getattr(self.flags, group), **part) for group, part in groups.items()}
        return Asked(dataclasses.replace(self.flags, **changed), self.given)


_COMMANDS = {"sft": SftFlags, "dpo": DpoFlags}


def _group_of(name: str) -> str:
    return next(group for group, fields in ALL_GROUPS.items() if name in fields.__dataclass_fields__)
