"""`cpt bench reptile` makes the outer step for real and says what it adds to a step."""

from __future__ import annotations

import json

from cpt_harness.ranks import in_processes

from cpt import cli


def test_the_outer_step_is_measured_beside_a_step(tmp_path):
    words = ["--parameters", "100K", "--length", "16", "--every", "50", "--repetitions", "3"]
    file = tmp_path / "x.json"

    def measured() -> int:  # in a process of its own, because it meets itself over gloo
        return cli.main(["bench", "reptile", *words, "--json", str(file)])

    assert in_processes([measured]) == [0]
    told = json.loads(file.read_text())
    assert told["num_parameters"] >= 100_000
    assert told["step"]["median"] > 0 and told["outer"]["median"] > 0
    parts = told["outer"]["largest"] / 50 + told["counting"]["largest"]
    assert 0 < told["added"]["median"] <= parts / told["step"]["smallest"] + 1e-12


def test_nothing_to_measure_is_refused(capsys):
    words = ["--parameters", "0", "--length", "1", "--every", "0", "--repetitions", "0"]
    assert cli.main(["bench", "reptile", *words]) == 2
    told = capsys.readouterr().err
    for line in ("parameters = 0: at least 1", "length = 1: at least 2", "every = 0: at least 1", "repetitions = 0: "):
        assert line in told
