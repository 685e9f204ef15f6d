# %% [markdown]
# # KV cache and batching
#
# Keys and values of past tokens stay in a cache, which takes most of the memory that weights leave.
# In pages, sequences of any lengths share it without gaps, equal beginnings are stored once, and
# requests can come and go at every token.

# %%
import matplotlib.pyplot as plt
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llamatelemetry.inference import (
    ContinuousBatching,
    KVCache,
    KVCacheConfig,
    PagedKVCache,
    flash_attention_forward,
    kv_cache_bytes,
)
from llamatelemetry.ops import paged_attention

torch.set_grad_enabled(False)
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
print("device:", device)

# %% [markdown]
# ## What a cache takes
#
# `2 · layers · heads of keys · head_dim · tokens · bytes of a value`. Sharing each head of keys
# among several of queries divides it:

# %%
for name, heads in (("as many as query heads", 64), ("8, as the model has", 8)):
    size = kv_cache_bytes(80, heads, 128, 8192, torch.float16)
    print(f"Llama-2-70B, 8192 tokens, heads of keys and values {name}: {size / 1e9:.1f} GB")

# %% [markdown]
# ## A contiguous cache
#
# `KVCache` has room for `max_batch_size` sequences of `max_seq_length`, whether they use it or not.
# Each step writes its token in place; what comes back are views, so nothing is copied.

# %%
sizes = {"num_layers": 1, "num_heads": 2, "head_dim": 16, "dtype": torch.float32, "device": device}
cache = KVCache(KVCacheConfig(max_batch_size=1, max_seq_length=64, **sizes))
keys, values = torch.randn(2, 1, 10, 2, 16, device=device)
for i in range(10):
    k, v = cache.update(0, keys[:, i : i + 1], values[:, i : i + 1])
print("length:", cache.length(0), " same values:", torch.equal(k, keys) and torch.equal(v, values))
print("views of the cache:", k.data_ptr() == cache.keys.data_ptr())

# %% [markdown]
# ## Pages
#
# `PagedKVCache` gives each sequence blocks as it needs them. A column below is a block of the
# cache, a row a sequence; a block that several sequences hold is orange.


# %%
def draw(axes, cache, title):
    """Which blocks each sequence holds."""
    names = sorted(cache.blocks.sequences())
    tables = {name: cache.blocks.table(name) for name in names}
    for row, name in enumerate(names):
        for block in tables[name]:
            held = sum(block in table for table in tables.values())
            colour = "#E69F00" if held > 1 else "#0072B2"
            axes.add_patch(plt.Rectangle((block + 0.05, row + 0.1), 0.9, 0.8, color=colour))
            place = str(tables[name].index(block))
            ink = "black" if held > 1 else "white"
            axes.text(block + 0.5, row + 0.5, place, ha="center", va="center", color=ink)
    count = cache.blocks.num_blocks
    axes.set_xlim(0, count)
    axes.set_ylim(3, 0)
    axes.set_xticks([x + 0.5 for x in range(count)], range(count))
    axes.set_yticks([y + 0.5 for y in range(len(names))], names)
    axes.set_title(f"{title}: {cache.blocks.num_available} of {count} blocks free", fontsize=10)


paged = PagedKVCache(num_blocks=12, block_size=4, **sizes)
tokens = list(range(100, 110))
figure, axes = plt.subplots(4, 1, figsize=(7, 7))

paged.allocate("A", tokens)
keys, values = torch.randn(2, 10, 2, 16, device=device)
pages = paged.update(0, keys, values, paged.slot_mapping("A"))
paged.commit("A")  # keys and values are written: other sequences may share full blocks
draw(axes[0], paged, "A has 10 tokens in blocks of 4")

cached = paged.allocate("B", [*tokens[:8], 7, 8, 9])
draw(axes[1], paged, f"B begins with {cached} tokens of A")

paged.fork("A", "C")
draw(axes[2], paged, "C is a fork of A")

paged.append("C", [11])
draw(axes[3], paged, "C goes on: the block it writes into is copied first")
axes[3].set_xlabel("block of the cache (the number in it: its place in the sequence)")
figure.tight_layout()
plt.show()
paged.check()  # walks every invariant, and raises where one does not hold

