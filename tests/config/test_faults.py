"""A fault is told in lines; whether it may pass decides how a command that meets it ends."""

from __future__ import annotations

import argparse

import pytest

from cpt.cli import _told
from cpt.config import Fault


@pytest.mark.parametrize(("is_passing", "status"), [(False, 2), (True, 1)])
def test_a_fault_that_may_pass_ends_a_command_with_status_1_and_any_other_with_2(capsys, is_passing, status):
    def fail(arguments):
        raise Fault(["one", "two"], is_passing=is_passing)

    assert _told("train", fail, argparse.Namespace()) == status
    assert capsys.readouterr().err == "cpt train: one\ncpt train: two\n"
