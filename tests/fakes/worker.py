"""A worker process that does what a test asks of it."""

import os
import signal

import numpy as np

from smedjan_common.errors import DataError


class Hand:
    """What a test asks a process to do."""

    def __call__(self, item):
        if item == "refuse":
            raise DataError("No.", "It is so.", "Ask another.")
        if item == "allocate":
            return np.ones((1 << 50, 1 << 8))
        if item == "leave":
            os._exit(7)
        return os.kill(os.getpid(), item) if isinstance(item, signal.Signals) else item * 2

    def finish(self):
        os.kill(os.getpid(), signal.SIGSEGV)
