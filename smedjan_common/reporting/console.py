"""What a run says on the console: one line per log step, plain text, figures in aligned columns."""

import errno
import sys

from smedjan_common import streams
from smedjan_common.reporting.metrics import Row
from smedjan_common.training.distillation import METRICS


def say(text: str) -> None:
    """Print a line at once, also into a pipe. A pipe that nobody reads any more (`| head`), a terminal that was closed or a full disk
    costs the output, not the run."""
    if error := streams.put(_painted(text) if streams.has_colours(sys.stdout) else text, sys.stdout):
        why = (
            "nobody reads the output any more"
            if error.errno in (errno.EPIPE, errno.EIO)
            else f"the output cannot be written any more ({error.strerror})"
        )
        streams.put(f"note: {why}; the run goes on.", sys.stderr)


_PAINT = {"note: ": "33", "saved ": "32", "Done": "1;32", "Stopped": "1;33", "  | ": "2"}  # how a line begins -> its SGR


def _painted(text: str) -> str:
    code = next((code for begin, code in _PAINT.items() if text.startswith(begin)), None)
    return text if code is None else "\n".join(f"\x1b[{code}m{line}\x1b[0m" for line in text.split("\n"))


def step_line(row: Row, steps: int, seconds_left: float | None) -> str:
    """`step   120/1000  loss 3.4521  lr 1.20e-03  grad 0.82  12.3k tok/s  mfu 34.1 %  left 2m10s`"""
    width = len(str(steps))
    parts = [
        f"step {row['step']:>{width}}/{steps}",
        f"loss {row['loss']:.4f}",
        *(f"{name} {row[name]:.4f}" for name in METRICS if name in row),
        f"lr {row['lr']:.2e}",
        f"grad {row['grad_norm']:.2f}",
    ]
    parts += _of_pairs(row)
    if row["tokens_per_second"] is not None:
        parts.append(f"{count(row['tokens_per_second'])} tok/s")
    if row["mfu"] is not None:
        parts.append(f"mfu {100 * row['mfu']:.1f} %")
    if seconds_left is not None:
        parts.append(f"left {duration(seconds_left)}")
    return "  ".join(parts)


def eval_line(row: Row, steps: int) -> str:
    """`step   250/1000  validation loss 3.2101  bits per byte 1.8842`"""
    bits = f"  bits per byte {row['val_bits_per_byte']:.4f}" if row["val_bits_per_byte"] is not None else ""
    pairs = "".join(f"  {part}" for part in _of_pairs({name.removeprefix("val_"): value for name, value in row.items()}))
    return f"step {row['step']:>{len(str(steps))}}/{steps}  validation loss {row['val_loss']:.4f}{bits}{pairs}"


def _of_pairs(row: Row) -> list[str]:
    """`accuracy 75 %`, `margin 0.120`, `log p -9.1, -12.4`: what a row says of pairs of answers, the better one first."""
    if row.get("rewards/accuracies") is None:
        return []
    sides = f"log p {row['logps/chosen']:.1f}, {row['logps/rejected']:.1f}"
    return [f"accuracy {100 * row['rewards/accuracies']:.0f} %", f"margin {row['rewards/margins']:.3f}", sides]


def count(value: float) -> str:
    """`950`, `12.3k`, `45.1M`, `6.5B`: a number in three digits or so."""
    for divisor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * divisor:  # 999,999 is 1M
            return f"{value / divisor:.3g}{suffix}" if value < 999.5 * divisor else f"{value / divisor:.0f}{suffix}"
    return f"{value:.3g}"


def counted(number: int, noun: str) -> str:
    """`1 document`, `1,024 documents`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def flop(number: float) -> str:
    """`13 MFLOP`, `798 GFLOP`: floating-point operations, with the prefixes of physics."""
    for divisor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * divisor:
            return f"{number / divisor:.3g} {prefix}FLOP" if number < 999.5 * divisor else f"{number / divisor:.0f} {prefix}FLOP"
    return f"{number:.3g} FLOP"


def size(num_bytes: float) -> str:
    """`512 B`, `3.2 MiB`, `16.4 GiB`."""
    for divisor, suffix in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= divisor:
            return f"{num_bytes / divisor:.1f} {suffix}"
    return f"{num_bytes:.0f} B"


def lasted(seconds: float) -> str:
    """`0.4s`, `12s`, `2m10s`: how long something took."""
    return f"{seconds:.1f}s" if seconds < 9.95 else duration(seconds)


def printable(text: str) -> str:
    """Text of a model, or of a file, as a terminal can show it: no control characters, which would steer it."""
    return "".join(letter if letter in "\n\t" or not _steers(letter) else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _steers(letter: str) -> bool:
    return letter < " " or "\x7f" <= letter < "\xa0"


def duration(seconds: float) -> str:
    """`8s`, `2m10s`, `3h05m`, `2d04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
