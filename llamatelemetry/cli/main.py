"""The command line: each subcommand's module adds itself to the parser."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llamatelemetry.cli import doctor, generate, profile, serve, tune
from llamatelemetry.cli.output import guarded, replace_what_a_terminal_lacks


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit code of the process."""
    parser = argparse.ArgumentParser(
        prog="llamatelemetry",
        description="Generates text with a local model or serves it; says what a machine can do.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate.add_command(commands)
    serve.add_command(commands)
    tune.add_command(commands)
    profile.add_command(commands)
    doctor.add_command(commands)
    replace_what_a_terminal_lacks()
    parsed = parser.parse_args(arguments)
    return guarded(lambda: int(parsed.run(parsed)))


if __name__ == "__main__":
    sys.exit(main())
