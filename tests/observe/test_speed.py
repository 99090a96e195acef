"""Speed is told against a peak whose origin is told."""

from __future__ import annotations

import pytest
import torch

from cpt.observe.speed import as_duration, find_peak

GPU = torch.device("cuda")


def test_the_setting_counts_before_all_else():
    peak = find_peak(GPU, "bf16", 123.5)
    assert peak.flops == 123.5e12
    assert peak.origin == "123.5 TFLOP/s, set by log.peak_tflops"


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
    ],
)
def test_a_known_device_is_measured_against_what_its_maker_states(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = find_peak(GPU, "bf16")
    assert peak.flops == tflops * 1e12
    assert peak.origin == f"{tflops} TFLOP/s, stated for {name} (dense bf16)"


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA L40", "Tesla V100", "NVIDIA GB200"])
def test_a_device_of_a_similar_name_is_not_taken_for_a_known_one(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr("cpt.observe.speed._timed_matmul", lambda device, dtype: 5e12)
    assert find_peak(GPU, "bf16").origin == "5 TFLOP/s, measured by a bf16 matrix product on one rank"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_unknown_device_is_measured_here(precision):
    peak = find_peak(torch.device("cpu"), precision)
    assert 1e8 < peak.flops < 1e15
    assert f"measured by a {precision} matrix product on one rank" in peak.origin


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (-5, "0s"),
        (0, "0s"),
        (12.4, "12s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (3599.4, "59m59s"),
        (3600, "1h00m"),
        (7500, "2h05m"),
        (86399.7, "1d00h"),
        (93600, "1d02h"),
        (8640000, "100d00h"),
    ],
)
def test_a_duration_is_told_in_its_two_largest_units(seconds, told):
    assert as_duration(seconds) == told
