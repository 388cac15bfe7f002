"""Composable gradient transformations for JAX: what networks are trained with after optax."""

from optlab import diagnostics, layout
from optlab.combine.federated import afa_cd, afa_cs, fedavg_m, scaffold_m
from optlab.combine.mesh import clients_on_mesh
from optlab.combine.multitask import combine_gradients, mgda, pareto_da
from optlab.compress import gblm_scores, importance_mask, rank_by_energy, shared_basis
from optlab.controllers.autolrs import AutoLRS
from optlab.controllers.averaging import adaptive_ema
from optlab.controllers.batch_growth import BatchGrowth, norm_test
from optlab.controllers.forecast import forecast_exponential
from optlab.controllers.rate_control import accuracy_gradient_rate, alrs_rate, hypergradient_rate
from optlab.controllers.refine import refine_schedule
from optlab.controllers.spectral import SpectralRate
from optlab.distributed.options import plan
from optlab.distributed.shardings import shardings_of, state_sharding
from optlab.layout import MatrixView, describe
from optlab.linalg import codecs, polar
from optlab.linalg.ranks import factorize
from optlab.recipes import (
    adabelief,
    adagrad_norm,
    adamp,
    allora,
    apollo,
    conda,
    diffgrad,
    fira,
    frugal,
    galore,
    grad_norm_lorp,
    lamb,
    lanton,
    lars,
    ldadam,
    lion,
    lion_k,
    muon,
    nap,
    normuon,
    q_galore,
    scion,
    sgd_sai,
    sgdp,
    signum,
    sophia,
    spam,
    stable_spam,
)
from optlab.schedules import (
    branch,
    cyclic_cosine,
    damped_cosine,
    infinite,
    inverse_power,
    refined,
    slanted_triangular,
    warmup_linear_decay,
    wsd,
    wsd_s,
)
from optlab.schedules.layerwise import layerwise_rates, scale_by_rates, unit_rates
from optlab.schedules.mup import depth_factors, mup_multipliers
from optlab.schedules.rates import heavy_ball_optimal, max_rate_from_spectrum, scale_rate_to_batch
from optlab.schedules.unfreeze import progressive_unfreeze
from optlab.state import checkpoint
from optlab.state.evaluation import eval_params
from optlab.state.memory import compressed_bytes, state_bytes, state_fields
from optlab.state.metrics import metrics
from optlab.state.reset import reset_state
from optlab.transforms import kappa, measures
from optlab.transforms.adaptive import (
    scale_by_belief,
    scale_by_diffgrad,
    scale_by_friction,
    scale_by_moments,
)
from optlab.transforms.aggregate import median_of_groups, rolling_median, winsorize
from optlab.transforms.averages import average_params
from optlab.transforms.clip import norm_growth_limiter
from optlab.transforms.constrain import keep_sparsity, project_onto_subspace
from optlab.transforms.curvature import scale_by_clipped_curvature
from optlab.transforms.decay import add_cautious_decay, decay_after_update
from optlab.transforms.estimators import gauss_newton_diagonal, hutchinson_diagonal
from optlab.transforms.faults import skip_bad_steps
from optlab.transforms.importance import accumulate_importance
from optlab.transforms.input_gram import conv_input_gram, input_gram, precondition_by_input_gram
from optlab.transforms.ldadam import scale_by_ldadam
from optlab.transforms.lmo import scale_by_lmo
from optlab.transforms.low_rank import in_low_rank
from optlab.transforms.momentum import (
    debiased_ema,
    ema_from_first,
    heavy_ball,
    interpolate_momentum,
    with_previous_updates,
)
from optlab.transforms.narrow import apply_updates_stochastic, compensated_updates
from optlab.transforms.neurons import normalize_neurons
from optlab.transforms.noise import noise_adaptive
from optlab.transforms.orthogonalize import orthogonalize
from optlab.transforms.quantize import quantize_state
from optlab.transforms.radial import normalize_and_project, project_radial, remove_radial
from optlab.transforms.random_subspace import random_subspace
from optlab.transforms.raw_gradient import scale_by_raw_gradient, with_raw_gradient
from optlab.transforms.refresh import lazy_refresh
from optlab.transforms.reset import reset_moments
from optlab.transforms.residual import column_scaled_residual, plain_residual, sign_residual
from optlab.transforms.round_weights import pack_weights, round_weights, unpack_weights
from optlab.transforms.select_blocks import select_blocks
from optlab.transforms.shape_scale import scale_by_shape
from optlab.transforms.sign import apply_kappa, scale_by_lion_k, scale_by_sign_momentum
from optlab.transforms.spam import scale_by_spam
from optlab.transforms.spikes import clip_spikes, normalize_gradient_norm
from optlab.transforms.subspace import (
    coordinate_projector,
    power_projector,
    quantized,
    random_projector,
    svd_projector,
)
from optlab.transforms.tree_norm import scale_by_adagrad_norm
from optlab.transforms.trust_ratio import (
    scale_by_initial_snr,
    scale_by_inverse_row_norm,
    scale_by_trust_ratio,
)
from optlab.transforms.watch import watch
from optlab.transforms.weight_norm import in_weight_norm

