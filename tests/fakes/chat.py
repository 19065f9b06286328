"""`python -m tests.fakes.chat`: smedjan's talk command with the bigram backend."""

import sys

from smedjan_common.commands import chat
from tests.fakes.bigram import load

if __name__ == "__main__":
    sys.exit(chat.run("fake", load))
