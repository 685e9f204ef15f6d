"""Draws the plots of the documents from results/*.json: python benchmarks/plots.py [--check]

Each file carries the fingerprint of the JSON that it shows; --check compares those and draws
nothing, so that it needs no matplotlib.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from statistics import median

import harness

DOCS = Path(__file__).resolve().parent.parent / "docs"
PLOTS = {"ablation-cuda.svg": "ablation-cuda", "ablation-cpu.svg": "ablation-cpu"}
COLOURS = ("#9a9a9a", "#56b4e9", "#0072b2", "#e69f00", "#009e73", "#cc79a7")  # Okabe and Ito's


def fingerprint(name: str) -> str:
    return hashlib.sha256((harness.RESULTS / f"{name}.json").read_bytes()).hexdigest()[:16]


def draw(name: str, path: Path) -> None:
    """Bars of an ablation: a group for each batch, a bar for each part that was added."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "llamatelemetry"
    from matplotlib import pyplot

    environment, rows = harness.load(harness.RESULTS / f"{name}.json")
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        case, _, part = row.name.partition(": ")
        model, what, size = case.split(", ")
        batch = re.sub(r" after (\d+)", r"\nprompt \1", size)
        label = f"{batch}\nfirst token" if what.startswith("first") else batch
        theirs = next(iter(row.baselines.values()))
        speedup = median(b / a for a, b in zip(row.ours, theirs, strict=True))
        groups.setdefault(model, {})[f"{label}|{part}"] = speedup
    size = (max(5.4 * len(groups), 6.8), 3.8)  # as wide as the legend at least
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=size, squeeze=False, layout="constrained"
    )
    for axis, (model, bars) in zip(axes[0], groups.items(), strict=True):
        labels = list(dict.fromkeys(key.split("|")[0] for key in bars))
        parts = list(dict.fromkeys(key.split("|")[1] for key in bars))
        width = 0.84 / len(parts)
        for i, part in enumerate(parts):
            places = [x + (i - (len(parts) - 1) / 2) * width for x in range(len(labels))]
            drawn = axis.bar(
                places,
                [bars[f"{label}|{part}"] for label in labels],
                width * 0.94,
                label=part,
                color=COLOURS[i % len(COLOURS)],
            )
            axis.bar_label(drawn, fmt="%.1f", fontsize=6.5, padding=1)
        axis.set_title(model)
        axis.set_xticks(range(len(labels)), labels)
        axis.set_ylabel("times as fast as transformers eager")
        axis.spines[["top", "right"]].set_visible(False)
    handles, parts = axes[0][0].get_legend_handles_labels()
    where = "outside upper center"
    figure.legend(handles, parts, frameon=False, fontsize=8, loc=where, ncols=3 * len(groups))
    where = environment["cpu"] if name.endswith("cpu") else environment["gpus"][0]["name"]
    figure.supxlabel(f"{where}, commit {environment['commit']}", fontsize=7)
    figure.savefig(path, metadata={"Description": fingerprint(name), "Date": None})


def main() -> int:
    stale = []
    for file, name in PLOTS.items():
        path = DOCS / file
        if not (harness.RESULTS / f"{name}.json").exists():
            continue
        if path.exists() and fingerprint(name) in path.read_text():
            continue
        stale.append(file)
        if "--check" in sys.argv:
            print(f"docs/{file} is older than its JSON; run python benchmarks/plots.py")
        else:
            draw(name, path)
            print(f"drew docs/{file}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
