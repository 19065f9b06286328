"""`python -m tests.fakes.generate`: smedjan's generation command with the bigram backend."""

import sys

from smedjan_common.commands import generate
from tests.fakes.bigram import load

if __name__ == "__main__":
    sys.exit(generate.run("fake", load))
