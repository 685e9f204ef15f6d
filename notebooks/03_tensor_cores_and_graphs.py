# %% [markdown]
# # Tensor cores and CUDA graphs
#
# Products in 16 bits that do not overflow, mixed-precision training, and work that is captured once
# and replayed. Without a GPU the same calls run eagerly on the CPU and say so in a warning.

# %%
import time

import matplotlib.pyplot as plt
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llamatelemetry.cuda import (
    CUDAGraph,
    GraphPool,
    disable_cuda_graphs,
    enable_amp,
    enable_cuda_graphs,
    enable_tensor_cores,
    get_tensor_core_info,
    matmul_tensor_core,
    optimize_for_tensor_cores,
)

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
for key, value in get_tensor_core_info().items():
    print(f"{key}: {value}")

# %% [markdown]
# ## Switches
#
# `enable_tensor_cores` sets torch's switches, and unsets what is not allowed; the result says what
# holds now.

# %%
print(enable_tensor_cores(dtype=torch.float16, allow_tf32=False))

# %% [markdown]
# ## Products that stay finite
#
# float16 ends at 65504. `matmul_tensor_core` scales rows and columns that go beyond it by powers of
# two and the product back, so that no finite input becomes inf; the sums come back in the dtype of
# A, here float32. The plot shows the relative error of a product over the size of its values; where
# the line of torch's float16 ends, its results are inf.


# %%
def relative_error(product, exact):
    """Of the whole matrix; inf where a value is."""
    return ((product.double() - exact).norm() / exact.norm()).item()


magnitudes = [10.0**i for i in range(9)]
errors = {"torch, float16": [], "matmul_tensor_core, float16": []}
for magnitude in magnitudes:
    a, b = magnitude * torch.rand(128, 256, device=device), torch.rand(256, 64, device=device)
    exact = a.double() @ b.double()
    errors["torch, float16"].append(relative_error(a.half() @ b.half(), exact))
    errors["matmul_tensor_core, float16"].append(relative_error(matmul_tensor_core(a, b), exact))

figure, axes = plt.subplots(figsize=(6, 3.2))
axes.plot(magnitudes, errors["torch, float16"], "s-", color="#D55E00", label="torch, float16")
ours = errors["matmul_tensor_core, float16"]
axes.plot(magnitudes, ours, "o-", color="#0072B2", label="matmul_tensor_core, float16")
axes.set_xscale("log")
axes.set_yscale("log")
axes.set_ylim(1e-6, 1e-2)
axes.set_xlabel("largest value of A")
axes.set_ylabel("relative error of A @ B")
axes.grid(alpha=0.3)
axes.legend()
plt.show()
assert all(error < 1e-3 for error in ours)
print("torch's float16 gives inf from", magnitudes[errors["torch, float16"].index(float("inf"))])

# %% [markdown]
# ## Mixed-precision training
#
# `enable_amp` gives a gradient scaler and an autocast context that a loop can enter again and
# again. Without CUDA the scaler is disabled and autocast computes in bfloat16.

# %%
net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1)).to(device)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
scaler, autocast = enable_amp(dtype=torch.float16)

x = torch.randn(256, 16, device=device)
target = x[:, :4].sum(1, keepdim=True)
losses = []
for _ in range(50):
    optimizer.zero_grad()
    with autocast:
        loss = nn.functional.mse_loss(net(x).float(), target)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    losses.append(loss.item())
print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
assert losses[-1] < 0.2 * losses[0]

# %% [markdown]
# ## A graph of a function
#
# `capture` runs the function a few times, captures it and returns valid outputs; `replay` copies
# new inputs into the captured buffers and runs the whole again. On the CPU the function is called.

# %%
torch.set_grad_enabled(False)
net.eval()
graph = CUDAGraph()
first = graph.capture(lambda x: {"y": net(x)}, inputs={"x": x[:8].clone()})
assert torch.allclose(first["y"], net(x[:8]), atol=1e-6)

again = graph.replay(x=x[8:16])
assert torch.allclose(again["y"], net(x[8:16]), atol=1e-6)
print("a CUDA graph:", graph.is_captured())

# %% [markdown]
# A block is captured by `with`. What it reads are variables; write into them, then replay.

# %%
a, b = torch.ones(4, device=device), torch.full((4,), 2.0, device=device)
block = CUDAGraph()
with block.capture():
    c = a * b + 1
a.fill_(10)
block.replay()
print(c.tolist())
assert c.tolist() == [21.0] * 4

# %% [markdown]
# Graphs for several batch sizes share one memory pool.

# %%
pool = GraphPool()
for batch in (1, 4, 16):
    pool.capture(f"batch {batch}", lambda x: net(x), {"x": x[:batch].clone()})
print(pool.list_graphs())
assert torch.allclose(pool.replay("batch 4", x=x[20:24]), net(x[20:24]), atol=1e-6)
pool.clear()

# %% [markdown]
# ## Graphs of a whole model
#
# `enable_cuda_graphs` captures a model's forward once for each signature of its inputs. The times
# below compare eager calls with replays; on a CPU both are eager calls, and nothing is measured.

# %%
config = LlamaConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config).eval().to(device)
ids = torch.randint(1000, (1, 8), device=device)
eager = model(ids, use_cache=False).logits


def milliseconds(call):
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 20 * 1e3


if device == "cuda":
    print(f"eager: {milliseconds(lambda: model(ids, use_cache=False)):.2f} ms")
enable_cuda_graphs(model)
assert torch.allclose(model(ids, use_cache=False).logits, eager, atol=1e-4)
if device == "cuda":
    print(f"graph: {milliseconds(lambda: model(ids, use_cache=False)):.2f} ms")
else:
    print("no CUDA: the forward ran eagerly, with the same logits")
disable_cuda_graphs(model)
print("forward is the model's own again:", "forward" not in vars(model))

# %% [markdown]
# ## A model for tensor cores
#
# `optimize_for_tensor_cores` moves a model to the GPU in 16 bits with the fused ops, keeps norms'
# statistics in float32 and guards float16 against overflow. Without tensor cores the model stays as
# it is.

# %%
optimize_for_tensor_cores(model, dtype=torch.float16)
parameter = next(model.parameters())
print(f"the model's weights are {parameter.dtype} on {parameter.device.type}")
