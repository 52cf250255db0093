"""Measured memory grows by what is allocated."""

import pytest
import torch

from qlora_lite.memory import measure

CPU = torch.device("cpu")
SIZE = 200 * 2**20


def test_the_peak_includes_freed_memory_until_it_is_reset():
    measure.reset_peak(CPU)
    before = measure.peak_bytes(CPU)
    tensor = torch.ones(SIZE, dtype=torch.uint8)
    del tensor
    during = measure.peak_bytes(CPU)
    measure.reset_peak(CPU)
    assert during - before == pytest.approx(SIZE, rel=0.1)
    assert measure.peak_bytes(CPU) < during - SIZE / 2


def test_anonymous_memory_grows_by_what_is_written():
    before = measure.anonymous_bytes()
    tensor = torch.ones(SIZE, dtype=torch.uint8)
    assert measure.anonymous_bytes() - before == pytest.approx(tensor.nbytes, rel=0.1)


def test_available_memory_is_between_used_and_total():
    assert measure.anonymous_bytes() < measure.available_bytes(CPU) <= measure.total_bytes(CPU)


def test_the_limit_of_a_container_is_respected(monkeypatch, tmp_path):
    limit, used, cache = 3 * 2**30, 2 * 2**30, 2**29
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\nfile 7\n")
    monkeypatch.setattr(measure, "_CGROUP", tmp_path)
    assert measure.total_bytes(CPU) == limit
    free = limit - used + cache
    assert free < measure.available_bytes(CPU) < free + 4 * 2**30


def test_the_rate_of_matrix_products_is_plausible():
    rate = measure.matmul_flops_per_second(CPU, torch.float32, seconds=0.05)
    assert 1e8 < rate < 1e15


@pytest.mark.gpu
def test_on_cuda_the_peak_is_of_tensors():
    device = torch.device("cuda")
    measure.reset_peak(device)
    before = measure.peak_bytes(device)
    tensor = torch.ones(SIZE, dtype=torch.uint8, device=device)
    del tensor
    assert measure.peak_bytes(device) - before == SIZE
    assert measure.available_bytes(device) <= measure.total_bytes(device)
