"""Builds the libraries of llamatelemetry/lib with ninja, g++ and, where it is found, nvcc.

Metadata and sdist need neither torch nor a compiler. README.md has the table of the switches.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WORK = ROOT / "build" / "ninja"  # kept between builds: only what changed is compiled again
FLAGS = "-O3 -std=c++20 -I../../csrc"
CXX_FLAGS = f"{FLAGS} -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra"  # vec_fma fuses
NVCC_FLAGS = f"{FLAGS} -DLT_CUDA -DUSE_CUDA --expt-relaxed-constexpr"
if os.environ.get("CI"):  # else not fatal: a user's newer compiler may have new warnings
    CXX_FLAGS, NVCC_FLAGS = f"{CXX_FLAGS} -Werror", f"{NVCC_FLAGS} -Werror=all-warnings"
LINK_FLAGS = "-shared -Wl,--no-as-needed -Wl,--exclude-libs,ALL"
STUBS = ("stub/libtorch_cpu.so", "stub/libtorch_cuda.so")
AVX2 = "-march=x86-64-v2 -mavx2 -mfma -mf16c"
QUIET = "-Wno-uninitialized -Wno-maybe-uninitialized"  # gcc 12 warns inside its own headers
WIDE = f"{AVX2} -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mprefer-vector-width=512 {QUIET}"
ISA_FLAGS = {  # the levels of csrc/cpu/isa.h
    "scalar": "-march=x86-64-v2",
    "avx2": f"-DLT_ISA=avx2 {AVX2}",
    "avx512": f"-DLT_ISA=avx512 {WIDE}",
    "avx512bf16": f"-DLT_ISA=avx512bf16 {WIDE} -mavx512bf16",
    "amx": f"-DLT_ISA=amx -DLT_ISA_AMX {WIDE} -mavx512bf16 -mamx-tile -mamx-bf16",
}
if platform.machine() not in ("x86_64", "AMD64"):
    ISA_FLAGS = {"scalar": ""}
DEFAULT_ARCHS = "7.5;8.0;9.0+PTX"  # a *_sm90.cu gets 9.0a alone; +PTX serves newer GPUs


def parse_archs(text: str) -> list[str]:
    """The parts of "7.5;8.0+PTX" (or with commas or spaces), DEFAULT_ARCHS for ""."""
    archs = re.findall(r"[^;,\s]+", text) or DEFAULT_ARCHS.split(";")
    if all(re.fullmatch(r"(7\.5|[89]\.\d|1\d\.\d)(\+PTX)?", arch) for arch in archs):
        return archs
    raise SystemExit(f"LLAMATELEMETRY_CUDA_ARCHS must be >= 7.5, as {DEFAULT_ARCHS}, got {text!r}")


def arch_flags(source: str, archs: list[str]) -> str:
    """nvcc's -gencode flags for one source; "" when archs leave it out."""
    if source.endswith("_sm90.cu"):
        archs = ["9.0a"] if any(arch.startswith("9.0") for arch in archs) else []
    flags = []
    for arch in archs:
        number, ptx = arch.removesuffix("+PTX").replace(".", ""), arch.endswith("+PTX")
        for code in [f"sm_{number}", f"compute_{number}"][: 1 + ptx]:
            flags.append(f"-gencode=arch=compute_{number},code={code}")
    return " ".join(flags)


def find_nvcc() -> str | None:
    """The CUDA compiler, or None for a CPU-only build. Whether a GPU is present does not matter."""
    wanted, path = os.environ.get("LLAMATELEMETRY_CUDA", "auto"), os.environ.get("PATH", "")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc", path=f"{path}:/usr/local/cuda/bin")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"LLAMATELEMETRY_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "1" and not nvcc:
        raise SystemExit("LLAMATELEMETRY_CUDA=1 needs nvcc on PATH or in NVCC")
    if nvcc and wanted != "0":
        return nvcc
    print("llamatelemetry: CPU-only build (no nvcc, or LLAMATELEMETRY_CUDA=0)", flush=True)
    return None


def torch_flags() -> str:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("building needs the headers of torch >= 2.10; pip install torch first")
    include = f"{spec.submodule_search_locations[0]}/include"
    return f'-DTORCH_TARGET_VERSION=0x020a000000000000 -isystem "{include}"'


