"""Where the time of one decoded token goes on the CPU: every launch of the recorded step.

Writes results/decode_profile-cpu.json: medians of many steps, in the order of use;
notes/inference.md quotes it.
"""

from __future__ import annotations

import argparse
import json
from statistics import median

import harness
from bench_generate import PROMPT_TOKENS, TEXT
from rich.console import Console
from rich.table import Table

from llamatelemetry.inference.engine import InferenceEngine
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.loading.find import find_model, load_model

STEPS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="few steps, no JSON")
    arguments = parser.parse_args()
    steps = 5 if arguments.quick else STEPS

    engine = InferenceEngine(load_model(str(find_model(arguments.model)), device="cpu"))
    ids = engine.tokenizer.encode(TEXT, add_special_tokens=False)[:PROMPT_TOKENS]
    tokens = engine.generator.generate([ids], [GREEDY], 3 * steps + 2)
    next(tokens), next(tokens)
    runner = engine.generator.runner
    assert runner is not None
    step = runner.decode_step(1, 1)
    assert step.recording is not None, step.mode
    half = [harness.timed_us(lambda: next(tokens)) for _ in range(steps)]
    profiles = [step.recording.profile() for _ in range(steps)]  # each a step of its own
    whole_us = half + [harness.timed_us(lambda: next(tokens)) for _ in range(steps)]

    durations = [[us for _, us in profile] for profile in profiles]
    launches = [name for name, _ in profiles[0]]
    launch_us = [median(column) for column in zip(*durations, strict=True)]
    last_linear = max(i for i, name in enumerate(launches) if name.startswith("quant_linear"))
    groups: dict[str, list[float]] = {}
    for i, (name, us) in enumerate(zip(launches, launch_us, strict=True)):
        groups.setdefault("vocabulary projection" if i == last_linear else name, []).append(us)
    replay = median(map(sum, durations))
    rows = [(name, len(us), sum(us)) for name, us in groups.items()]
    rows.append(("outside the replay", 1, median(whole_us) - replay))
    table = Table("launch", "count", "us a token", "us each", "share")
    for name, count, us in sorted(rows, key=lambda row: -row[2]):
        share = us / median(whole_us)
        table.add_row(name, str(count), f"{us:.0f}", f"{us / count:.1f}", f"{share:.1%}")
    Console().print(table, f"one token: {median(whole_us):.0f} us")
    if not arguments.quick:
        found = {"environment": harness.environment(), "token_us": median(whole_us), "rows": rows}
        path = harness.RESULTS / "decode_profile-cpu.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
