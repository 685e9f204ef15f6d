"""What to install where a package of an extra is missing."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version


def not_installed(what: str, package: str, extra: str) -> str:
    """The sentence for a package that is missing: what needs it, and how to install the extra."""
    return (
        f"{what} needs {package}, which is not installed; install what it needs with: "
        f"{install_command(extra)}"
    )


def install_command(extra: str) -> str:
    """The pip command that brings an extra's packages, without building this package again.

    Args:
        extra: a name of pyproject.toml's optional-dependencies.

    Returns:
        It names those that are not installed, or all where none is missing; in a source tree that
        nobody installed, where pip knows no extras, it installs the tree.
    """
    try:
        found = _packages(extra)
    except PackageNotFoundError:
        built = f'pip install --no-build-isolation ".[{extra}]"'
        return f"{built} (with LLAMATELEMETRY_CUDA=0 in front where there is no GPU)"
    missing = [package for package in found if _is_missing(package)]
    return "pip install " + " ".join(f'"{package}"' for package in missing or found)


def _packages(extra: str) -> list[str]:
    """Requirements of an extra, those of the extras that it names among them."""
    found: list[str] = []
    for line in requires("llamatelemetry") or []:
        requirement, _, marker = line.partition(";")
        if not re.search(rf"extra == ['\"]{extra}['\"]", marker):
            continue
        if nested := re.fullmatch(r"llamatelemetry\[(.+)\]", requirement.strip()):
            for name in nested[1].split(","):
                found += _packages(name.strip())
        else:
            found.append(requirement.strip())
    return found


def _is_missing(requirement: str) -> bool:
    try:
        version(re.split(r"[^\w.-]", requirement)[0])
    except PackageNotFoundError:
        return True
    return False
