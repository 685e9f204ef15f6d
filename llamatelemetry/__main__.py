"""python -m llamatelemetry: the command line."""

import sys

from llamatelemetry.cli.main import main

sys.exit(main())
