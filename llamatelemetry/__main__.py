"""python -m llamatelemetry: the command line."""

import sys

from llamatelemetry.cli import main

sys.exit(main())
