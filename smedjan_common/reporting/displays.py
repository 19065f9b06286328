"""Which screen a run has.

a terminal                       lines, and a display beneath them; NO_COLOR takes its colours alone
a pipe, CI, TERM=dumb or unset   lines
"""

import sys

from smedjan_common.reporting.pace import Pace
from smedjan_common.reporting.screen import Screen
from smedjan_common.reporting.status import Status
from smedjan_common.streams import is_live


def make_screen(status: Status, pace: Pace) -> Screen:
    """The screen of this process's standard output."""
    if not is_live(sys.stdout):
        return Screen(status, pace)
    from smedjan_common.reporting.live import LiveScreen

    return LiveScreen(status, pace)
