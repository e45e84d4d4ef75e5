"""Which converted choice is returned, and what is said of it."""

import math
from types import SimpleNamespace

import pytest

from lowbit.mixed.choices import Choices, Options
from lowbit.mixed.finals import Final, Finals
from lowbit.mixed.layers import Conversion
from lowbit.mixed.measure import Losses, Steps, split


def test_every_third_batch_is_held_back():
    assert split(1) == ((0,), (0,))
    assert split(2) == ((0,), (1,))
    assert split(3) == ((0, 2), (1,))
    assert split(6) == ((0, 2, 3, 5), (1, 4))


def _final(*damage, uniform=""):
    return Final((len(damage),), uniform, 100, Losses(None, damage))


@pytest.fixture
def finals():
    measurer = SimpleNamespace(looked=(0, 2), held=(1, 3))
    return Finals(None, measurer, Conversion(), ["w4a8"], Steps(None, 1))


def test_a_mix_that_is_better_on_both_parts_is_returned(finals):
    uniform = _final(3.0, 3.0, 3.0, 3.0, uniform="w4a8")
    better, best = _final(2.0, 2.0, 2.0, 2.0), _final(1.0, 3.0, 1.0, 3.0)
    assert finals.pick([better, best], [uniform]) is best


def test_a_mix_that_is_not_confirmed_gives_way(finals):
    uniform = _final(3.0, 3.0, 3.0, 3.0, uniform="w4a8")
    lucky, other = _final(1.0, 3.1, 1.0, 3.0), _final(2.0, 2.5, 2.0, 3.0)
    assert finals.pick([lucky, other], [uniform]) is other
    assert finals.pick([lucky], [uniform]) is uniform
    assert finals.pick([lucky, other], []) is lucky, "there is nothing to give way to"


def test_a_mix_has_to_beat_every_uniform_scheme(finals):
    one, two = _final(9.0, 2.0, 9.0, 2.0, uniform="a"), _final(3.0, 3.0, 3.0, 3.0, uniform="b")
    mix = _final(1.0, 2.5, 1.0, 2.5)
    assert finals.pick([mix], [two]) is mix
    assert finals.pick([mix], [one, two]) is two, "the least on all batches"


def test_what_is_said_of_it(finals):
    uniform, mix = _final(3.0, 3.0, 3.0, 5.0, uniform="w4a8"), _final(1.0, 2.0, 1.0, 2.0)
    said = finals.confirm(mix.losses, [uniform])
    assert (said.uniform, said.batches, said.damage, said.uniform_damage) == ("w4a8", 2, 2.0, 4.0)
    assert (said.excess, said.standard_error) == (-2.0, pytest.approx(1.0))
    alone = finals.confirm(mix.losses, [])
    assert alone.uniform is None
    assert math.isnan(alone.excess)


def test_batches_without_the_figure_are_left_out():
    losses = Losses(None, (None, 2.0, 4.0, None))
    assert losses.mean([0, 1]) == 2.0
    assert losses.mean([0, 3]) == 3.0
    assert Losses(None, (None,)).mean([0]) == math.inf
    excess, error = losses.excess(Losses(None, (1.0, 1.0, 1.0, 1.0)), [0, 1])
    assert excess == 1.0
    assert math.isnan(error)


def test_exchanges_that_gain_most_come_first():
    # Base: all "m". Widening `a` gains most; it is paid for by `b`, which loses least.
    damages = {"a": (0.0, 10.0, 30.0), "b": (0.0, 0.1, 0.2), "c": (0.0, 1.0, 1.6)}
    options = [
        Options(name, ["w", "m", "n"], list(row), [8.0, 4.0, 2.0], [0.0] * 3)
        for name, row in damages.items()
    ]
    choices = Choices(SimpleNamespace(), options, "bytes", SimpleNamespace())
    ways = choices.exchanges((1, 1, 1), 12.5)
    assert ways == [(1, 2, 1), (0, 2, 2)], "one that costs less, then the exchange"
    assert [choices.cost(way) for way in ways] == [10.0, 12.0]
    # With more room `c` keeps its bits.
    assert choices.exchanges((1, 1, 1), 14.5)[-1] == (0, 2, 1)
    assert (0, 2, 1) not in choices.exchanges((0, 2, 1), 14.5)
    assert choices.exchanges((2, 2, 2), 14.5) == [(0, 2, 2), (0, 2, 1)]
