"""Order of calls, budget and statistics on an injected clock: no test measures time."""

import gc
import os
import statistics
import sys

import pytest

from lowbit import timing
from lowbit.timing import Timing, alternate, memory_use, ratio, reset_peak, resident_memory


class _Clock:
    """A clock that only the sides' calls move forward."""

    def __init__(self):
        self.now = 100.0
        self.calls = []

    def __call__(self):
        return self.now

    def side(self, name, *durations):
        """A callable that takes the given seconds, the last of them for ever."""
        left = list(durations)

        def call():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_sides_alternate_after_first_call_and_warmup():
    clock = _Clock()
    sides = {"a": clock.side("a", 9, 5, 5, 1), "b": clock.side("b", 7, 2)}
    found = alternate(sides, min_rounds=3, budget_seconds=0, warmup=2, clock=clock)
    assert clock.calls == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 3
    assert found == {"a": Timing(9, (1, 1, 1)), "b": Timing(7, (2, 2, 2))}
    assert list(found) == ["a", "b"]


@pytest.mark.parametrize(
    ("min_rounds", "max_rounds", "budget", "rounds"),
    [(2, 1000, 10, 4), (6, 1000, 10, 6), (1, 3, 10, 3), (1, 1000, 0, 1)],
)
def test_rounds_fill_the_budget(min_rounds, max_rounds, budget, rounds):
    clock = _Clock()
    found = alternate(
        {"a": clock.side("a", 1), "b": clock.side("b", 2)},
        min_rounds=min_rounds,
        max_rounds=max_rounds,
        budget_seconds=budget,
        clock=clock,
    )
    assert [t.rounds for t in found.values()] == [rounds, rounds]


def test_several_calls_per_round_are_averaged():
    clock = _Clock()
    side = clock.side("a", 50, 1, 2, 6, 3)
    found = alternate(
        {"a": side}, min_rounds=2, budget_seconds=0, warmup=0, calls_per_round=3, clock=clock
    )
    assert found["a"] == Timing(50, (3, 3))
    assert len(clock.calls) == 1 + 2 * 3


def test_progress_rises_to_one():
    clock, shares = _Clock(), []
    alternate(
        {"a": clock.side("a", 1)},
        min_rounds=2,
        budget_seconds=8,
        clock=clock,
        progress=shares.append,
    )
    assert shares == sorted(shares)
    assert len(shares) == 8
    assert shares[-1] == 1.0
    assert shares[0] < 0.5


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collector_is_off_inside_rounds_and_restored(enabled):
    seen = []
    was = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        sides = {"a": lambda: seen.append(gc.isenabled())}
        alternate(sides, min_rounds=4, budget_seconds=0, warmup=0)
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if was else gc.disable()
    assert seen[1:] == [False] * 4


def test_a_failing_side_raises_and_leaves_the_collector_on():
    calls = iter([None, None, None])

    def side():
        next(calls)

    assert gc.isenabled()
    with pytest.raises(StopIteration):
        alternate({"a": side}, min_rounds=9, budget_seconds=0, warmup=1)
    assert gc.isenabled()


@pytest.mark.parametrize(
    "arguments",
    [
        {"sides": {}},
        {"min_rounds": 0},
        {"max_rounds": 1, "min_rounds": 2},
        {"calls_per_round": 0},
        {"warmup": -1},
    ],
)
def test_impossible_arguments_are_refused(arguments):
    sides = arguments.pop("sides", {"a": lambda: None})
    with pytest.raises(ValueError, match=r"nothing to time|need 1 <="):
        alternate(sides, **arguments)


def test_statistics():
    seconds = [0.5, 0.1, 0.4, 0.2, 0.3]
    found = Timing(9.0, tuple(seconds))
    assert found.mean == pytest.approx(statistics.mean(seconds))
    assert found.std == pytest.approx(statistics.stdev(seconds))
    assert found.p50 == pytest.approx(0.3)
    assert found.p95 == pytest.approx(0.4 + 0.8 * 0.1)  # between the 4th and the 5th
    assert found.to_dict()["first_seconds"] == 9.0
    assert found.to_dict()["rounds"] == 5
    assert Timing(1.0, (2.0,)).std == 0.0


def test_ratio_is_taken_round_by_round():
    # Not the ratio of the medians, 3 over 2.
    a, b = Timing(0, (1, 2, 3, 8, 5)), Timing(0, (2, 4, 1, 2, 2))
    found = ratio(a, b)
    assert found.median == pytest.approx(2.5)
    assert (found.p25, found.p75) == pytest.approx((0.5, 3.0))
    assert (found.p10, found.p90) == pytest.approx((0.5, 3.6))
    assert str(found) == "2.50 (0.50-3.60)"
    assert found.to_dict()["rounds"] == 5
    assert ratio(a, a).median == 1.0


@pytest.mark.parametrize("seconds", [(1.0,), (), (1.0, 0.0)])
def test_ratio_refuses_what_was_not_timed_together(seconds):
    with pytest.raises(ValueError, match=r"rounds|no measurable time"):
        ratio(Timing(0, (1.0, 2.0)), Timing(0, seconds))


def test_status_file_is_read_in_bytes(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t     512 kB\n")
    found = resident_memory(status)
    assert (found.current, found.peak) == (512 * 1024, 2048 * 1024)


def test_without_a_status_file_getrusage_gives_the_peak(tmp_path):
    resource = pytest.importorskip("resource")
    found = resident_memory(tmp_path / "absent")
    assert found.current is None
    unit = 1 if sys.platform == "darwin" else 1024
    assert 0 < found.peak <= unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_reset_that_is_not_permitted_is_reported(tmp_path, monkeypatch):
    refused = tmp_path / "absent" / "clear_refs"
    assert not reset_peak(refused)
    monkeypatch.setattr(timing, "reset_peak", lambda: False)
    calls = []
    assert memory_use(lambda: calls.append(1)) is None
    assert calls == []


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no clear_refs here")
def test_memory_use_sees_what_a_call_touches():
    size = 64 << 20
    nothing = memory_use(lambda: None)
    assert nothing is not None
    touched = memory_use(lambda: bytearray(b"x") * size)
    assert nothing.growth < size // 4
    assert size * 0.9 < touched.growth < size * 1.5
    assert touched.peak >= touched.growth
