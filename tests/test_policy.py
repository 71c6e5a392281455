from __future__ import annotations

import pickle

import pytest

from wtacrs_passes.policy import Policy, PolicyError, Rule, Sampling


def test_defaults_are_those_of_the_documentation() -> None:
    assert Policy() == Policy(
        ratio=None,
        noise=0.05,
        min_rows=32,
        estimator="wta-systematic",
        placement="auto",
        residuals="balanced",
        rounding="nearest",
        center=False,
        product=None,
        product_dx=None,
        include=("*",),
        exclude=(),
        rules=(),
        decided=(),
    )


def test_policy_is_a_value() -> None:
    policy = Policy(ratio=0.1, include=["a.*"], rules=[Rule("b", ratio=1.0)])  # type: ignore[arg-type]
    assert policy.include == ("a.*",)
    assert hash(policy) == hash(pickle.loads(pickle.dumps(policy)))
    assert eval(repr(policy)) == policy
    with pytest.raises(AttributeError):
        policy.ratio = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, float("nan"), float("inf"), "0.3", True])
def test_ratio_out_of_range(ratio: object) -> None:
    with pytest.raises(PolicyError, match=r"ratio must be .*\(0, 1\]"):
        Policy(ratio=ratio)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"estimator": "wta_crs"}, "did you mean 'wta-crs'"),
        ({"placement": "backwards"}, "did you mean 'backward'"),
        ({"residuals": "int8"}, "residuals must be one of exact"),
        ({"min_rows": 0}, "min_rows must be a whole number"),
        ({"center": 1}, "center must be True or False"),
        ({"include": "layers.*"}, "must be a tuple of module patterns"),
        ({"exclude": ("",)}, "non-empty fnmatch patterns"),
        ({"noise": 0}, "noise must be a number above 0.*use ratio=1.0 for none"),
        ({"noise": True}, "noise must be a number above 0"),
        ({"product": "int7"}, "did you mean 'int8'"),
        ({"product_dx": "int7"}, "product_dx must be one of"),
        ({"estimator": "crs"}, "a noise budget is kept with estimator='wta-systematic' alone.*give a ratio"),
        ({"placement": "forward"}, "a noise budget is kept with placement='backward' alone.*give a ratio"),
        ({"ratio": 0.3, "rules": (Rule("a", ratio=None, estimator="crs"),)}, "a noise budget is kept"),
        ({"decided": ("a",)}, "decided must be a tuple of Rule"),
        ({"rules": (("a", 1),)}, "must be a tuple of Rule"),
        ({"rules": Rule("a")}, "must be a tuple of Rule"),
    ],
)
def test_bad_field(fields: dict, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Policy(**fields)


def test_bad_rule() -> None:
    with pytest.raises(PolicyError, match="did you mean 'ratio'"):
        Rule("a", ration=0.1)
    with pytest.raises(PolicyError, match="ratio must be in"):
        Rule("a", ratio=2.0)


def test_first_matching_rule_wins_and_exclude_wins_over_include() -> None:
    policy = Policy(
        ratio=0.3, exclude=("head",), rules=(Rule("layers.0.*", ratio=0.1), Rule("layers.*", estimator="crs"))
    )
    first, second = policy.sampling("layers.0.q"), policy.sampling("layers.1.q")
    assert first is not None and (first.ratio, first.estimator) == (0.1, "wta-systematic")
    assert second is not None and (second.ratio, second.estimator) == (0.3, "crs")
    assert policy.sampling("head") is None
    assert Policy(include=("layers.*",)).sampling("embed") is None


def test_unmatched_patterns_are_named() -> None:
    policy = Policy(exclude=("heda",), rules=(Rule("layers.*", ratio=0.1),))
    assert policy.unmatched(["head", "layers.0.q"]) == ("heda",)


@pytest.mark.parametrize(("rows", "kept"), [(10, 10), (32, 32), (100, 32), (1000, 300), (1001, 301)])
def test_kept_rows(rows: int, kept: int) -> None:
    assert Sampling(ratio=0.3).kept(rows) == kept


def test_ratio_is_the_decimal_that_was_written() -> None:
    assert Sampling(ratio=0.1, min_rows=1).kept(10) == 1  # ceil(0.1 * 10) in binary floats may be 2
    assert Sampling(ratio=0.7, min_rows=1).kept(10) == 7


def test_a_budget_takes_all_rows_until_it_has_led_to_something() -> None:
    policy = Policy(
        rules=(Rule("b", ratio=0.1),), decided=(Rule("c", ratio=0.5, product="exact"), Rule("b", ratio=0.7))
    )
    fields = {module: policy.sampling(module) for module in "abc"}
    assert {module: (s.ratio, s.product, s.placement) for module, s in fields.items() if s is not None} == {
        "a": (1.0, "auto", "backward"),
        "b": (0.1, "exact", "auto"),  # a ratio that was given wins
        "c": (0.5, "exact", "backward"),
    }
    assert [policy.has_budget(module) for module in "abc"] == [True, False, True]
    assert policy.has_budgets and policy.rounds("product") and not policy.rounds("product_dx")
    assert not Policy(ratio=0.3).has_budgets and not Policy(ratio=0.3).rounds("product")


def test_a_precision_that_was_given_is_not_decided() -> None:
    policy = Policy(product="int8", decided=(Rule("*", ratio=0.5, product="exact"),))
    found = policy.sampling("a")
    assert found is not None and (found.ratio, found.product) == (0.5, "int8")


def test_what_cannot_be_measured_has_all_rows() -> None:
    policy = Policy(
        rules=(Rule("a", ratio=0.1), Rule("b", min_rows=4)), decided=(Rule("c", ratio=0.5),)
    ).unmeasured()
    fields = [policy.sampling(module) for module in "abc"]
    assert [(s.ratio, s.product) for s in fields if s is not None] == [
        (0.1, "exact"),
        (1.0, "auto"),
        (1.0, "auto"),
    ]
    assert not policy.has_budgets
    given = Policy(ratio=0.3, product="int8", rules=(Rule("a", ratio=None),))
    assert not given.unmeasured().has_budgets and given.unmeasured().ratio == 0.3
