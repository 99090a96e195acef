"""Being asked to stop is noted; a second Ctrl-C stops at once; afterwards signals mean what they meant."""

from __future__ import annotations

import os
import signal

import pytest

from cpt.observe.signals import listening_for_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_nothing_else_happens(number):
    with listening_for_stop() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == number


def test_the_first_signal_is_the_one_that_counts():
    with listening_for_stop() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGUSR1


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), listening_for_stop():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once_after_another_signal_too():
    with listening_for_stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_afterwards_signals_mean_what_they_meant_before():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(RuntimeError), listening_for_stop():
        assert [signal.getsignal(number) for number in numbers] != before
        raise RuntimeError
    assert [signal.getsignal(number) for number in numbers] == before


def test_an_orphan_is_asked_to_stop_as_by_sigterm_and_told_why(caplog):
    reasons = iter([None, "the launcher (process 7, torchrun) is gone"])
    with caplog.at_level("WARNING"), listening_for_stop(lambda: next(reasons)) as stop:
        assert not stop.is_asked() and stop.signal is None
        assert stop.is_asked() and stop.signal == signal.SIGTERM
        assert stop.is_asked()  # and nobody is asked any more
    (line,) = caplog.messages
    assert line.startswith("the launcher (process 7, torchrun) is gone: this run saves after its next step and ends")


def test_a_signal_that_came_before_is_the_one_that_counts():
    with listening_for_stop(lambda: "the launcher is gone") as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.is_asked() and stop.signal == signal.SIGUSR1


@pytest.mark.parametrize("is_signal_first", [False, True])
def test_whether_it_was_a_file_that_asked_is_known(tmp_path, is_signal_first):
    with listening_for_stop(lambda: "the launcher is gone", tmp_path / "stop") as stop:
        if is_signal_first:
            os.kill(os.getpid(), signal.SIGUSR1)
        (tmp_path / "stop").touch()
        assert stop.is_asked() and stop.is_by_file is not is_signal_first


def test_a_stop_file_from_before_is_removed_and_not_heeded_which_is_told(caplog, tmp_path):
    (tmp_path / "stop").touch()
    with caplog.at_level("WARNING"), listening_for_stop(file=tmp_path / "stop") as stop:
        assert not stop.is_asked()
        assert not (tmp_path / "stop").exists()
    assert "was there before this run listened: removed, and not heeded" in caplog.text
    caplog.clear()
    with listening_for_stop(file=tmp_path / "stop") as stop:
        assert not stop.is_asked()
    assert caplog.text == ""
