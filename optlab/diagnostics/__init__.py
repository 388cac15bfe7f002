"""Sharpness, noise scale, sensitivities: what a training run can be asked about itself."""

from optlab.diagnostics.batch_size import critical_batch, critical_batch_of_loss
from optlab.diagnostics.noise_scale import (
    gradient_noise_scale,
    gsnr,
    micro_batch_norms,
    noise_scale_tracker,
)
from optlab.diagnostics.sensitivity import logit_sharpness, logit_stats, lr_sensitivity
from optlab.diagnostics.sharpness import (
    gradient_sharpness,
    hessian_spectrum,
    hessian_trace,
    sharpness,
)
from optlab.diagnostics.stability import critical_sharpness, stability_limit, stability_margin

__all__ = [
    "critical_batch",
    "critical_batch_of_loss",
    "critical_sharpness",
    "gradient_noise_scale",
    "gradient_sharpness",
    "gsnr",
    "hessian_spectrum",
    "hessian_trace",
    "logit_sharpness",
    "logit_stats",
    "lr_sensitivity",
    "micro_batch_norms",
    "noise_scale_tracker",
    "sharpness",
    "stability_limit",
    "stability_margin",
]
