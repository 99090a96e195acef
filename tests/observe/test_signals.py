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
