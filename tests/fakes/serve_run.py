"""`python -m tests.fakes.serve_run`: smedjan's serving command with the bigram backend."""

import sys

from smedjan_common.commands import serve
from tests.fakes.bigram import load

if __name__ == "__main__":
    sys.exit(serve.run("fake", load))
