# %% [markdown]
# # Flash attention
#
# Attention without the matrix of scores: the same result, memory that grows with the length and not
# with its square. As a function, in a whole model, in any module, and measured over length.

# %%
import itertools
import math
import time

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from llamatelemetry.inference import (
    FlashAttentionConfig,
    check_flash_attention_available,
    disable_flash_attention,
    enable_flash_attention,
    flash_attention_forward,
    get_optimal_context_length,
)

torch.manual_seed(0)
torch.set_grad_enabled(False)
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"device: {device}; an implementation serves it: {check_flash_attention_available()}")

# %% [markdown]
# ## As a function
#
# Tensors are `[batch, seqlen, heads, head_dim]`. Written out, attention first makes all scores, one
# for each pair of a query and a key, then their softmax, then the sums of values.


# %%
def written_out(query, key, value):
    """Causal attention, scores and all."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2)


def random_qkv(length):
    return [torch.randn(1, length, 4, 64, device=device) for _ in range(3)]


q, k, v = random_qkv(512)
difference = (flash_attention_forward(q, k, v) - written_out(q, k, v)).abs().max().item()
print(f"largest difference: {difference:.1e}")
assert difference < 1e-4

# %% [markdown]
# Keys and values may have fewer heads than queries (GQA), there may be more keys than queries (a
# cache), and a window limits how far back a query sees.

# %%
few = k[:, :, :1], v[:, :, :1]  # one head of keys and values for all four of the queries
shared = flash_attention_forward(q, *few)
repeated = flash_attention_forward(q, *(x.expand(-1, -1, 4, -1) for x in few))
print("GQA equals repeated heads:", torch.allclose(shared, repeated, atol=1e-5))

last = flash_attention_forward(q[:, -1:], k, v)  # one query at the end of 512 keys
whole = flash_attention_forward(q, k, v)[:, -1:]
print("the last query alone gives the same:", torch.allclose(last, whole, atol=1e-5))

near = flash_attention_forward(q, k, v, window_size=(63, 0))  # its own key and 63 before it
same = torch.allclose(near[:, :64], written_out(q, k, v)[:, :64], atol=1e-4)
print("the first 64 queries see all keys before them still:", same)

# %% [markdown]
# ## In a model
#
# `enable_flash_attention` chooses our attention in a transformers model; weights and outputs stay.
# This Llama is tiny and random.

# %%
config = LlamaConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config).eval().to(device)
ids = torch.randint(1000, (2, 128), device=device)

before = model(ids).logits
enable_flash_attention(model)
during = model(ids).logits
print("attention now:", model.config._attn_implementation)
print(f"largest difference of logits: {(during - before).abs().max().item():.1e}")
assert torch.allclose(during, before, atol=1e-4)

disable_flash_attention(model)
print("attention after undoing it:", model.config._attn_implementation)
assert torch.equal(model(ids).logits, before)

# %% [markdown]
# Any module that calls torch's attention works too. The configuration can change what is computed:
# here every query sees its own key and the 15 before it.

# %%
layer = nn.MultiheadAttention(256, 4, batch_first=True).eval().to(device)
x = torch.randn(1, 64, 256, device=device)
plain, _ = layer(x, x, x, need_weights=False)
enable_flash_attention(layer)
ours, _ = layer(x, x, x, need_weights=False)
print(f"nn.MultiheadAttention: largest difference {(ours - plain).abs().max().item():.1e}")

enable_flash_attention(layer, FlashAttentionConfig(window_size=(15, 0)))
windowed, _ = layer(x, x, x, need_weights=False)
disable_flash_attention(layer)
print("a window changes the result:", not torch.allclose(windowed, plain, atol=1e-3))

# %% [markdown]
# ## Memory and time over length
#
# Memory is the most that torch's allocator held at once for what the call made. Time is that of
# the fastest call of some, divided by that of flash attention at 256 tokens: how it grows says more
# than the milliseconds of one machine. The written-out version stops at 4,096 tokens, where its
# scores are large already.


# %%
def peak_bytes(call):
    """The most bytes at once of what call allocates."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    return max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))


def seconds(call, calls):
    """The fastest of some calls."""
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


lengths = [256, 512, 1024, 2048, 4096, 8192]
measured = {"written out": {}, "flash attention": {}}
for length in lengths:
    q, k, v = random_qkv(length)
    for name, attention in (
        ("written out", written_out),
        ("flash attention", flash_attention_forward),
    ):
        if name == "flash attention" or length <= 4096:
            call = lambda attention=attention, q=q, k=k, v=v: attention(q, k, v)  # noqa: E731
            measured[name][length] = peak_bytes(call), seconds(call, max(2, 16384 // length))

unit = measured["flash attention"][256][1]
for name, found in measured.items():
    for length, (held, taken) in found.items():
        print(f"{name:>15} {length:6} tokens: {held / 2**20:7.1f} MiB, time {taken / unit:8.1f}")

# %%
figure, (memory, times) = plt.subplots(1, 2, figsize=(9, 3.4))
styles = {"written out": ("#D55E00", "s"), "flash attention": ("#0072B2", "o")}
for name, found in measured.items():
    colour, marker = styles[name]
    held, taken = zip(*found.values(), strict=True)
    memory.plot(list(found), [b / 2**20 for b in held], color=colour, marker=marker, label=name)
    times.plot(list(found), [s / unit for s in taken], color=colour, marker=marker, label=name)
for axes, label in ((memory, "peak memory (MiB)"), (times, "time (flash attention at 256 = 1)")):
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
memory.legend()
where = "the GPU" if device == "cuda" else f"the CPU, {torch.get_num_threads()} thread(s)"
figure.suptitle(f"causal attention, 4 heads of 64, float32, on {where}")
figure.tight_layout()
plt.show()

# %% [markdown]
# From 256 to 4,096 tokens the length grows 16 times. Flash attention's memory grows as much, that
# of the scores with the square, 256 times:

# %%
for name, found in measured.items():
    print(f"{name}: {found[4096][0] / found[256][0]:.0f} times")
assert measured["flash attention"][4096][0] < 20 * measured["flash attention"][256][0]

# %% [markdown]
# ## How long a context fits
#
# `get_optimal_context_length` estimates it from the model's size and the memory, without a model.

# %%
for size in (1.0, 3.0, 7.0):
    with_flash, without = (get_optimal_context_length(size, 16.0, flash) for flash in (True, False))
    print(f"{size:.0f}B in float16 on 16 GB: {with_flash} tokens, {without} without")
