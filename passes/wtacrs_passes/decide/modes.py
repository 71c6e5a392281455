"""What the values of ``Policy.residuals`` allow."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..policy import Policy


@dataclasses.dataclass(frozen=True)
class Mode:
    """What a value of ``Policy.residuals`` allows.

    Attributes:
        integers: for residuals in general.
        sources: for residuals of which the backward pass reads a nonlinear function.
        checkpoints: for what a checkpointed region computes everything from again, which enlarges an error.
        table_bits: for coefficients that are a bounded function of one tensor.
        masks: booleans are packed, and what can be derived from something stored is.
        attends_twice: attention is computed again from rounded operands, wherever that is possible, and its output not
            stored: fewer bytes, more time.
    """

    integers: Literal["exact", "int8", "int6", "int4"] = "exact"
    sources: Literal["exact", "int8", "int6", "int4"] = "exact"
    table_bits: int = 0
    checkpoints: Literal["int8", "int6"] = "int8"
    masks: bool = True
    attends_twice: bool = True

    @property
    def lossy(self) -> bool:
        """Whether more than booleans are encoded."""
        return self.integers != "exact"


MODES = {
    "exact": Mode(masks=False),
    "lossless": Mode(),
    "fine": Mode("int8", "int8", 4, attends_twice=False),
    "balanced": Mode("int6", "int6", 3, attends_twice=False),
    "small": Mode("int4", "int4", 2, "int6"),
}


def modes(policy: Policy) -> tuple[Mode, ...]:
    """Return the modes that a policy names, for all modules or for some."""
    names = (policy.residuals, *(dict(rule.overrides).get("residuals", "exact") for rule in policy.rules))
    return tuple(MODES[name] for name in names)
