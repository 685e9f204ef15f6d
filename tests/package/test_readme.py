"""The Python of README.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number, capsys):
    code = EXAMPLES[number]
    if 'load_model("smollm2")' in code:
        loading = pytest.importorskip("llamatelemetry.loading.find")
        try:
            loading.find_model("smollm2")
        except loading.ModelFileError as error:
            pytest.skip(str(error))
    exec(compile(code, f"README.md, example {number}", "exec"), {"__name__": "example"})
    assert "print" not in code or capsys.readouterr().out.strip()
