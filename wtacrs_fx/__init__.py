"""Train transformers with sampled weight gradients: ``torch.compile(model, backend="wtacrs")``."""

from importlib.metadata import PackageNotFoundError, version

from wtacrs_passes.maths.offload import OffloadError
from wtacrs_passes.partition import PartitionError
from wtacrs_passes.pipeline import NoTangentsError
from wtacrs_passes.policy import Policy, PolicyError, Rule
from wtacrs_passes.report import Report, SiteReport

from .backend import Backend, FallbackWarning, PatternWarning, backend, reports
from .capture import capture, explain, transform
from .diagnose import Diagnosis, DiagnosisError, diagnose
from .gradient_norms import GradientNormError, GradientNorms, token_mask, track_gradient_norms
from .layers import mark_layers
from .sensitivity import ModuleSensitivity, Sensitivity, sensitivity

__all__ = [
    "Backend",
    "Diagnosis",
    "DiagnosisError",
    "FallbackWarning",
    "GradientNormError",
    "GradientNorms",
    "ModuleSensitivity",
    "NoTangentsError",
    "OffloadError",
    "PartitionError",
    "PatternWarning",
    "Policy",
    "PolicyError",
    "Report",
    "Rule",
    "Sensitivity",
    "SiteReport",
    "backend",
    "capture",
    "diagnose",
    "explain",
    "mark_layers",
    "reports",
    "sensitivity",
    "token_mask",
    "track_gradient_norms",
    "transform",
]

try:
    __version__ = version("wtacrs-fx")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"
