"""Rotary positions that reach further: what each scaling does to the frequencies, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from cpt.models import llama
from cpt.models.rope_scaling import angles, dynamic, linear, llama3, yarn
from cpt_kernels import rotary

CPU = torch.device("cpu")
PLAIN = rotary.frequencies(64, 10000.0, CPU)


def scaled(settings, positions: int = 100) -> torch.Tensor:
    return settings.scaled(64, 10000.0, positions, CPU)[0]


def test_linear_counts_every_position_as_a_part_of_it():
    four_times = angles(linear.Settings(4.0), 64, 10000.0, 41, CPU)
    assert (four_times[:, ::4] - angles(None, 64, 10000.0, 11, CPU)).abs().max() < 1e-6


def test_dynamic_leaves_sequences_of_the_original_length_as_they_were():
    settings = dynamic.Settings(factor=2.0, original_length=100)
    assert torch.equal(scaled(settings, 3), PLAIN)
    assert torch.equal(scaled(settings, 100), PLAIN)
    # Twice the length, factor 2: the base grows by (2 x 2 - 1) to the power 64/62, so the slowest pair by 3.
    assert (scaled(settings, 200)[-1] / PLAIN[-1]).item() == pytest.approx(3 ** (-64 / 62 * 62 / 64), rel=1e-5)


def test_dynamic_of_a_single_pair_is_as_it_was():
    assert dynamic.Settings(2.0, 4).scaled(2, 10000.0, 9, CPU)[0].tolist() == [1.0]


def test_llama3_keeps_fast_pairs_and_slows_slow_ones():
    turns = 1000 * PLAIN / (2 * math.pi)
    ratio = scaled(llama3.Settings(8.0, 1000)) / PLAIN
    assert (ratio[turns > 4] == 1).all() and (turns > 4).sum() > 5
    assert torch.allclose(ratio[turns < 1], torch.tensor(1 / 8)) and (turns < 1).sum() > 5
    between = ratio[(turns > 1) & (turns < 4)]
    assert ((between > 1 / 8) & (between < 1)).all() and len(between) > 3


def test_yarn_keeps_fast_pairs_slows_slow_ones_and_sharpens_attention():
    frequencies, amplitude = yarn.Settings(4.0, 1000).scaled(64, 10000.0, 9, CPU)
    assert torch.equal(frequencies[:5], PLAIN[:5]) and torch.allclose(frequencies[-5:], PLAIN[-5:] / 4)
    assert amplitude == pytest.approx(1 + math.log(4) / 10)
    cosines, sines = angles(yarn.Settings(4.0, 1000), 64, 10000.0, 9, CPU)
    assert torch.allclose(cosines**2 + sines**2, torch.tensor(amplitude**2))


@pytest.mark.parametrize(("settings", "lines"), [
    (linear.Settings(0.5), ["factor = 0.5: a reach grows by at least 1"]),
    (dynamic.Settings(2.0, 0), ["original_length = 0: must be more than 0"]),
    (llama3.Settings(0.0, -1, 0.0, 0.0),
     ["factor = 0.0: a reach grows by at least 1", "original_length = -1: must be more than 0",
      "low_frequency_factor = 0.0: must be more than 0",
      "high_frequency_factor = 0.0: must be more than low_frequency_factor = 0.0"]),
    (yarn.Settings(2.0, 9, fast_turns=1.0, slow_turns=2.0, amplitude=0.0),
     ["amplitude = 0.0: must be more than 0", "fast_turns = 1.0: must not be less than slow_turns = 2.0"]),
    (llama3.Settings(8.0, 8192), []),
])  # fmt: skip
def test_contradictions_are_told(settings, lines):
    assert settings.faults() == lines


def test_a_scaling_is_chosen_by_its_name_and_its_faults_say_where():
    from cpt.config import Fault, read_settings

    told = {"vocabulary": 9, "rope_scaling": {"name": "llama3", "factor": 8, "original_length": "8192"}}
    assert read_settings(llama.Settings, told).rope_scaling == llama3.Settings(8.0, 8192, 1.0, 4.0)
    with pytest.raises(Fault, match=r"model\.rope_scaling\.factor = 0\.5: a reach grows"):
        read_settings(llama.Settings, {"vocabulary": 9, "rope_scaling": {"name": "linear", "factor": 0.5}}, "model")
    with pytest.raises(Fault, match=r"model\.rope_scaling\.name = ntk: there is no such choice"):
        read_settings(llama.Settings, {"vocabulary": 9, "rope_scaling": {"name": "ntk"}}, "model")