__version__ = "0.1.0"

__all__ = [
    "AutoLRS",
    "BatchGrowth",
    "MatrixView",
    "SpectralRate",
    "accumulate_importance",
    "accuracy_gradient_rate",
    "adabelief",
    "adagrad_norm",
    "adamp",
    "adaptive_ema",
    "add_cautious_decay",
    "afa_cd",
    "afa_cs",
    "allora",
    "alrs_rate",
    "apollo",
    "apply_kappa",
    "apply_updates_stochastic",
    "average_params",
    "branch",
    "checkpoint",
    "clients_on_mesh",
    "clip_spikes",
    "codecs",
    "column_scaled_residual",
    "combine_gradients",
    "compensated_updates",
    "compressed_bytes",
    "conda",
    "conv_input_gram",
    "coordinate_projector",
    "cyclic_cosine",
    "damped_cosine",
    "debiased_ema",
    "decay_after_update",
    "depth_factors",
    "describe",
    "diagnostics",
    "diffgrad",
    "ema_from_first",
    "eval_params",
    "factorize",
    "fedavg_m",
    "fira",
    "forecast_exponential",
    "frugal",
    "galore",
    "gauss_newton_diagonal",
    "gblm_scores",
    "grad_norm_lorp",
    "heavy_ball",
    "heavy_ball_optimal",
    "hutchinson_diagonal",
    "hypergradient_rate",
    "importance_mask",
    "in_low_rank",
    "in_weight_norm",
    "infinite",
    "input_gram",
    "interpolate_momentum",
    "inverse_power",
    "kappa",
    "keep_sparsity",
    "lamb",
    "lanton",
    "lars",
    "layerwise_rates",
    "layout",
    "lazy_refresh",
    "ldadam",
    "lion",
    "lion_k",
    "max_rate_from_spectrum",
    "measures",
    "median_of_groups",
    "metrics",
    "mgda",
    "muon",
    "mup_multipliers",
    "nap",
    "noise_adaptive",
    "norm_growth_limiter",
    "norm_test",
    "normalize_and_project",
    "normalize_gradient_norm",
    "normalize_neurons",
    "normuon",
    "orthogonalize",
    "pack_weights",
    "pareto_da",
    "plain_residual",
    "plan",
    "polar",
    "power_projector",
    "precondition_by_input_gram",
    "progressive_unfreeze",
    "project_onto_subspace",
    "project_radial",
    "q_galore",
    "quantize_state",
    "quantized",
    "random_projector",
    "random_subspace",
    "rank_by_energy",
    "refine_schedule",
    "refined",
    "remove_radial",
    "reset_moments",
    "reset_state",
    "rolling_median",
    "round_weights",
    "scaffold_m",
    "scale_by_adagrad_norm",
    "scale_by_belief",
    "scale_by_clipped_curvature",
    "scale_by_diffgrad",
    "scale_by_friction",
    "scale_by_initial_snr",
    "scale_by_inverse_row_norm",
    "scale_by_ldadam",
    "scale_by_lion_k",
    "scale_by_lmo",
    "scale_by_moments",
    "scale_by_rates",
    "scale_by_raw_gradient",
    "scale_by_shape",
    "scale_by_sign_momentum",
    "scale_by_spam",
    "scale_by_trust_ratio",
    "scale_rate_to_batch",
    "scion",
    "select_blocks",
    "sgd_sai",
    "sgdp",
    "shardings_of",
    "shared_basis",
    "sign_residual",
    "signum",
    "skip_bad_steps",
    "slanted_triangular",
    "sophia",
    "spam",
    "stable_spam",
    "state_bytes",
    "state_fields",
    "state_sharding",
    "svd_projector",
    "unit_rates",
    "unpack_weights",
    "warmup_linear_decay",
    "watch",
    "winsorize",
    "with_previous_updates",
    "with_raw_gradient",
    "wsd",
    "wsd_s",
]
