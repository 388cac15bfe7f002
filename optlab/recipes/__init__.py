"""Recipes: one function per paper, each a short chain of primitives."""

from optlab.recipes.elementwise import adabelief, adagrad_norm, diffgrad
from optlab.recipes.layerwise import allora, lamb, lars, sgd_sai
from optlab.recipes.lmo import lanton, scion
from optlab.recipes.orthogonal import muon, normuon
from optlab.recipes.radial import adamp, nap, sgdp
from optlab.recipes.sign import lion, lion_k, signum

__all__ = [
    "adabelief",
    "adagrad_norm",
    "adamp",
    "allora",
    "diffgrad",
    "lamb",
    "lanton",
    "lars",
    "lion",
    "lion_k",
    "muon",
    "nap",
    "normuon",
    "scion",
    "sgd_sai",
    "sgdp",
    "signum",
]
