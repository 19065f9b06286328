"""What a run that goes on tells of flags and data that differ from those it had: they are allowed, and count from here on."""

import os

from smedjan_common.run.asked import Asked
from smedjan_common.run.cadence import CADENCES, interval
from smedjan_common.run.data import RunData
from smedjan_common.run.decided import Decided, base_of
from smedjan_common.run.recorded import RECALLED, recorded_names
from smedjan_common.run.resume import change, changes
from smedjan_common.run.start import GoOn


def notes(decided: Decided) -> list[str]:
    """What differs from the run that goes on and counts from here on, a line each; nothing of a new run."""
    begin, asked = decided.begin, decided.asked
    if not isinstance(begin, GoOn):
        return []
    lines = changes(begin.info, decided.model, decided.train)
    lines += _data_changes(begin, asked, decided.data)
    recorded = begin.recorded.get("flags") or {}
    compared = [name for group in RECALLED if group != "data" for name in recorded_names(group) if name in asked.given & recorded.keys()]
    for name in compared:
        if name == "teacher_checkpoint":
            continue  # the same weights, wherever they are
        if name == "pretrained":
            if recorded[name] != os.path.abspath(asked.value(name)):
                lines.append(f"--pretrained is not read: the run goes on from {begin.info.path}")
        else:
            had = recorded[name] if name not in CADENCES else interval(name, recorded[name], (base_of(begin) or decided.train).steps)
            lines += change(name, had, asked.value(name))
    return lines


def _data_changes(begin: GoOn, asked: Asked, data: RunData | None) -> list[str]:
    """Token files by their hashes; texts that are not tokenised yet, in a dry run, by their names."""
    lines = []
    for name, old, file in (
        ("dataset", begin.info.dataset, data.train if data else None),
        ("val_dataset", begin.recorded.get("val_dataset"), data.val if data else None),
    ):
        known = (old or {}).get("hash")
        if file is not None and (known or asked.is_given(name)):
            lines += change(name, known, file.hash, "checkpoint" if name == "dataset" else "run")
        elif file is None and asked.is_given(name):
            lines += change(name, known, asked.value(name))
    return lines
