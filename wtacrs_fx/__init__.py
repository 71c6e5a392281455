"""Train transformers with sampled weight gradients: ``torch.compile(model, backend="wtacrs")``."""

from wtacrs_passes.partition import PartitionError
from wtacrs_passes.pipeline import NoTangentsError
from wtacrs_passes.policy import Policy, PolicyError, Rule
from wtacrs_passes.report import Report, SiteReport

from .backend import Backend, PatternWarning, backend, reports
from .capture import capture, explain, transform

__all__ = [
    "Backend",
    "NoTangentsError",
    "PartitionError",
    "PatternWarning",
    "Policy",
    "PolicyError",
    "Report",
    "Rule",
    "SiteReport",
    "backend",
    "capture",
    "explain",
    "reports",
    "transform",
]
