# %% [markdown]
# # Write an op
#
# From a schema to `torch.compile` in one sitting: the op `relu_squared(x) = max(x, 0)²`, an
# activation of some language models, with a kernel in C++. The same steps make an op of this
# package, where each has its file (`docs/adding_an_op.md`): schema, checks, kernel, wrapper and
# fake, reference, tests, benchmark.
#
# It needs a C++ compiler, g++ or clang++.

# %%
import ctypes
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch

torch.manual_seed(0)
compiler = shutil.which("g++") or shutil.which("clang++")
assert compiler, "this notebook needs g++ or clang++ in PATH"

# %% [markdown]
# ## 1. The schema
#
# A schema is the law: what goes in, what comes out, what is written. `Tensor x` is only read, the
# result is a fresh tensor. An op that writes into its argument would say `Tensor(a!) x`.

# %%
library = torch.library.Library("notebook", "DEF")
print("defined:", library.define("relu_squared(Tensor x) -> Tensor"))

# %% [markdown]
# ## 2. The kernel
#
# A kernel knows nothing of torch: pointers and sizes. So it compiles quickly and can be read alone.
# In the package such a file is `csrc/<room>/<op>_cpu.cpp`, with a CUDA kernel beside it.

# %%
KERNEL = """
#include <cstdint>

// out[i] = max(x[i], 0)^2. Bound by bandwidth: one read and one write a value.
extern "C" void relu_squared(const float* __restrict__ x, float* __restrict__ out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const float positive = x[i] < 0 ? 0 : x[i];  // false for NaN, which stays NaN
    out[i] = positive * positive;
  }
}
"""
folder = tempfile.TemporaryDirectory()
source, built = Path(folder.name, "kernel.cpp"), Path(folder.name, "kernel.so")
source.write_text(KERNEL)
options = ["-O3", "-march=native", "-fno-trapping-math", "-shared", "-fPIC"]
subprocess.run([compiler, *options, source, "-o", built], check=True)

kernel = ctypes.CDLL(str(built)).relu_squared
kernel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
kernel.restype = None

# %% [markdown]
# ## 3. Checks and allocation
#
# Checked once, before the kernel: a refusal names the op, the argument, the rule and the value, and
# the way out where there is one. Then the output is allocated and the kernel launched.


# %%
def relu_squared_cpu(x):
    if x.dtype != torch.float32:
        raise RuntimeError(
            f"relu_squared: x must be float32, got {x.dtype}; cast it with x.float()"
        )
    x = x.contiguous()
    out = torch.empty_like(x)
    kernel(x.data_ptr(), out.data_ptr(), x.numel())
    return out


library.impl("relu_squared", relu_squared_cpu, "CPU")

x = torch.tensor([-2.0, 0.5, 3.0, float("nan")])
print(torch.ops.notebook.relu_squared(x))
try:
    torch.ops.notebook.relu_squared(x.double())
except RuntimeError as error:
    print(error)

# %% [markdown]
# ## 4. The fake
#
# `torch.compile` and `torch.export` run an op on tensors without data. The fake says what shape,
# dtype and strides the result has, and computes nothing.


# %%
@torch.library.register_fake("notebook::relu_squared")
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# %% [markdown]
# ## 5. The wrapper
#
# What a user calls: typed, with a docstring. An inference op refuses where a gradient is needed,
# for it would silently give none.


# %%
def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """Squared ReLU: ``max(x, 0)²``.

    Args:
        x: any shape and strides, float32, on the CPU

    Returns:
        shape of x, contiguous; NaN stays NaN

    Raises:
        RuntimeError: naming the argument, the rule and the value
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            "relu_squared: x must not require a gradient, got one that does; "
            "use torch.inference_mode()"
        )
    return torch.ops.notebook.relu_squared.default(x)


# %% [markdown]
# ## 6. The tests
#
# The reference is the semantics in plain torch. `opcheck` holds the op to its schema and its fake.


# %%
def reference(x):
    return torch.relu(x).square()


for shape in [(0,), (1,), (7, 33), (2, 3, 4, 5)]:
    x = torch.randn(shape)
    torch.testing.assert_close(relu_squared(x), reference(x), rtol=0, atol=0)
strided = torch.randn(6, 8).T[::2]
torch.testing.assert_close(relu_squared(strided), reference(strided), rtol=0, atol=0)
nan = torch.tensor([float("nan"), 1.0])
torch.testing.assert_close(relu_squared(nan), reference(nan), rtol=0, atol=0, equal_nan=True)

tests = torch.library.opcheck(torch.ops.notebook.relu_squared.default, (torch.randn(4, 5),))
for name, outcome in tests.items():
    print(f"{name}: {outcome}")

# %% [markdown]
# ## 7. torch.compile
#
# `fullgraph=True` fails at a graph break, so passing it shows that there is none. The "aot_eager"
# backend traces as the default one does and needs no further compiler; another size must not fail.


# %%
@torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
def mlp(x, up, down):
    return relu_squared(x @ up) @ down


up, down = torch.randn(16, 64), torch.randn(64, 16)
with torch.inference_mode():
    for rows in (3, 8):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(mlp(x, up, down), reference(x @ up) @ down)
print("compiled without a graph break, for 3 rows and for 8")

# %% [markdown]
# ## 8. The benchmark
#
# Beside the best that torch has, in turns, so that a machine that changes speed changes it for
# both. The bytes that must move, one read and one write, over the time is the bandwidth reached.


# %%
def bandwidths(size, rounds=7):
    """GB/s of ours and of torch, the best of the rounds."""
    x = torch.randn(size)
    best = {relu_squared: 0.0, reference: 0.0}
    for _ in range(rounds):
        for function in best:
            start = time.perf_counter()
            function(x)
            best[function] = max(best[function], 2 * x.nbytes / (time.perf_counter() - start) / 1e9)
    return best[relu_squared], best[reference]


torch.set_num_threads(1)  # ours has one
sizes = [2**i for i in range(12, 23, 2)]
ours, theirs = zip(*map(bandwidths, sizes), strict=True)

figure, axes = plt.subplots(figsize=(6, 3.2))
axes.plot(sizes, ours, "o-", color="#0072B2", label="relu_squared")
axes.plot(sizes, theirs, "s-", color="#D55E00", label="torch.relu(x).square()")
axes.set_xscale("log", base=2)
axes.set_ylim(bottom=0)
axes.set_xlabel("values of x")
axes.set_ylabel("bandwidth (GB/s)")
axes.grid(alpha=0.3)
axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
plt.show()

# %% [markdown]
# The op reads and writes once where two ops do so twice; in small tensors the call itself costs
# most, and in large ones the memory of a new result. The kernel runs on one thread and is built for
# this machine alone; the package's kernels are compiled once for each CPU level and share their
# work among threads (`csrc/vec`, `csrc/cpu`).
#
# To read an op of the package from end to end: `llamatelemetry/ops/norm.py`, `csrc/schema.cpp`,
# `csrc/norm/ops.cpp`, `csrc/norm/rms_norm_cpu.cpp`, and for CUDA `csrc/norm/rms_norm.cu`.

# %%
folder.cleanup()
