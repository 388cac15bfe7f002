"""Recipes: one function per paper, each a short chain of primitives."""

from optlab.recipes.curvature import sophia
from optlab.recipes.elementwise import adabelief, adagrad_norm, diffgrad
from optlab.recipes.layerwise import allora, lamb, lars, sgd_sai
from optlab.recipes.lmo import lanton, scion
from optlab.recipes.low_rank.projected import galore, ldadam, q_galore
from optlab.recipes.low_rank.rescaled import apollo, conda, grad_norm_lorp
from optlab.recipes.low_rank.with_residual import fira, frugal
from optlab.recipes.orthogonal import muon, normuon
from optlab.recipes.radial import adamp, nap, sgdp
from optlab.recipes.sign import lion, lion_k, signum
from optlab.recipes.stable import spam, stable_spam

__all__ = [
    "adabelief",
    "adagrad_norm",
    "adamp",
    "allora",
    "apollo",
    "conda",
    "diffgrad",
    "fira",
    "frugal",
    "galore",
    "grad_norm_lorp",
    "lamb",
    "lanton",
    "lars",
    "ldadam",
    "lion",
    "lion_k",
    "muon",
    "nap",
    "normuon",
    "q_galore",
    "scion",
    "sgd_sai",
    "sgdp",
    "signum",
    "sophia",
    "spam",
    "stable_spam",
]
