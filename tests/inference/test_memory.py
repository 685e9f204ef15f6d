"""Memory: attention's grows with the length alone, and generating leaves none behind."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from engines import make_engine
from torch.profiler import ProfilerActivity, profile

from llamatelemetry.inference import enable_flash_attention, flash_attention_forward
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.profiling import check_memory

HEADS, HEAD_DIM = 2, 64


def peak_bytes(call, device):
    """The most bytes at once of what call allocates."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    return max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_memory_is_linear_in_the_length(causal, device):
    """To 8 Ki tokens here, to 128 Ki on a GPU; twice its output, and there parts of few tiles."""
    on_cpu = device.type == "cpu"
    parts = 0 if on_cpu else 2**24  # float32, of a tile a multiprocessor: no matter how long
    dtype = torch.float32 if on_cpu else torch.float16
    for length in (1024, 8192) if on_cpu else (1024, 8192, 131072):
        q, k, v = torch.randn(3, 1, length, HEADS, HEAD_DIM, device=device, dtype=dtype)
        flash_attention_forward(q, k, v, causal)
        peak = peak_bytes(lambda qkv=(q, k, v): flash_attention_forward(*qkv, causal), device)
        assert q.nbytes <= peak <= 2 * q.nbytes + 2**20 + parts


def test_attention_memory_of_a_module_is_linear(device):
    with torch.inference_mode(False):
        layer = torch.nn.MultiheadAttention(128, 2, batch_first=True, device=device).eval()
    enable_flash_attention(layer)
    peaks = []
    for length in (1024, 4096):
        x = torch.randn(1, length, 128, device=device)
        peaks.append(peak_bytes(lambda x=x: layer(x, x, x, need_weights=False), device))
    assert peaks[1] <= 4.5 * peaks[0]


CAPPED = """
import resource, torch
from llamatelemetry.inference import flash_attention_forward
from llamatelemetry.profiling import check_memory
torch.set_num_threads(1)
q, k, v = torch.randn(3, 1, 8192, 8, 64)
flash_attention_forward(q[:, :64], k, v)
with open("/proc/self/statm") as file:
    mapped = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (256 << 20),) * 2)
try:
    torch.softmax(q.transpose(1, 2) @ k.transpose(1, 2).mT, -1)
except RuntimeError as error:
    print("scores:", "memory" in str(error))
print("ours:", flash_attention_forward(q, k, v).isfinite().all().item())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_context_fits_where_its_scores_do_not():
    """8 Ki tokens of 8 heads within 256 MiB; their scores take 2 GiB."""
    done = subprocess.run(
        [sys.executable, "-c", CAPPED], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["scores:", "True", "ours:", "True"]


@pytest.mark.gpu
def test_a_context_fits_where_its_scores_do_not_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    q, k, v = torch.randn(3, 1, 8192, 8, 64, device=device, dtype=torch.float16)
    flash_attention_forward(q, k, v)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    room = torch.cuda.memory_reserved(device) + (256 << 20)
    torch.cuda.set_per_process_memory_fraction(room / total, device)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.softmax(q.transpose(1, 2) @ k.transpose(1, 2).mT, -1)
        assert flash_attention_forward(q, k, v).isfinite().all()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def test_a_thousand_generations_leave_memory_as_it_was(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)

    def generate(count):
        for i in range(count):
            prompt = [5, 9, 2, 1 + i % 7]
            assert len(list(engine.generator.generate([prompt], [GREEDY], 2))) == 2

    def allocated():
        by_device = {memory.device.partition(":")[0]: memory for memory in check_memory()}
        return by_device[device.type].allocated

    generate(200)
    before = allocated()
    generate(1000)
    if device.type == "cuda":
        assert allocated() == before
    else:
        assert allocated() - before < 4 << 20
