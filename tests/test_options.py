from __future__ import annotations

import pytest

from wtacrs_fx.options import DEFAULTS, inductor_config, policy_from_options
from wtacrs_passes.policy import Policy, PolicyError


def test_options_are_split() -> None:
    policy, rest = policy_from_options({"wtacrs.ratio": 0.1, "wtacrs.estimator": "crs", "max_autotune": True})
    assert policy == Policy(ratio=0.1, estimator="crs")
    assert rest == {"max_autotune": True}
    base = Policy(center=True)
    assert policy_from_options({"wtacrs.policy": base, "wtacrs.ratio": 0.5})[0] == Policy(
        ratio=0.5, center=True
    )


def test_bad_options() -> None:
    with pytest.raises(PolicyError, match="did you mean 'wtacrs.ratio'"):
        policy_from_options({"wtacrs.ration": 0.1})
    with pytest.raises(PolicyError, match="must be a wtacrs_fx.Policy"):
        policy_from_options({"wtacrs.policy": 0.3})


def test_options_override_what_the_mode_sets() -> None:
    assert inductor_config(None, {"max-autotune": True}) == {**DEFAULTS, "max_autotune": True}
    assert inductor_config(None, {"allow_buffer_reuse": True})["allow_buffer_reuse"]
    assert inductor_config("reduce-overhead", {})["triton.cudagraphs"]
    assert not inductor_config("reduce-overhead", {"triton.cudagraphs": False})["triton.cudagraphs"]
