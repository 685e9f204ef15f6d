"""Runs transformers' own tests of model families on our attention, or on patched models.

    python tests/support/transformers_suite.py CHECKOUT attention llama mistral
    python tests/support/transformers_suite.py CHECKOUT patched llama

CHECKOUT is a clone of transformers at the installed version's tag; its tests need the package
parameterized. What fails is run again as transformers has it, and only what passes there is ours.
With --write the rows go into docs/models.md.
As a pytest plugin this file makes the models: LLAMATELEMETRY_SUITE says how.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- transformers_suite.py -->", "<!-- end of suite -->"
HEAD = (
    "| tests | mode | passed | skipped | failed | of these, not as transformers has it |",
    "|---|---|---|---|---|---|",
)
_MODE = "LLAMATELEMETRY_SUITE"  # attention, patched, or theirs
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
_COUNTS = re.compile(r"(\d+) (passed|failed|skipped|error)")


def pytest_configure() -> None:
    """Of the plugin: from here on models are made in the mode."""
    mode = os.environ[_MODE]
    if mode == "attention":
        _choose_attention()
    elif mode == "patched":
        _patch_models()


def _choose_attention() -> None:
    """A model that is asked for no attention in particular gets ours."""
    from transformers import PreTrainedModel

    from llamatelemetry.models.hf_attention import NAME, register

    register()
    adjust = PreTrainedModel._check_and_adjust_attn_implementation

    def ours(self, attn_implementation, *args, **kwargs):
        return adjust(self, attn_implementation or NAME, *args, **kwargs)

    PreTrainedModel._check_and_adjust_attn_implementation = ours


def _patch_models() -> None:
    """A model is patched when it has been made, or read from a file."""
    from transformers import PreTrainedModel

    from llamatelemetry.models.patching import patch

    def patched(model):
        is_asked = model.config._attn_implementation == "sdpa"  # else a test compares others
        if is_asked and not any(tensor.is_meta for tensor in model.parameters()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    _Making.patched += bool(patch(model).replaced)
                except ValueError as error:  # of a class that patch does not take
                    print(f"not patched: {error}")

    begin, end = PreTrainedModel.__init__, PreTrainedModel.post_init
    read = PreTrainedModel.from_pretrained.__func__

    def begun(model, *args, **kwargs):
        _Making.depth += 1
        begin(model, *args, **kwargs)

    def ended(model):
        end(model)
        _Making.depth -= 1
        if not _Making.depth:
            patched(model)

    def from_pretrained(cls, *args, **kwargs):
        _Making.depth += 1
        try:
            made = read(cls, *args, **kwargs)
        finally:
            _Making.depth -= 1
        if not _Making.depth:
            patched(made[0] if isinstance(made, tuple) else made)
        return made

    PreTrainedModel.__init__, PreTrainedModel.post_init = begun, ended
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


class _Making:
    depth = 0  # of models that are being made inside others, or read
    patched = 0


def pytest_terminal_summary(terminalreporter) -> None:
    """Of the plugin: that models were patched at all."""
    terminalreporter.write_line(f"models patched: {_Making.patched}")


def pytest_runtest_setup() -> None:
    """Of the plugin: a test before may have failed while it made a model."""
    _Making.depth = 0


def run(checkout: Path, mode: str, tests: list[str]) -> tuple[set[str], dict[str, int]]:
    """Names of the tests that fail, and how many passed, failed and were skipped.

    Raises:
        RuntimeError: pytest ran no test, or none patched a model that should.
    """
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        _MODE: mode,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as names:
        names.write("\n".join(tests))
        names.flush()
        command = [
            sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider",
            "-p", "transformers_suite", f"@{names.name}",
        ]  # fmt: skip
        ran = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    counts = {what: int(number) for number, what in _COUNTS.findall(ran.stdout)}
    if not counts.get("passed", 0) + counts.get("failed", 0):
        raise RuntimeError(f"pytest must run tests, got {ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    if mode == "patched" and "models patched: 0" in ran.stdout:
        raise RuntimeError("the tests must patch models, got none")
    return set(_FAILED.findall(ran.stdout)), counts


def keep(rows: list[str]) -> None:
    """Puts rows into docs/models.md, in the place of those of the same tests and mode."""
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    kept = {_key(row): row for row in table.strip().splitlines()[len(HEAD) :]}
    kept |= {_key(row): row for row in rows}
    table = "\n".join([*HEAD, *(kept[key] for key in sorted(kept, key=lambda k: (k[1], k[0])))])
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def _key(row: str) -> tuple[str, str]:
    _, tests, mode, *_ = row.split("|")
    return tests.strip(), mode.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description="transformers' tests on our attention")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("mode", choices=("attention", "patched"))
    parser.add_argument("families", nargs="+")
    parser.add_argument("--write", action="store_true", help="into docs/models.md")
    args = parser.parse_args()
    print("\n".join(HEAD))
    ours, rows = 0, []
    for family in args.families:
        file = f"tests/models/{family}/test_modeling_{family}.py"
        failed, counts = run(args.checkout, args.mode, [file])
        theirs = run(args.checkout, "theirs", sorted(failed))[0] if failed else set()
        names = sorted(name.split("::")[-1] for name in failed - theirs)
        ours += len(names)
        numbers = f"{counts.get('passed', 0)} | {counts.get('skipped', 0)} | {len(failed)}"
        rows.append(f"| {family} | {args.mode} | {numbers} | {', '.join(names) or 'none'} |")
        print(rows[-1], flush=True)
    if args.write:
        keep(rows)
    return 1 if ours else 0


if __name__ == "__main__":
    sys.exit(main())
