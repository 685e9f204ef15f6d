# %% [markdown]
# # Two T4s on Kaggle
#
# A T4 has 16 GB and tensor cores of the Turing generation. Kaggle gives two of them for free. Here:
# installing from a wheel, what fits, a model on each GPU, and what a T4 lacks. Without GPUs each
# step says what it skips, and the rest runs on the CPU.
#
# ## Installing
#
# A wheel serves every torch from 2.10 on and every Python from 3.10 on, so none is built here. CI
# attaches one to each run (the artifact "wheel"); add it to the notebook as a dataset, then:
#
# ```sh
# pip install --no-deps /kaggle/input/<your dataset>/llamatelemetry-*.whl
# pip install "transformers>=5.10.1,<5.25" "gguf>=0.17"
# python -m llamatelemetry doctor      # what this machine and this build can do
# ```
#
# With internet access and a compiler, `pip install --no-build-isolation .` in a clone builds it.

# %%
import time
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llamatelemetry import SamplingParams, patch
from llamatelemetry.cuda import get_tensor_core_info
from llamatelemetry.cuda.tensor_core_figures import figures_for
from llamatelemetry.inference import (
    check_flash_attention_available,
    get_optimal_context_length,
    kv_cache_bytes,
    suggest_batch_size,
)
from llamatelemetry.inference.generation import TokenGenerator

gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
for gpu in gpus:
    info = get_tensor_core_info(gpu.index)
    print(gpu, info["device"], info["compute_capability"], info["architecture"])
if not gpus:
    print("No GPU: the models below run on the CPU, and their speed says nothing about a T4.")

# %% [markdown]
# ## What a T4 has, and what it lacks
#
# | | T4 (compute capability 7.5) | this package |
# |---|---|---|
# | float16 on tensor cores | yes | attention, products |
# | bfloat16 | no | `optimize_for_tensor_cores` takes float16 and guards it against overflow |
# | the flash-attn package | needs 8.0 | `flash_attn` has a kernel for 7.5 |
# | asynchronous copies, TMA, wgmma | need 8.0 and 9.0 | other kernels are chosen |
#
# The peak rates are those of the data sheet:

# %%
t4 = figures_for("Tesla T4", (7, 5))
print(f"{t4.card}: {t4.fp16_tflops} TFLOP/s in float16, {t4.int8_tops} TOP/s in int8 ({t4.source})")
print("flash attention is served on this machine:", check_flash_attention_available())
dtype = torch.float32 if not gpus else torch.float16
print("dtype of the models below:", dtype)

# %% [markdown]
# ## What fits into 16 GB
#
# Estimates from sizes alone; `search_batch_size` measures with a model at hand.

# %%
for name, size, bits in (("1B, float16", 1.0, 16), ("3B, float16", 3.0, 16), ("7B, Q4", 7.0, 4)):
    batch = suggest_batch_size(size, bits, available_vram_gb=16.0)
    print(f"{name}: {batch} sequences of 2048 tokens")
print("longest context of 1B in float16:", get_optimal_context_length(1.0, 16.0), "tokens")

# %% [markdown]
# Where the memory goes for a model of Llama-3-8B's shape (32 layers, 8 heads of keys and values of
# 128) in 4 bits: weights stay, the cache grows with every token of every sequence.

# %%
weights_gb = 8.0 * 4.5 / 8  # 4-bit formats with their scales: about 4.5 bits a weight
tokens = [2048 * n for n in range(1, 49)]
cache_gb = [kv_cache_bytes(32, 8, 128, count, torch.float16) / 1e9 for count in tokens]

figure, axes = plt.subplots(figsize=(6, 3.2))
axes.stackplot(
    tokens,
    [weights_gb] * len(tokens),
    cache_gb,
    labels=["weights", "keys and values"],
    colors=["#0072B2", "#E69F00"],
)
axes.axhline(16, color="black", linestyle="--", label="a T4's 16 GB")
axes.set_xlim(tokens[0], tokens[-1])
axes.set_ylim(0, 26)
axes.set_xlabel("cached tokens, all sequences together")
axes.set_ylabel("memory (GB)")
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## A model on each GPU
#
# Two copies serve twice the requests, and nothing is shared between them. Each has a thread of its
# own; the GPUs work at the same time. The model is tiny and random, so that this runs anywhere: put
# `load_model(path, device=device, dtype=torch.float16)` in its place.

# %%
devices = (gpus if len(gpus) > 1 else gpus * 2) or [torch.device("cpu")] * 2
if len(gpus) < 2:
    print(f"{len(gpus)} GPUs: both models share {devices[0]}, one beside the other is skipped")


def replica(device):
    """A patched model on a device, with what generates from it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False).to(device, dtype)
    patch(model)
    return TokenGenerator(model)


def generate(generator, prompts):
    """The new tokens of each prompt."""
    rows = [SamplingParams(temperature=0.0)] * len(prompts)
    steps = list(generator.generate(prompts, rows, max_tokens=16))
    return [list(row) for row in zip(*steps, strict=True)]


replicas = [replica(device) for device in devices]
prompts = [[1 + i, 2 + i, 3 + i] for i in range(8)]
for generator in replicas:
    generate(generator, prompts[:4])  # the first call of each records or captures its step

# %%
start = time.perf_counter()
with ThreadPoolExecutor(len(replicas)) as threads:
    halves = list(threads.map(generate, replicas, [prompts[:4], prompts[4:]]))
seconds = time.perf_counter() - start

together = [row for half in halves for row in half]
print(f"{sum(map(len, together))} tokens of {len(prompts)} requests in {seconds:.2f} s")
if len(gpus) < 2:
    assert together == generate(replicas[0], prompts[:4]) + generate(replicas[0], prompts[4:])
    print("the same tokens as from one model alone")

# %% [markdown]
# ## When something is missing
#
# - `python -m llamatelemetry doctor` says which libraries were found, which kernels serve this GPU,
#   and whether the driver is older than the CUDA of the build.
# - NaN or "!!!!" from a float16 model are values beyond 65504: load it through
#   `optimize_for_tensor_cores`, which finds where they come from.
# - Out of memory: `kv_cache_bytes` says what the cache takes, `suggest_batch_size` what fits.
