"""The fastest way that a noise budget allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from test_observer import noise_of

from wtacrs_passes.decide import ways
from wtacrs_passes.decide.ways import decide, rules
from wtacrs_passes.policy import Policy, Rule
from wtacrs_passes.rates import DRAWING, ROUNDING


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds of a row by precision; a draw takes as much as 100 exact rows."""
    known = {"exact": 1.0, "bfloat16": 0.6, "int8": 0.4, DRAWING: 0.1, ROUNDING: 0.2}

    def seconds(precisions: Sequence[str], rows: int, *_: Any) -> dict[str, float]:
        return {precision: known[precision] * rows for precision in precisions}

    monkeypatch.setattr(ways, "seconds", seconds)
    return known


def way_of(policy: Policy, **fields: object) -> tuple[float, bool]:
    [way] = decide([noise_of(**fields)], policy)
    return way.ratio, way.rounds


def test_the_fastest_way_within_the_budget_is_taken() -> None:
    assert way_of(Policy(noise=1.0)) == (0.1, True)
    assert way_of(Policy(noise=0.2)) == (0.2, True)
    assert way_of(Policy(noise=0.05)) == (0.5, True)  # 0.3 would need all of it: too near for a measurement
    assert way_of(Policy(noise=0.01)) == (1.0, True)
    assert way_of(Policy(noise=0.0005)) == (1.0, False)


def test_drawn_rows_are_rounded_where_that_was_measured_to_be_little() -> None:
    assert way_of(Policy(noise=0.2), rounded_drawn=(9.0,) * 5) == (0.2, False)
    assert way_of(Policy(noise=0.2), rounded_drawn=(9.0, 9.0, 0.001, 0.001, 0.001)) == (0.3, True)


def test_the_minibatch_is_the_measure() -> None:
    assert way_of(Policy(), minibatch=4.0) == (0.2, True)
    assert way_of(Policy(), minibatch=0.01) == (1.0, False)
    assert way_of(Policy(), minibatch=0.0) == (1.0, False)  # of whole data sets nothing may be lost


def test_rows_are_not_drawn_where_that_is_slower(rates: dict[str, float]) -> None:
    rates[DRAWING] = 0.35
    assert way_of(Policy(noise=1.0)) == (1.0, True)


def test_what_several_products_read_is_rounded_once(rates: dict[str, float]) -> None:
    rates["int8"] = 0.6
    one, three = (
        decide([noise_of(outputs=outputs, added=(9.0,) * 5)], Policy())[0] for outputs in ((8,), (8, 8, 8))
    )
    assert (one.ratio, three.ratio) == (1.0, 1.0) and one.rounds and three.rounds
    assert ways._seconds(three) / ways._seconds(one) == pytest.approx((3 * 0.4 + 0.2) / 0.6)


def test_rounding_what_was_drawn_counts_for_more() -> None:
    assert way_of(Policy(noise=1.0), rounded=0.02) == (0.1, True)  # 0.5, and ten times that of all rows
    assert way_of(Policy(noise=1.0), rounded=0.04) == (0.2, True)


def test_what_is_not_rounded_adds_nothing(rates: dict[str, float]) -> None:
    rates["int8"] = 0.95  # of the exact time: not worth it
    assert way_of(Policy(noise=1.0), rounded=0.04) == (0.1, True)
    [way] = decide([noise_of(minibatch=2.0)], Policy(noise=0.05))
    assert way.share == 0.025
    assert way_of(Policy(noise=0.0005)) == (1.0, True)  # no rule, and nothing to compile again
    [asked], [chosen] = (decide([noise_of()], Policy(product=product)) for product in ("int8", None))
    assert asked.share > chosen.share


def test_a_precision_that_was_asked_for_stays() -> None:
    assert way_of(Policy(noise=0.05, product="exact")) == (0.5, False)
    assert way_of(Policy(noise=0.0001, product="int8")) == (1.0, True)  # the least that it adds


def test_a_way_is_kept_until_it_is_well_outside_or_much_slower() -> None:
    policy = Policy(noise=0.05, decided=(Rule("a", ratio=0.3, product="auto"),))
    assert way_of(policy) == (0.3, True)  # 0.051 + rounding, of 0.0625
    assert way_of(policy, minibatch=0.7) == (0.5, True)
    slow = Policy(noise=0.05, decided=(Rule("a", ratio=0.7, product="exact"),))
    assert way_of(slow) == (0.5, True)


def test_ways_become_rules() -> None:
    policy = Policy(decided=(Rule("other", ratio=0.1), Rule("a", ratio=0.1)))
    found = decide([noise_of(modules=("q", "k[0]")), noise_of(minibatch=0.001)], policy)
    assert set(rules(found, policy)) == {
        Rule("other", ratio=0.1),  # of another graph
        Rule("q", ratio=0.5, product="auto"),
        Rule("k[[]0]", ratio=0.5, product="auto"),
        Rule("a", ratio=1.0, product="exact"),
    }
    assert rules(decide([noise_of(added=(9.0,) * 5)], Policy()), Policy()) == ()  # as it is


def test_a_module_that_is_called_twice_takes_the_more_careful_way() -> None:
    found = decide([noise_of(), noise_of(minibatch=0.3)], Policy())
    assert [way.ratio for way in found] == [0.5, 1.0]
    assert rules(found, Policy()) == ()


def test_modules_without_a_budget_are_left_alone() -> None:
    policy = Policy(rules=(Rule("a", ratio=0.2),))
    assert decide([noise_of(), noise_of(modules=("b", "a"))], policy) == []


def test_the_report_says_what_the_way_rests_on() -> None:
    [way] = decide([noise_of(minibatch=2.0)], Policy(noise=0.05))
    report = way.report()
    assert report.drawn == (0.25, 0.05, 0.025, 0.01, 0.005)
    assert (report.rounded, report.budget, report.ratio, report.product) == (0.0005, 0.05, 0.3, "auto")
    assert report.added == pytest.approx(0.025 + 0.0005 / 0.3)