# %% [markdown]
# Attention reads the pages through the block table, and gives what it gives over contiguous keys.

# %%
query = torch.randn(1, 2, 16, device=device)
lengths, starts = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([10], [0, 1]))
table = paged.block_table(["A"])
out, _ = paged_attention(query, *pages, table, lengths, starts, max_seqlen_q=1)
contiguous = flash_attention_forward(query[None], keys[None], values[None])[0]
print("blocks of A:", table.tolist()[0])
print(f"largest difference: {(out - contiguous).abs().max().item():.1e}")
assert torch.allclose(out, contiguous, atol=1e-5)

# %% [markdown]
# A cache that is full says so with the numbers, and stays as it was:

# %%
try:
    paged.append("B", 100)
except RuntimeError as error:
    print(error)
paged.check()
print("B still has", paged.length("B"), "tokens")

# %% [markdown]
# ## Continuous batching
#
# `ContinuousBatching` runs many requests over one paged cache. Each step draws a token for every
# request at work; one that ends makes room for the next at once. The model is tiny and random, and
# prompts are token ids; with an `InferenceEngine` they are texts.

# %%
config = LlamaConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
model = LlamaForCausalLM(config).eval().requires_grad_(False).to(device)
batcher = ContinuousBatching(max_batch_size=4, engine=model)

wanted = [24, 6, 15, 9, 18, 5, 12, 10]  # new tokens of each request
handles = [batcher.submit([1 + i, 2 + i, 3 + i], max_tokens=n) for i, n in enumerate(wanted)]
worked = []  # for each step, the requests that got a token
while batcher.active_requests:
    worked.append({handles.index(handle) for handle in batcher.step() if handle in handles})

one_by_one = sum(wanted)
in_fours = sum(max(wanted[i : i + 4]) for i in range(0, len(wanted), 4))
print(f"{sum(wanted)} tokens in {len(worked)} steps")
print(f"one request at a time: {one_by_one} steps; in batches of 4 that wait for all: {in_fours}")

# %%
figure, axes = plt.subplots(figsize=(7, 3.2))
for request in range(len(handles)):
    steps = [step for step, at_work in enumerate(worked) if request in at_work]
    axes.barh(request, steps[0], color="#DDDDDD")
    axes.barh(request, len(steps), left=steps[0], color="#0072B2")
axes.barh(0, 0, color="#DDDDDD", label="waits")
axes.barh(0, 0, color="#0072B2", label="at work: a token a step")
axes.set_yticks(range(len(handles)))
axes.invert_yaxis()
axes.set_xlabel("step")
axes.set_ylabel("request")
axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
plt.show()

# %% [markdown]
# Each request gets the tokens that it gets alone (but for near-ties, which the rounding of another
# shape may decide):

# %%
alone = []
for i, n in enumerate(wanted):
    handle = batcher.submit([1 + i, 2 + i, 3 + i], max_tokens=n)
    alone.append(handle.result().token_ids)
same = sum(handle.result().token_ids == ids for handle, ids in zip(handles, alone, strict=True))
print(f"{same} of {len(wanted)} requests have the same tokens")

# %% [markdown]
# ## Shared prefixes
#
# Requests that begin alike, as with one system prompt, compute their common blocks of 64 tokens
# once. A handle's `stats` say how many tokens were found in the cache, and the times.

# %%
system_prompt = [3 + i % 500 for i in range(200)]
for question in ([7, 8, 9], [4, 5], [6]):
    handle = batcher.submit(system_prompt + question, max_tokens=4)
    handle.result()
    found = handle.stats
    print(
        f"{len(system_prompt) + len(question)} prompt tokens, {found.cached_tokens} in the cache, "
        f"first token after {found.ttft * 1e3:.0f} ms"
    )

# %% [markdown]
# ## Cancelling
#
# A request can be taken back at any time; the others go on, and its blocks are free again.

# %%
long = batcher.submit([1, 2, 3], max_tokens=200)
short = batcher.submit([4, 5, 6], max_tokens=8)
for _ in range(3):
    batcher.step()
long.cancel()
print("the other ends as it would:", len(short.result().token_ids), "tokens")
print("cancelled:", long.cancelled(), "after", len(long.token_ids), "tokens")
print("open requests:", batcher.active_requests)
