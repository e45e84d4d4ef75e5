"""One option per layer: the least damage that a cost allows.

A multiple-choice knapsack (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, chapter 11)
by dynamic programming over the cost. As in HAWQ-V2 (Dong et al., 2020) the damages of layers are
taken to add up and every layer's options are known; where Lagrangian relaxation (Shoham and Gersho,
"Efficient Bit Allocation for an Arbitrary Set of Quantizers", 1988) finds the convex hull of the
choices, this finds those between as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_UNITS = 1 << 14
_MOST_UNITS = 1 << 16


class Knapsack:
    """All layers' options; what depends on no budget is computed once.

    Costs are rounded up to units, of which the whole range has 16,384 or 64 per layer: a choice
    never costs more than it was allowed to, and may miss options that cost less than a unit a layer
    less than that.

    Args:
        damages: for each layer the damage of each option; an infinite one is not chosen.
        costs: for each layer the cost of each option; only differences within a layer matter.

    Raises:
        ValueError: a layer without an option of finite damage.
    """

    def __init__(
        self, damages: Sequence[Sequence[float]], costs: Sequence[Sequence[float]]
    ) -> None:
        self._options: list[list[tuple[int, float, float]]] = []  # index, damage, cost
        for index, (row, prices) in enumerate(zip(damages, costs, strict=True)):
            rows = [
                (option, damage, cost)
                for option, (damage, cost) in enumerate(zip(row, prices, strict=True))
                if math.isfinite(damage)
            ]
            if not rows:
                raise ValueError(f"layer {index} has no option of finite damage")
            self._options.append(rows)
        self.least = math.fsum(min(o[2] for o in rows) for rows in self._options)
        """Cost of the cheapest choice."""
        self.most = math.fsum(max(o[2] for o in rows) for rows in self._options)
        """Cost of the dearest choice."""
        units = min(_MOST_UNITS, max(_UNITS, 64 * len(self._options)))
        self._unit = (self.most - self.least) / units or 1.0
        self._solve(units)

    def _solve(self, units: int) -> None:
        """best[j]: least damage of the layers so far with at most j units above the least cost."""
        best = np.zeros(units + 1)
        self._choice = np.zeros((len(self._options), units + 1), dtype=np.int16)
        self._prices: list[list[int]] = []
        for index, rows in enumerate(self._options):
            floor = min(cost for _, _, cost in rows)
            prices = [math.ceil((cost - floor) / self._unit * (1 - 1e-12)) for _, _, cost in rows]
            self._prices.append(prices)
            found = np.full(units + 1, np.inf)
            for place, ((_, damage, _), price) in enumerate(zip(rows, prices, strict=True)):
                if price > units:
                    continue
                total = np.full(units + 1, np.inf)
                total[price:] = best[: units + 1 - price] + damage
                better = total < found
                found[better] = total[better]
                self._choice[index, better] = place
            best = found

    def solve(self, budget: float) -> list[int] | None:
        """The options, one index per layer, of the least damage with a cost of at most `budget`.

        Returns:
            None if no choice costs so little.
        """
        room = (budget - self.least) / self._unit
        if room < -1e-9:
            return None
        left = max(0, math.floor(room * (1 + 1e-12)))
        # Costs were rounded up, by up to a unit each: what that hides is looked for first.
        slack = len(self._options)
        while slack:
            chosen, cost = self._walk(left + slack)
            if cost <= budget:
                return chosen
            slack //= 2
        return self._walk(left)[0]

    def _walk(self, left: int) -> tuple[list[int], float]:
        """The options of the least damage with at most so many units, and what they cost."""
        left = min(left, self._choice.shape[1] - 1)
        chosen, costs = [0] * len(self._options), []
        for index in range(len(self._options) - 1, -1, -1):
            place = int(self._choice[index, left])
            chosen[index], _, cost = self._options[index][place]
            costs.append(cost)
            left -= self._prices[index][place]
        return chosen, math.fsum(costs)
