"""What is said where a package of an extra is missing."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from llamatelemetry import extras

REQUIRES = [
    "torch>=2.10",
    'numpy; extra == "hf"',
    'jinja2<4,>=3; extra == "hf"',
    'llamatelemetry[hf]; extra == "serve"',
    'uvicorn>=0.30; extra == "serve"',
    "triton>=3.6; (platform_system == 'Linux') and extra == 'triton'",
    'llamatelemetry[hf,triton]; extra == "test"',
]


@pytest.fixture
def installed(monkeypatch):
    """Names of the packages that seem installed, of which the package itself is one."""
    names = {"torch"}

    def version(name):
        if name not in names:
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(extras, "requires", lambda _: REQUIRES)
    monkeypatch.setattr(extras, "version", version)
    return names


@pytest.mark.parametrize(
    ("extra", "packages"),
    [
        ("serve", '"numpy" "jinja2<4,>=3" "uvicorn>=0.30"'),
        ("triton", '"triton>=3.6"'),
        ("test", '"numpy" "jinja2<4,>=3" "triton>=3.6"'),
    ],
)
def test_it_installs_packages_and_builds_nothing(installed, extra, packages):
    assert extras.install_command(extra) == f"pip install {packages}"


def test_it_names_those_that_are_missing(installed):
    installed |= {"numpy", "jinja2"}
    assert extras.not_installed("serve", "uvicorn", "serve") == (
        "serve needs uvicorn, which is not installed; install what it needs with: "
        'pip install "uvicorn>=0.30"'
    )


def test_it_names_all_where_pip_misses_none(installed):
    installed |= {"numpy", "jinja2"}
    assert extras.install_command("hf") == 'pip install "numpy" "jinja2<4,>=3"'


def test_in_a_tree_that_is_not_installed(monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", requires)
    command = extras.install_command("serve")
    assert command.startswith('pip install --no-build-isolation ".[serve]"')
    assert "LLAMATELEMETRY_CUDA=0" in command
