"""`python -m tests.fakes.train`: smedjan's training command with the bigram backend."""

import sys

from smedjan_common.commands import train
from tests.fakes.bigram import load

if __name__ == "__main__":
    sys.exit(train.run("fake", load))
