"""`cpt train` with a batch that grows: the windows in their order, the stage at its end, and a resume in the middle."""

from __future__ import annotations

from cpt_harness import runs

from cpt.cli import main


def test_a_run_whose_batch_grows_reads_each_window_once_and_goes_on_anywhere(data, tmp_path):
    warmup = {"windows": 2, "tokens": 12 * runs.LENGTH, "increment": 2}
    stages = [
        runs.stage(data, "prose", 5, batch_warmup=warmup),
        runs.stage(data, "code", 3, replay={"share": 0.25}),
    ]
    plain = runs.settings(data, tmp_path / "run", stages, batch={"windows": 8, "micro_batch": 1})
    config = runs.write_settings(tmp_path / "run.yaml", plain)
    runs.trained(config)
    metrics = runs.lines(tmp_path / "run" / "metrics.jsonl")
    tokens = [record["tokens"] // runs.LENGTH for record in metrics]
    # Three stretches of four windows: two steps of 2, one of 4, one of 6 that goes past 12; at least 40 in the stage.
    assert [b - a for a, b in zip([0, *tokens], tokens, strict=False)] == [2, 2, 4, 6, 8, 8, 8, 8] + [8, 8, 8]
    folder = tmp_path / "left"
    runs.cpt("train", config, f"output={folder}", ranks=2, before=runs.ask_to_stop_at(4))
    runs.trained(config, f"output={folder}", "zero=3")
    assert main(["verify-order", str(folder), str(tmp_path / "run")]) == 0
    found, expected = runs.story(folder), runs.story(tmp_path / "run")
    assert found["ledger"] == expected["ledger"]
    for one, other in zip(found["metrics"], expected["metrics"], strict=True):
        assert abs(one["loss"] - other["loss"]) < 1e-5 and one["tokens"] == other["tokens"]
