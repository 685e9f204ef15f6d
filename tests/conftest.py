"""Fixtures and options that every room's tests share."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
_left_out = pytest.StashKey[int]()

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="skips for want of a GPU fail")


def pytest_configure(config: pytest.Config) -> None:
    """Refuses to test a library of other sources than those that lie here."""
    import llamatelemetry

    if Path(llamatelemetry.__file__).parent != ROOT / "llamatelemetry":
        return  # an installed wheel has no csrc beside it
    if not (ROOT / "llamatelemetry" / "_build_info.py").exists():
        raise pytest.UsageError("there is no library here yet: run make build")
    from llamatelemetry import _build_info

    if getattr(_build_info, "SOURCES", None) != _fingerprint():
        raise pytest.UsageError("csrc is newer than the library: run make build")


def _fingerprint() -> str:
    spec = importlib.util.spec_from_file_location("ninja_file", ROOT / "build_tools" / "ninja.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fingerprint()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    needs = {"gpu": (0, 0), "sm80": (8, 0), "sm90": (9, 0)}
    has = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if has is None and not config.getoption("--require-gpu"):
        twins = [item for item in items if any(map(item.get_closest_marker, needs))]
        config.stash[_left_out] = len(twins)
        config.hook.pytest_deselected(items=twins)
        items[:] = [item for item in items if not any(map(item.get_closest_marker, needs))]
    for item in items:
        for name, capability in needs.items():
            if item.get_closest_marker(name) and (has is None or has < capability):
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU ({name}), have {has}"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist tells the first one what it left out."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_left_out, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    node.config.stash[_left_out] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if count := terminalreporter.config.stash.get(_left_out, 0):
        terminalreporter.write_line(f"{count} tests need a GPU, and there is none: left out")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and item.config.getoption("--require-gpu"):
        reason = str(getattr(report, "longrepr", ""))
        if "needs a GPU" in reason:
            report.outcome = "failed"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def set_threads():
    """torch.set_num_threads; after the test there are as many as before."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session", autouse=True)
def _forced_level_is_used():
    from llamatelemetry._native import library

    forced = os.environ.get("LLAMATELEMETRY_CPU_ISA")
    assert forced in (None, library.cpu_isa())
