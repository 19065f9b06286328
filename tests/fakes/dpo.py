"""`python -m tests.fakes.dpo`: smedjan's dpo with the bigram backend."""

import sys

from smedjan_common.commands import dpo
from tests.fakes.bigram import load

if __name__ == "__main__":
    sys.exit(dpo.run("fake", load))
