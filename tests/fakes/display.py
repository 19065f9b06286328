"""`python -m tests.fakes.display`: a display whose height changes all the time, under lines that are printed as fast as can be."""

from pathlib import Path

from smedjan_common.reporting import live
from smedjan_common.reporting.console import say
from smedjan_common.reporting.pace import Pace
from smedjan_common.reporting.status import Status

LINES = 1500

if __name__ == "__main__":
    live.A_SECOND = 500
    status = Status(Path(), LINES)
    with live.LiveScreen(status, Pace(LINES)):
        for number in range(LINES):
            status.step, status.notice = number, "a signal" * (number % 2)
            say(f"line {number}")
