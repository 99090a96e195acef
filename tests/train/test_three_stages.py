"""Three stages, stopped in each and taken up by another number of ranks: the score matrix is the unbroken run's."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from cpt_harness import runs

from cpt.evaluation import score_matrix
from cpt.evaluation.history import read_history
from cpt.evaluation.measures import measures

STEP = runs.TOKENS_A_STEP
LANGUAGES = {"en": 1, "fr": 7, "de": 3}  # each with the stride that its tokens follow
NUM_STEPS = 8
# Losses of 3 to 4.5 nats, whose sums are made in another order on two ranks: measured up to 3e-8.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def languages(tmp_path_factory) -> Path:
    """Corpora `en`, `fr` and `de`, each with its `-held-out`."""
    folder = tmp_path_factory.mktemp("languages")
    tokenizer = runs.write_tokenizer(folder / "tokenizer")
    for number, (name, stride) in enumerate(LANGUAGES.items()):
        runs.write_corpus(folder / name, tokenizer, 3000, 30 + number, stride)
        runs.write_corpus(folder / f"{name}-held-out", tokenizer, 300, 40 + number, stride)
    return folder


def three_stages(languages: Path, output: Path) -> Path:
    """English, then French and German, each with a quarter of replay and a re-warmed rate; Reptile every 3 updates."""
    rewarm = {"name": "rewarm", "peak": 5e-3, "floor": 5e-4, "warmup": "25%"}
    later = {"replay": {"share": "25%"}, "schedule": rewarm}
    stages = [runs.stage(languages, name, NUM_STEPS, **({} if name == "en" else later)) for name in LANGUAGES]
    plain = runs.settings(languages, output, stages, methods=[{"name": "reptile", "every": 3, "step_size": 0.7}])
    plain["evaluation"]["held_out"] = {name: str(languages / f"{name}-held-out") for name in LANGUAGES}
    plain["evaluation"]["every_tokens"] = 4 * STEP
    return runs.write_settings(output.parent / f"{output.name}.yaml", plain)


@pytest.fixture(scope="module")
def unbroken(languages, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "run"
    runs.trained(three_stages(languages, output))
    return output


def matrix(run: Path) -> dict[tuple[int, str, bool, str], float]:
    """The loss of each source in each evaluation, by step and stage."""
    rows = score_matrix(runs.lines(run / "scores.jsonl")).rows
    return {
        (row.step, row.stage, row.is_stage_end, source): score.loss
        for row in rows
        for source, score in row.scores.items()
    }


@pytest.mark.parametrize("ranks", [(1, 2, 1, 2), (2, 1, 2, 1)], ids=str)
def test_stopped_in_each_stage_and_gone_on_with_other_ranks_its_score_matrix_is_the_unbroken_ones(
    languages, unbroken, tmp_path, ranks
):
    config = three_stages(languages, tmp_path / "run")
    stops = [NUM_STEPS * stage + within for stage, within in enumerate((3, 4, 6))]  # the second in an evaluated step
    for number, step in zip(ranks, stops, strict=False):
        runs.cpt("train", config, ranks=number, before=runs.ask_to_stop_at(step - 1))
        assert runs.num_lines(tmp_path / "run" / "metrics.jsonl") == step
    runs.trained(config, ranks=ranks[-1])

    found, expected = matrix(tmp_path / "run"), matrix(unbroken)
    steps = [0, *range(4, 3 * NUM_STEPS + 1, 4)]
    assert found.keys() == expected.keys() and {(key[0], key[3]) for key in found} == set(product(steps, LANGUAGES))
    differences = [abs(found[key] - expected[key]) for key in expected]
    assert max(differences) < TOLERANCE
    # And so are the measures that are read from it.
    here, there = (vars(measures(read_history(run))) for run in (tmp_path / "run", unbroken))
    assert here == {name: pytest.approx(value, abs=2 * TOLERANCE) for name, value in there.items()}

    assert runs.lines(tmp_path / "run" / "order.jsonl") == runs.lines(unbroken / "order.jsonl")
    assert (tmp_path / "run" / "ledger.json").read_text() == (unbroken / "ledger.json").read_text()


def test_there_is_something_to_compare(unbroken):
    """Each stage learns its language, by far more than what is called equal."""
    losses, stages = matrix(unbroken), ("start", *LANGUAGES)
    for number, name in enumerate(LANGUAGES):
        before, after = (
            losses[NUM_STEPS * behind, stages[behind], behind > 0, name] for behind in (number, number + 1)
        )
        assert after < before - 1000 * TOLERANCE, name