def ninja_file(nvcc: str | None, archs: list[str]) -> str:
    cxx = os.environ.get("CXX", "g++")
    compile_rule = "-MD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
    text = [
        f"rule cxx\n  command = {cxx} {CXX_FLAGS} {compile_rule}",
        f"rule nvcc\n  command = {nvcc} -Xcompiler=-fPIC,-fvisibility=hidden,-Wall {compile_rule}",
        # An empty library with torch's soname: the real one, of any version, fills in at load.
        f"rule stub\n  command = {cxx} -shared -x c++ /dev/null -Wl,-soname,$soname -o $out",
        f"rule link_cpu\n  command = {cxx} {LINK_FLAGS} -o $out $in -Lstub -ltorch_cpu",
        f"rule link_cuda\n  command = {nvcc} {LINK_FLAGS.replace('-Wl,', '-Xlinker=')} "
        f"-cudart=static -ccbin {cxx} -o $out $in -Lstub -ltorch_cpu -ltorch_cuda",
        *(f"build {stub}: stub\n  soname = {Path(stub).name}" for stub in STUBS),
    ]
    objects: dict[str, list[str]] = {"cpu": [], "cuda": []}

    def add(rule: str, library: str, pattern: str, tag: str, flags: str) -> None:
        for source in sorted(path.relative_to(ROOT) for path in ROOT.glob(f"csrc/{pattern}")):
            device = arch_flags(source.name, archs) if source.suffix == ".cu" else ""
            if device or source.suffix != ".cu":
                output = f"{library}/{source.relative_to('csrc')}.{tag}.o"
                text.append(f"build {output}: {rule} ../../{source}\n  flags = {flags} {device}")
                objects[library].append(output)

    for pattern in ("schema.cpp", "facts.cpp", "common/*.cpp", "cpu/*.cpp", "*/ops*.cpp"):
        add("cxx", "cpu", pattern, "host", torch_flags())
    for level, flags in ISA_FLAGS.items():
        rooms = "attention" if "bf16" in flags else "*"
        add("cxx", "cpu", f"{rooms}/**/*_cpu.cpp", level, flags)
    if nvcc:
        sm90 = "-DLT_SM90" if any(arch.startswith("9.0") for arch in archs) else ""
        add("nvcc", "cuda", "*/ops*.cpp", "host", f"{NVCC_FLAGS} {sm90} {torch_flags()}")
        add("nvcc", "cuda", "**/*.cu", "device", f"{NVCC_FLAGS} {sm90}")
    for library in ["cpu", "cuda"] if nvcc else ["cpu"]:
        inputs = " ".join([*objects[library], "|", *STUBS])
        text.append(f"build libllamatelemetry_{library}.so: link_{library} {inputs}")
    return "\n".join(text) + "\n"


class NinjaBuild(build_ext):
    def run(self) -> None:
        in_place = self.editable_mode or self.inplace
        package = (ROOT if in_place else Path(self.build_lib).resolve()) / "llamatelemetry"
        nvcc = find_nvcc()
        archs = parse_archs(os.environ.get("LLAMATELEMETRY_CUDA_ARCHS", "")) if nvcc else []
        WORK.mkdir(parents=True, exist_ok=True)
        (package / "lib").mkdir(parents=True, exist_ok=True)
        (WORK / "build.ninja").write_text(ninja_file(nvcc, archs))
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([sys.executable, "-m", "ninja", "-j", jobs], cwd=WORK, check=True)
        for name in ("libllamatelemetry_cpu.so", "libllamatelemetry_cuda.so"):
            (package / "lib" / name).unlink(missing_ok=True)  # a process may have it loaded
            if "cpu" in name or nvcc:
                shutil.copy2(WORK / name, package / "lib" / name)
        info = f"CUDA_ARCHS: list[str] = {archs}\nCPU_ISA_LEVELS: list[str] = {list(ISA_FLAGS)}\n"
        (package / "_build_info.py").write_text(f'"""What this build holds."""\n\n{info}')


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:  # no Python API is used: every Python 3 loads it
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    commands = {"build_ext": NinjaBuild, "bdist_wheel": PlatformWheel}
    setup(ext_modules=[Extension("llamatelemetry.lib", sources=[])], cmdclass=commands)
