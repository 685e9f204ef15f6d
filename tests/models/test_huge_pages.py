"""Weights on the CPU in huge pages: which of them, where the kernel has any, and nothing else."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from families import tiny_model
from torch.utils.dlpack import from_dlpack

from llamatelemetry.models import huge_pages
from llamatelemetry.models.huge_pages import use_huge_pages
from llamatelemetry.models.patching import patch, unpatch

SIZE = 2 << 20  # of a huge page where the tests say so
HUGEPAGE, COLLAPSE = 14, 25  # of madvise


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Writes what the kernel says of huge pages."""
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")

    def write(enabled):
        (tmp_path / "enabled").write_text(enabled)
        (tmp_path / "hpage_pmd_size").write_text(f"{SIZE}\n")

    write("always [madvise] never\n")
    return write


@pytest.fixture
def asked(monkeypatch):
    """(first page, advice) of each call of madvise; none of them is carried out."""
    calls = []
    monkeypatch.setattr(
        huge_pages, "_madvise", lambda begin, _, advice: calls.append((begin // SIZE, advice)) or 0
    )
    return calls


def aligned(pages, offset=0):
    """A storage of so many huge pages, from offset bytes behind the beginning of one."""
    memory = torch.empty(SIZE * (pages + 2), dtype=torch.uint8)
    begin = -memory.data_ptr() % SIZE + offset
    return storages(memory[begin : begin + pages * SIZE])[0]


def storages(*views):
    """The views as tensors whose storages are no larger than they are."""
    return [from_dlpack(view) for view in views]


def test_pages_that_a_tensor_fills_are_asked_for_at_once(settings, asked):
    x = aligned(3)
    first = x.data_ptr() // SIZE
    assert use_huge_pages([x, x, x[5:]]) == 3 * SIZE
    assert asked == [(first + i, COLLAPSE) for i in range(3)]


def test_a_page_that_is_mostly_other_memory_is_left_alone(settings, asked):
    x = aligned(2, offset=SIZE - SIZE // 4)  # a quarter of the first page, three of the last
    assert use_huge_pages([x]) == 2 * SIZE
    assert [page - x.data_ptr() // SIZE for page, _ in asked] == [1, 2]


def test_small_tensors_share_a_page(settings, asked):
    parts = storages(*aligned(1).split(SIZE // 8))
    assert use_huge_pages(parts[:3]) == 0
    assert use_huge_pages(parts[2:]) == SIZE
    assert len(asked) == 1


def test_memory_counts_once_and_where_it_is(settings, asked):
    x = aligned(1)
    quarter = storages(x[: SIZE // 4], x[: SIZE // 4], x[1 : SIZE // 4])
    assert use_huge_pages(quarter) == 0
    assert use_huge_pages([torch.zeros(1).expand(2 * SIZE)]) == 0
    assert asked == []
    wide = aligned(4).view(-1, 1024)
    assert use_huge_pages([wide[:, :512]]) == 4 * SIZE
    assert use_huge_pages([wide[:, ::2].t(), wide[5:]]) == 4 * SIZE


def test_an_older_kernel_is_asked_to_do_it_later(settings, monkeypatch):
    advice = []
    monkeypatch.setattr(
        huge_pages, "_madvise", lambda *call: advice.append(call[2]) or -(call[2] == COLLAPSE)
    )
    assert use_huge_pages([aligned(1)]) == 0
    assert advice == [COLLAPSE, HUGEPAGE]


def test_nothing_is_asked_for_where_nobody_wants_it(settings, asked, monkeypatch, tmp_path):
    settings("always madvise [never]\n")
    assert use_huge_pages([aligned(1)]) == 0
    settings("[always] madvise never\n")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert use_huge_pages([aligned(1)]) == 0
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path / "none")
    assert use_huge_pages([aligned(1)]) == 0
    assert asked == []


def test_tensors_without_memory_of_the_cpu_are_left_out(settings, asked):
    assert use_huge_pages([torch.empty(SIZE, device="meta"), torch.empty(0)]) == 0
    assert asked == []


def huge_bytes(begin, end):
    """Of the mappings that meet an address range, as the kernel counts them."""
    count, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) < end and int(bounds[2], 16) > begin
        elif inside and line.startswith("AnonHugePages:"):
            count += int(line.split()[1]) << 10
    return count


@pytest.mark.skipif(sys.platform != "linux", reason="pages of Linux")
def test_the_kernel_puts_them_at_the_same_addresses():
    x = torch.randint(256, (64 << 20,), dtype=torch.uint8)
    begin, before = x.data_ptr(), x.clone()
    if (moved := use_huge_pages([x])) == 0:
        pytest.skip("this kernel has no huge pages at once")
    assert x.data_ptr() == begin
    assert torch.equal(x, before)
    assert huge_bytes(begin, begin + x.nbytes) >= moved  # some may not be free


def test_patch_asks_for_the_merged_weights(monkeypatch):
    model, given = tiny_model("llama"), []
    monkeypatch.setattr(
        "llamatelemetry.models.whole.use_huge_pages",
        lambda tensors: given.append([x.data_ptr() for x in tensors]),
    )
    patch(model)
    weights = [*model.parameters(), *model.buffers()]
    assert given == [[x.data_ptr() for x in weights]]
    gate, up = (model.model.layers[0].mlp.get_submodule(f"{name}_proj") for name in ("gate", "up"))
    assert up.weight.data_ptr() == gate.weight.data_ptr() + gate.weight.nbytes
    unpatch(model)
    patch(model)
    assert len(given) == 2
