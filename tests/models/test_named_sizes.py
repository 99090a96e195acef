"""configs/models: every named size is a model that can be read, and has as many weights as was published."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt.config import read_mapping
from cpt.run import read_run

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs/models"
RUN = """
output: runs/sized
stages: [{name: a, tokens: 1M, sources: {a: {corpus: a}}, schedule: {name: constant, peak: 1e-3}}]
"""
# Weights without the two embeddings, from the suite's own table; those of 14M and 31M follow from their totals.
PYTHIA = {
    "pythia-14m": 1_189_888, "pythia-31m": 4_739_072, "pythia-70m": 18_915_328, "pythia-160m": 85_056_000,
    "pythia-410m": 302_311_424, "pythia-1b": 805_736_448, "pythia-1.4b": 1_208_602_624,
    "pythia-2.8b": 2_517_652_480, "pythia-6.9b": 6_444_163_072, "pythia-12b": 11_327_027_200,
}  # fmt: skip
# All weights, a tied embedding once, as the released files hold them.
LLAMA = {
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
}  # fmt: skip
# Matrices of the blocks, counted by hand from layers, width and feed-forward width; and both embeddings in millions.
REPLAY = {
    "replay-99m": (16 * (4 * 512**2 + 2 * 512 * 1280), 131),
    "replay-560m": (24 * (4 * 1024**2 + 2 * 1024 * 2560), 263),
    "replay-1b": (24 * (4 * 1792**2 + 2 * 1792 * 5120), 460),
    "replay-6b": (30 * (4 * 3072**2 + 2 * 3072 * 9216), 788),
}


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """What a user adds to a size: where the output goes and what is trained."""
    file = tmp_path_factory.mktemp("own") / "my.yaml"
    file.write_text(RUN)
    return file


def model_of(size: str, own: Path):
    return read_run([str(FOLDER / f"{size}.yaml"), str(own)]).model


def test_every_file_has_its_count_here():
    assert {path.stem for path in FOLDER.iterdir()} == {*PYTHIA, *LLAMA, *REPLAY}


@pytest.mark.parametrize("size", PYTHIA)
def test_a_pythia_has_the_published_number_of_weights_beside_its_embeddings(size, own):
    model = model_of(size, own)
    assert model.num_parameters - 2 * model.vocabulary * model.width == PYTHIA[size]


@pytest.mark.parametrize("size", LLAMA)
def test_a_llama_has_the_published_number_of_weights(size, own):
    assert model_of(size, own).num_parameters == LLAMA[size]


@pytest.mark.parametrize("size", REPLAY)
def test_a_model_of_the_replay_study_has_the_weights_of_its_shape(size, own):
    model = model_of(size, own)
    embedding, num_norms = model.vocabulary * model.width, 2 * model.layers + 1
    blocks = model.num_parameters - 2 * embedding - num_norms * model.width
    assert (blocks, round(2 * embedding / 1e6)) == REPLAY[size]


@pytest.mark.parametrize("size", [*PYTHIA, *LLAMA, *REPLAY])
def test_a_size_says_nothing_but_the_model(size):
    assert list(read_mapping([str(FOLDER / f"{size}.yaml")])) == ["model"]
    assert (FOLDER / f"{size}.yaml").read_text(encoding="utf-8").startswith("# ")
