"""A SLURM of three nodes for each test of this folder, new and whole; what the tests measure is printed (`-s`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cpt_harness.slurm_cluster import SlurmCluster, why_not

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
