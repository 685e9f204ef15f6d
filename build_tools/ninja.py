"""The ninja file of the two libraries: which source is compiled how often, and with what flags.

Nothing here needs torch or a compiler until a build starts.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "ninja"  # kept between builds: only what changed is compiled again
FLAGS = "-O3 -std=c++20 -I../../csrc"
CXX_FLAGS = f"{FLAGS} -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra"  # vec_fma fuses
NVCC_FLAGS = f"{FLAGS} -DLT_CUDA -DUSE_CUDA --expt-relaxed-constexpr"
# What Python calls by ctypes leaves the libraries, and no inline function of C++ does.
EXPORTS = "-Wl,--version-script=../../build_tools/exports.map"
LINK_FLAGS = f"-shared -Wl,--no-as-needed -Wl,--exclude-libs,ALL {EXPORTS}"
HOST_ROOMS = ("binding", "common", "cpu", "format")  # their .cpp are compiled once, for the CPU
STUBS = ("stub/libtorch_cpu.so", "stub/libtorch_cuda.so")
GCC_QUIET = "-Wno-uninitialized -Wno-maybe-uninitialized"  # gcc 12 warns inside its own headers
DEFAULT_ARCHS = "7.5;8.0;9.0+PTX"  # a *_sm90.cu gets 9.0a alone; +PTX serves newer GPUs

# What stops nvcc's build though ptxas only notes it: wgmmas that wait for each other are several
# times slower, and no test of values sees it. CUDA 13.0 has ten such notes, C7509 to C7516, C7518
# and C7520, a cause each; they all say this.
NOTED_ERROR = "wgmma.mma_async instructions are serialized"

AVX2 = "-march=x86-64-v2 -mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mprefer-vector-width=512"
# The levels of csrc/cpu/isa.h, lowest first: (flags, the rooms that have kernels of their own
# there). A room that is left out runs the level below: LT_CPU_LAUNCHER_BF16 says which those are.
LEVELS = {
    "scalar": ("-march=x86-64-v2", "*"),
    "avx2": (f"-DLT_ISA=avx2 {AVX2}", "*"),
    "avx512": (f"-DLT_ISA=avx512 {AVX512}", "*"),
    "avx512bf16": (f"-DLT_ISA=avx512bf16 {AVX512} -mavx512bf16", "attention"),
    "amx": (
        f"-DLT_ISA=amx -DLT_ISA_AMX {AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
        "attention",
    ),
}
if platform.machine() not in ("x86_64", "AMD64"):
    LEVELS = {"scalar": ("", "*")}


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


def cuda_version(nvcc: str | None) -> str | None:
    """The CUDA that nvcc compiles for, e.g. 13.0: what the driver must serve."""
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--version"], stdout=subprocess.PIPE, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", said)
    return match[1] if match else None


def compress_flag(nvcc: str) -> str:
    """What makes the kernels a fifth of their size; only CUDA 13's drivers and newer unpack it."""
    major = (cuda_version(nvcc) or "0").split(".")[0]
    return "--compress-mode=size" if int(major) >= 13 else ""


def find_cxx() -> tuple[str, str]:
    """The C++ compiler and the flags that it alone needs."""
    cxx = os.environ.get("CXX", "g++")
    if shutil.which(cxx.split()[0]) is None:
        raise SystemExit(f"CXX must name a C++ compiler, got {cxx!r}; install g++ 12 or set CXX")
    said = subprocess.run([*cxx.split(), "-dM", "-E", "-x", "c++", os.devnull], text=True,
                          stdout=subprocess.PIPE).stdout  # fmt: skip
    macros = dict(re.findall(r"#define (__clang_major__|__GNUC__) (\d+)", said))
    if clang := macros.get("__clang_major__"):
        if int(clang) < 14:
            raise SystemExit(f"CXX must be g++ >= 12 or clang++ >= 14, got {cxx!r} of {clang}")
        return cxx, "-Wno-unused-function"  # it warns of static inline functions of headers
    if (gcc := macros.get("__GNUC__")) is None or int(gcc) < 12:
        raise SystemExit(f"CXX must be g++ >= 12 or clang++ >= 14, got {cxx!r} of {gcc}")
    return cxx, GCC_QUIET


def torch_flags() -> str:
    """Where torch's headers are, and how much of them we use: what torch 2.10 has."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("building needs the headers of torch >= 2.10; pip install torch first")
    include = f"{spec.submodule_search_locations[0]}/include"
    return f'-DTORCH_TARGET_VERSION=0x020a000000000000 -isystem "{include}"'


def rules(cxx: str, cxx_flags: str, nvcc: str | None) -> Iterator[str]:
    """The rules; ninja shows a source's name for each, and not its command."""
    compile_rule = "-MD -MF $out.d $flags -c $in -o $out"
    rest = "\n  depfile = $out.d\n  deps = gcc\n  description = $source"
    yield f"rule cxx\n  command = {cxx} {cxx_flags} {compile_rule}{rest}"
    compiled = f"{nvcc} -Xcompiler=-fPIC,-fvisibility=hidden,-Wall -ccbin {cxx} {compile_rule}"
    refuse = f"cat $out.log; ! grep -q '{NOTED_ERROR}' $out.log || status=1; exit $$status"
    yield f"rule nvcc\n  command = {compiled} > $out.log 2>&1; status=$$?; {refuse}{rest}"
    link = "\n  description = linking $out"
    # An empty library with torch's soname: the real one, of any version, fills in at load.
    stub = f"{cxx} -shared -x c++ {os.devnull} -Wl,-soname,$soname -o $out"
    yield f"rule stub\n  command = {stub}{link}"
    yield f"rule link_cpu\n  command = {cxx} {LINK_FLAGS} -o $out $in -Lstub -ltorch_cpu{link}"
    yield (
        f"rule link_cuda\n  command = {nvcc} {LINK_FLAGS.replace('-Wl,', '-Xlinker=')} "
        f"-cudart=static -ccbin {cxx} -o $out $in -Lstub -ltorch_cpu -ltorch_cuda{link}"
    )
    for stub in STUBS:
        yield f"build {stub}: stub\n  soname = {Path(stub).name}"


