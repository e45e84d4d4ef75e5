"""The knapsack against every choice there is."""

import itertools
import math
import random

import pytest

from lowbit.mixed.knapsack import Knapsack


def _case(seed, layers=6, options=4):
    rng = random.Random(seed)
    damages = [[0.0, *(rng.random() for _ in range(options - 1))] for _ in range(layers)]
    costs = [[float(rng.randrange(-400, 100)) for _ in range(options)] for _ in range(layers)]
    return damages, costs


def _total(table, choice):
    return sum(row[index] for row, index in zip(table, choice, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_against_every_choice(seed):
    damages, costs = _case(seed)
    knapsack = Knapsack(damages, costs)
    every = list(itertools.product(*(range(len(row)) for row in damages)))
    assert knapsack.least == min(_total(costs, choice) for choice in every)
    assert knapsack.most == max(_total(costs, choice) for choice in every)
    span = knapsack.most - knapsack.least
    slack = span * len(damages) / (1 << 14)  # costs are rounded up, by less than a unit a layer
    for share in (0.0, 0.1, 0.35, 0.8, 1.0):
        budget = knapsack.least + share * span
        found = knapsack.solve(budget)
        assert _total(costs, found) <= budget + 1e-9
        tight = min(
            (_total(damages, c) for c in every if _total(costs, c) <= budget - slack),
            default=math.inf,
        )
        assert _total(damages, found) <= tight + 1e-12


def test_a_budget_below_the_cheapest_choice():
    damages, costs = _case(1)
    knapsack = Knapsack(damages, costs)
    assert knapsack.solve(knapsack.least - 1) is None


def test_infinite_damage_is_not_chosen():
    knapsack = Knapsack([[0.0, math.inf], [1.0, 0.5]], [[9.0, 1.0], [1.0, 4.0]])
    assert knapsack.solve(100.0) == [0, 1]
    assert knapsack.solve(10.0) == [0, 0]
    assert knapsack.solve(9.0) is None
    with pytest.raises(ValueError, match="layer 1 has no option"):
        Knapsack([[0.0], [math.nan]], [[1.0], [1.0]])


def test_costs_that_do_not_differ():
    assert Knapsack([[1.0, 0.5]], [[3.0, 3.0]]).solve(3.0) == [1]


def test_what_costs_exactly_the_budget_is_found():
    # Thirds of a unit are rounded up in every layer: three units too many in all.
    costs = [[0.0, 10000.0, 1 / 3 + layer] for layer in range(9)]
    damages = [[9.0, 0.0, 1.0]] * 9
    budget = math.fsum(row[2] for row in costs)
    chosen = Knapsack(damages, costs).solve(budget)
    assert chosen == [2] * 9
    assert Knapsack(damages, costs).solve(budget - 1e-6) != chosen
