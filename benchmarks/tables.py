"""Writes the measured tables into the documents: python benchmarks/tables.py [--check | NAME]

A table stands between  <!-- table: NAME -->  and  <!-- end -->, NAME being a file of results/;
<!-- table: NAME (PATTERN) -->  shows the rows alone whose names the regular expression finds. On
the CPU it quotes ratios only: absolute times there are the machine's, and its neighbours'. With a
NAME it prints that table whole, and writes nothing.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from statistics import median

import harness

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SAVED = {"graphs-cuda"}  # whose ratios are shown as time saved too, in per cent
MARKED = re.compile(r"(<!-- table: ([\w-]+)(?: \((.*?)\))? -->\n).*?(<!-- end -->)", re.DOTALL)


def table(name: str, rows: list[harness.Row]) -> str:
    """Markdown: a line a row, a column a baseline."""
    baselines = list(dict.fromkeys(peer for row in rows for peer in row.baselines))
    absolute = name.endswith("-cuda")
    limited = any(row.limits for row in rows)
    header = ["", *(["µs (p10 – p90)", "throughput"] if absolute else [])]
    header += [*(["% of the limit"] if limited else []), *(f"× {peer}" for peer in baselines)]
    header += [f"% less time than {peer}" for peer in baselines if name in SAVED]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in rows:
        cells = [row.name]
        if absolute:
            spread = f"{row.percentile(10):.1f} – {row.percentile(90):.1f}"
            cells += [f"{median(row.ours):.1f} ({spread})", row.throughput()]
        if limited:
            percent = row.percent_of_limit()
            cells.append("" if percent is None else f"{percent:.0f}")
        for peer in baselines:
            cells.append(f"{row.speedup(peer):.2f}" if peer in row.baselines else "")
        if name in SAVED:
            cells += [f"{100 - 100 / row.speedup(peer):.0f}" for peer in baselines]
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def caption(name: str, environment: dict) -> str:
    """One line that says where, with what and when."""
    where = f"{environment['cpu']}, {environment['threads']} threads"
    if name.endswith("-cuda"):
        where = environment["gpus"][0]["name"]
    versions = ", ".join(
        f"{package} {version}"
        for package, version in environment["versions"].items()
        if package
        in ("torch", "transformers", "llama-cpp-python", "xllamacpp", "flashinfer-python")
    )
    return f"*{where}; {versions}; {environment['date'][:10]}, commit {environment['commit']}.*\n"


def block(name: str, pattern: str | None) -> str:
    """What stands between the markers of a table; pattern None takes every row."""
    path = harness.RESULTS / f"{name}.json"
    if not path.exists():
        return "Not measured yet.\n"
    environment, rows = harness.load(path)
    rows = [row for row in rows if re.search(pattern or "", row.name)]
    return f"\n{table(name, rows)}\n{caption(name, environment)}"


def updated(text: str) -> str:
    """The document with its tables made anew."""
    return MARKED.sub(lambda match: f"{match[1]}{block(match[2], match[3])}{match[4]}", text)


def main() -> int:
    if names := [argument for argument in sys.argv[1:] if argument != "--check"]:
        print(*(block(name, None) for name in names))
        return 0
    stale = [path for path in DOCUMENTS if updated(path.read_text()) != path.read_text()]
    for path in stale:
        if "--check" in sys.argv:
            print(f"{path.name}: a table is older than its JSON; run python benchmarks/tables.py")
        else:
            path.write_text(updated(path.read_text()))
            print(f"{path.name}: tables written")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
