"""What setuptools asks of the build; build_tools/ninja.py makes the libraries.

Metadata and sdist need neither torch nor a compiler. README.md has the table of the switches.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip runs this file from elsewhere

from build_tools import ninja  # noqa: E402


class NinjaBuild(build_ext):
    """Builds both libraries where they are wanted: in the tree, or in the wheel to be."""

    def run(self) -> None:
        in_place = self.editable_mode or self.inplace
        ninja.build((ROOT if in_place else Path(self.build_lib).resolve()) / "llamatelemetry")
        if in_place:
            ninja.write_compile_commands()


class PlatformWheel(bdist_wheel):
    """Tags the wheel for every Python 3: no Python API is used."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    commands = {"build_ext": NinjaBuild, "bdist_wheel": PlatformWheel}
    setup(ext_modules=[Extension("llamatelemetry.lib", sources=[])], cmdclass=commands)
