"""What is kept of the environment explains a run, and holds no secret."""

from __future__ import annotations

import pytest

from cpt_launcher.environment import keep_environment, told_of


@pytest.mark.parametrize(
    "name",
    ["SLURM_JWT", "TORCH_API_KEY", "NCCL_AUTH", "CUDA_CREDENTIALS", "PYTHON_SECRET", "DS_PASSWORD", "OMP_TOKEN",
     "pytorch_token", "SLURM_session", "MKL_PASSPHRASE"],
)  # fmt: skip
def test_a_name_that_looks_like_a_secrets_has_no_value(name):
    assert "hidden" not in "\n".join(told_of({name: "hidden", name.upper(): "hidden"}))


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "DATABASE_URL", "HOME", "PATH"])
def test_what_does_not_steer_a_run_is_not_told_at_all(name):
    assert told_of({name: "hidden"}) == []


def test_what_steers_a_run_is_told_in_order_and_a_value_stays_on_its_line():
    kept = {"SLURM_JOB_ID": "7", "NCCL_DEBUG": "WARN", "CUDA_VISIBLE_DEVICES": "0,1", "TORCH_LOGS": "a\nSLURM_JOB_ID=8"}
    assert told_of(kept) == ["CUDA_VISIBLE_DEVICES=0,1", "NCCL_DEBUG=WARN", "SLURM_JOB_ID=7",
                             "TORCH_LOGS='a\\nSLURM_JOB_ID=8'"]  # fmt: skip


def test_the_file_is_for_its_owner_alone(tmp_path):
    keep_environment({"NCCL_DEBUG": "WARN"}, tmp_path / "logs" / "environment.txt")
    assert (tmp_path / "logs" / "environment.txt").stat().st_mode & 0o777 == 0o600
