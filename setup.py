"""Builds the libraries of llamatelemetry/lib with ninja, g++ and, where it is found, nvcc.

Metadata and sdist need neither torch nor a compiler; build_ext needs torch's headers.
The switches stand in one table in README.md.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
CXX_FLAGS += [f"-I{CSRC}"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", f"-I{CSRC}"]
NVCC_FLAGS += ["-DLT_CUDA", "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Werror=all-warnings"]
LINK_FLAGS = "-shared -Wl,--no-as-needed -Wl,--exclude-libs,ALL"

# The levels of csrc/vec/isa.h.
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")]
ISA_FLAGS = {
    "scalar": ["-march=x86-64-v2"],
    "avx2": ["-DLT_ISA=avx2", "-DLT_ISA_AVX2", "-march=x86-64-v2", *AVX2_FLAGS],
    "avx512": [
        *["-DLT_ISA=avx512", "-DLT_ISA_AVX512", "-march=x86-64-v2", *AVX2_FLAGS, *AVX512_FLAGS],
        "-mprefer-vector-width=512",
        "-Wno-maybe-uninitialized",  # gcc 12 warns inside its own AVX-512 headers
    ],
}
# What the portable kernels are compiled for; a *_sm90.cu gets 9.0a alone. +PTX serves newer GPUs.
DEFAULT_ARCHS = "7.5;8.0;9.0+PTX"


def parse_archs(text: str) -> list[str]:
    """Checks "7.5;8.0+PTX" (or with commas or spaces); returns its parts, DEFAULT_ARCHS for ""."""
    archs = text.replace(",", " ").replace(";", " ").split() or DEFAULT_ARCHS.split(";")
    for arch in archs:
        major, dot, minor = arch.removesuffix("+PTX").partition(".")
        if not (
            dot and major.isdecimal() and minor.isdecimal() and (int(major), int(minor)) >= (7, 5)
        ):
            raise SystemExit(
                "llamatelemetry: LLAMATELEMETRY_CUDA_ARCHS must list architectures >= 7.5 such as "
                f"{DEFAULT_ARCHS!r}, got {arch!r} in {text!r}"
            )
    return archs


def arch_flags(source: str, archs: list[str]) -> list[str]:
    """nvcc's -gencode flags for one source; none when archs leave it out."""
    if source.endswith("_sm90.cu"):
        hopper = any(arch.startswith("9.0") for arch in archs)
        return ["-gencode=arch=compute_90a,code=sm_90a"] if hopper else []
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def find_nvcc() -> str | None:
    """The CUDA compiler, or None for a CPU-only build. Whether a GPU is present does not matter."""
    wanted = os.environ.get("LLAMATELEMETRY_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(
            f"llamatelemetry: LLAMATELEMETRY_CUDA must be auto, 0 or 1, got {wanted!r}"
        )
    nvcc = (
        os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    )
    if wanted == "1" and not nvcc:
        raise SystemExit("llamatelemetry: LLAMATELEMETRY_CUDA=1 needs nvcc on PATH or in NVCC")
    if wanted == "0" or not nvcc:
        print("llamatelemetry: CPU-only build (no nvcc, or LLAMATELEMETRY_CUDA=0)", flush=True)
        return None
    return nvcc


def torch_flags() -> list[str]:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "llamatelemetry: building needs the headers of torch >= 2.10, and there is no torch; "
            "pip install torch, then pip install --no-build-isolation ."
        )
    include = Path(spec.submodule_search_locations[0]) / "include"
    return ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(include)]


def ninja_file(nvcc: str | None, archs: list[str], levels: list[str]) -> str:
    cxx = os.environ.get("CXX", "g++")
    compile_rule = "-MD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
    text = [
        f"rule cxx\n  command = {cxx} {compile_rule}",
        f"rule nvcc\n  command = {nvcc} {compile_rule}",
        # An empty library with torch's soname: the real one fills in at load, whatever torch it is.
        f"rule stub\n  command = {cxx} -shared -x c++ /dev/null -Wl,-soname,$soname -o $out",
        f"rule link_cpu\n  command = {cxx} {LINK_FLAGS} -o $out $in -Lstub -ltorch_cpu",
        f"rule link_cuda\n  command = {nvcc} {LINK_FLAGS.replace('-Wl,', '-Xlinker=')} "
        f"-cudart=static -ccbin {cxx} -o $out $in -Lstub -ltorch_cpu -ltorch_cuda",
        "build stub/libtorch_cpu.so: stub\n  soname = libtorch_cpu.so",
        "build stub/libtorch_cuda.so: stub\n  soname = libtorch_cuda.so",
    ]
    objects: dict[str, list[str]] = {"cpu": [], "cuda": []}

    def compile_(rule: str, library: str, source: Path, tag: str, flags: list[str]) -> None:
        objects[library].append(f"{library}/{source.relative_to(CSRC)}.{tag}.o")
        text.append(f"build {objects[library][-1]}: {rule} {source}\n  flags = {' '.join(flags)}")

    with_torch = torch_flags()
    for pattern in ("schema.cpp", "common/*.cpp", "vec/*.cpp", "*/ops.cpp"):
        for source in sorted(CSRC.glob(pattern)):
            compile_("cxx", "cpu", source, "host", [*CXX_FLAGS, *with_torch])
    for source in sorted(CSRC.glob("*/*_cpu.cpp")):
        for level in levels:
            compile_("cxx", "cpu", source, level, [*CXX_FLAGS, *ISA_FLAGS.get(level, [])])
    if nvcc:
        for source in sorted(CSRC.glob("*/ops.cpp")):
            compile_("nvcc", "cuda", source, "host", [*NVCC_FLAGS, *with_torch])
        for source in sorted(CSRC.glob("*/*.cu")):
            if flags := arch_flags(source.name, archs):
                compile_("nvcc", "cuda", source, "device", [*NVCC_FLAGS, *flags])
    for library in ["cpu", "cuda"] if nvcc else ["cpu"]:
        inputs = " ".join(objects[library]) + " | stub/libtorch_cpu.so stub/libtorch_cuda.so"
        text.append(f"build libllamatelemetry_{library}.so: link_{library} {inputs}")
    return "\n".join(text) + "\n"


class NinjaBuild(build_ext):
    def run(self) -> None:
        in_place = self.editable_mode or self.inplace
        package = (ROOT if in_place else Path(self.build_lib).resolve()) / "llamatelemetry"
        nvcc = find_nvcc()
        archs = parse_archs(os.environ.get("LLAMATELEMETRY_CUDA_ARCHS", "")) if nvcc else []
        levels = list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["scalar"]
        work = ROOT / "build" / "ninja"
        for folder in (work, package / "lib"):
            folder.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(ninja_file(nvcc, archs, levels))
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(work), "-j", jobs], check=True)
        for name in ("libllamatelemetry_cpu.so", "libllamatelemetry_cuda.so"):
            (package / "lib" / name).unlink(missing_ok=True)
            if "cpu" in name or nvcc:
                shutil.copy2(work / name, package / "lib" / name)
        info = f'"""What this build holds."""\n\nCUDA_ARCHS: list[str] = {archs!r}\n'
        (package / "_build_info.py").write_text(f"{info}CPU_ISA_LEVELS: list[str] = {levels!r}\n")


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the libraries use no Python API, so every Python 3 loads them."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("llamatelemetry.lib", sources=[])],
        cmdclass={"build_ext": NinjaBuild, "bdist_wheel": PlatformWheel},
    )
