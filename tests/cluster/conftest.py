"""A SLURM of three nodes for each test of this folder, new and whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cpt_harness import runs
from cpt_harness.slurm_cluster import SlurmCluster, why_not
from cpt_harness.slurm_runs import write_slow_settings

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = None
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            lacking = lacking or why_not() or "nothing"
            if lacking != "nothing":
                item.add_marker(pytest.mark.skip(reason=lacking))


@pytest.fixture
def cluster(tmp_path) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def config(data, tmp_path) -> Path:
    """A run for two ranks that is there for as long as a test likes; its folder is `tmp_path`/run."""
    return write_slow_settings(data, tmp_path)


@pytest.fixture(scope="session")
def undisturbed(data, tmp_path_factory) -> Path:
    """The folder of the same run after two ranks went from its beginning to its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runs.trained(write_slow_settings(data, folder), ranks=2)
    return folder / "run"
