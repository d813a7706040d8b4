"""`bench RECIPE`: where does a step's time go, and what would make it shorter?"""

from hvdtrain.verbs.bench.command import bench

__all__ = ["bench"]
