"""`python -m convert SRC DST --to FORMAT`."""

import sys

from convert.cli import main

sys.exit(main())