def ninja_file(nvcc: str | None, archs: list[str]) -> str:
    """All of build.ninja: a source a room's folder holds, at any depth, needs no line here."""
    cxx, own_flags = find_cxx()
    warnings = [f"{own_flags}", ""]
    if os.environ.get("CI"):  # else not fatal: a user's newer compiler may have new warnings
        warnings = [f"{own_flags} -Werror", "-Werror=all-warnings"]
    text = list(rules(cxx, f"{CXX_FLAGS} {warnings[0]}", nvcc))
    objects: dict[str, list[str]] = {"cpu": [], "cuda": []}

    def add(rule: str, library: str, pattern: str, tag: str, flags: str) -> None:
        for source in sorted(path.relative_to(ROOT) for path in ROOT.glob(f"csrc/{pattern}")):
            device = arch_flags(source.name, archs) if source.suffix == ".cu" else ""
            if device or source.suffix != ".cu":
                output = f"{library}/{source.relative_to('csrc')}.{tag}.o"
                text.append(
                    f"build {output}: {rule} ../../{source}\n  flags = {flags} {device}\n"
                    f"  source = {source} ({tag})"
                )
                objects[library].append(output)

    host = ("*.cpp", *(f"{room}/**/*.cpp" for room in HOST_ROOMS), "*/**/ops*.cpp")
    for pattern in host:
        add("cxx", "cpu", pattern, "host", torch_flags())
    for level, (flags, rooms) in LEVELS.items():
        add("cxx", "cpu", f"{rooms}/**/*_cpu.cpp", level, flags)
    if nvcc:
        sm90 = "-DLT_SM90" if any(arch.startswith("9.0") for arch in archs) else ""
        nvcc_flags = f"{NVCC_FLAGS} {compress_flag(nvcc)} {warnings[1]} {sm90}"
        add("nvcc", "cuda", "*/**/ops*.cpp", "host", f"{nvcc_flags} {torch_flags()}")
        add("nvcc", "cuda", "**/*.cu", "device", nvcc_flags)
    for library in ["cpu", "cuda"] if nvcc else ["cpu"]:
        inputs = " ".join([*objects[library], "|", *STUBS])
        text.append(f"build libllamatelemetry_{library}.so: link_{library} {inputs}")
    return "\n".join(text) + "\n"


def fingerprint() -> str:
    """A hash of every source of the libraries, which a build keeps and tests compare."""
    digest = hashlib.sha256()
    sources = [p for p in ROOT.glob("csrc/**/*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")]
    for path in sorted([*sources, Path(__file__)]):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(package: Path) -> None:
    """Builds into package/lib, and says in package/_build_info.py what that holds."""
    nvcc = find_nvcc()
    archs = parse_archs(os.environ.get("LLAMATELEMETRY_CUDA_ARCHS", "")) if nvcc else []
    WORK.mkdir(parents=True, exist_ok=True)
    (package / "lib").mkdir(parents=True, exist_ok=True)
    with (WORK / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second build in this folder waits for the first
        sources, start = fingerprint(), time.monotonic()
        (WORK / "build.ninja").write_text(ninja_file(nvcc, archs))
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        _ninja("-j", jobs)
        for name in ("libllamatelemetry_cpu.so", "libllamatelemetry_cuda.so"):
            (package / "lib" / name).unlink(missing_ok=True)  # a process may have it loaded
            if "cpu" in name or nvcc:
                shutil.copy2(WORK / name, package / "lib" / name)
        (package / "_build_info.py").write_text(
            f'"""What this build holds."""\n\nCUDA_ARCHS: list[str] = {archs}\n'
            f"CUDA_VERSION: str | None = {cuda_version(nvcc)!r}\n"
            f"CPU_ISA_LEVELS: list[str] = {list(LEVELS)}\n"
            f'SOURCES = "{sources}"  # build_tools.ninja.fingerprint() of what was built\n'
        )
    print(f"llamatelemetry: built in {time.monotonic() - start:.0f} s", flush=True)


def write_compile_commands() -> None:
    """compile_commands.json for clangd and clang-tidy, from the last build's ninja file."""
    said = subprocess.run(
        [sys.executable, "-m", "ninja", "-t", "compdb", "cxx", "nvcc"],
        cwd=WORK,
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    commands = json.loads(said)
    for entry in commands:  # what follows nvcc's command is the shell's
        entry["command"] = entry["command"].partition(" > ")[0]
    (ROOT / "compile_commands.json").write_text(json.dumps(commands, indent=1) + "\n")


def _ninja(*arguments: str) -> None:
    try:
        subprocess.run([sys.executable, "-m", "ninja", *arguments], cwd=WORK, check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"llamatelemetry: ninja failed ({error.returncode}), see above") from None
