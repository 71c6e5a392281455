"""Options of ``torch.compile``: which are the policy's, and which Inductor's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch._inductor.config

from wtacrs_passes.policy import Policy, PolicyError, nearest

DEFAULTS = {"allow_buffer_reuse": False}
"""Configuration of Inductor that this backend chooses otherwise, unless an option says it.

Inductor keeps memory for the next buffer of the same size where its estimate of the peak allows that. The estimate
counts what a loop passes on to another that it is fused with, which takes no memory: so the largest buffers of a layer
would stay until the next layer. Allocators keep freed memory anyway.
"""


def policy_from_options(options: Mapping[str, Any]) -> tuple[Policy, dict[str, Any]]:
    """Split ``torch.compile`` options into a policy and the options that belong to Inductor.

    Keys that start with ``wtacrs.`` are policy fields (``wtacrs.policy`` is a whole one, which
    further fields then override); every other key is returned unchanged.

    Raises:
        PolicyError: an unknown field, or a value outside its range.
    """
    fields = {k.removeprefix("wtacrs."): v for k, v in options.items() if k.startswith("wtacrs.")}
    rest = {k: v for k, v in options.items() if not k.startswith("wtacrs.")}
    base = fields.pop("policy", Policy())
    if not isinstance(base, Policy):
        raise PolicyError(f"option 'wtacrs.policy' must be a wtacrs_fx.Policy, got {base!r}")
    valid = [field.name for field in dataclasses.fields(Policy)]
    for name in fields:
        if name not in valid:
            known = [f"wtacrs.{field}" for field in ("policy", *valid)]
            raise PolicyError(
                f"option 'wtacrs.{name}' is not a policy field{nearest(f'wtacrs.{name}', known)} "
                f"(known: {', '.join(known)})"
            )
    return dataclasses.replace(base, **fields), rest


def inductor_config(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of Inductor that a mode of ``torch.compile`` and options ask for, and `DEFAULTS`.

    Args:
        mode: such as ``"max-autotune"``; None is the default.
        options: override what the mode and `DEFAULTS` set.

    Raises:
        PolicyError: an unknown mode, an option that Inductor does not know, or one that the backend sets itself.
    """
    known = torch._inductor.config.get_config_copy()
    if mode and mode != "default":
        modes = list(torch._inductor.list_mode_options())
        if mode not in modes:
            raise PolicyError(f"mode must be one of {', '.join(modes)}, got {mode!r}{nearest(mode, modes)}")
        options = {**torch._inductor.list_mode_options(mode), **options}
    config = {name.replace("-", "_"): value for name, value in options.items()}
    for name in config:
        if name == "custom_partitioner_fn":
            raise PolicyError("option 'custom_partitioner_fn' is set by the wtacrs backend; leave it out")
        if name not in known:
            fields = [f"wtacrs.{field.name}" for field in dataclasses.fields(Policy)]
            raise PolicyError(
                f"option {name!r} is unknown to Inductor{nearest(name, [*known, *fields])}; "
                f"Policy fields are written 'wtacrs.<field>'"
            )
    return {**DEFAULTS, **config}
