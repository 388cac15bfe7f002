"""What of trained weights to keep: scores and masks of entries, ranks, shared subspaces.

Plain functions of trees that run once, on arrays; what they return goes into transformations.
"""

from optlab.compress.importance import gblm_scores, importance_mask
from optlab.compress.ranks import RanksByEnergy, rank_by_energy
from optlab.compress.shared_basis import shared_basis

__all__ = ["RanksByEnergy", "gblm_scores", "importance_mask", "rank_by_energy", "shared_basis"]
