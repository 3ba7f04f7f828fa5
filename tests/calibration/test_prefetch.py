"""Reading ahead: in order, what fails there fails here, and a consumer may leave."""

import threading
import time

import pytest

from lfq_lightning.calibration.prefetch import prefetch


def test_in_order_and_ahead():
    made = []

    def make():
        for number in range(5):
            made.append(number)
            yield number

    reader = prefetch(make())
    assert next(reader) == 0
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) >= 3  # made while the first one was worked on
    assert list(reader) == [1, 2, 3, 4]


def test_errors_arrive():
    def make():
        yield 1
        raise OSError("the disk is gone")

    reader = prefetch(make())
    assert next(reader) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(reader)


def test_a_consumer_may_leave():
    before = threading.active_count()
    reader = prefetch(iter(range(1000)))
    assert next(reader) == 0
    reader.close()
    assert threading.active_count() == before
