"""What of trained weights to keep: scores and masks of entries, ranks of matrices.

Plain functions of trees that run once, on arrays; what they return goes into transformations.
"""

from optlab.compress.importance import gblm_scores, importance_mask
from optlab.compress.ranks import RanksByEnergy, rank_by_energy

__all__ = ["RanksByEnergy", "gblm_scores", "importance_mask", "rank_by_energy"]
