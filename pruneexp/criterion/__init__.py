"""Importance of every unit of every site, higher = keep: weights and evidence to scores."""

from pruneexp.criterion.channels import Flap, FlapOfficial, Magnitude, Random, WandaSp
from pruneexp.criterion.obs import Obs

__all__ = ["Flap", "FlapOfficial", "Magnitude", "Obs", "Random", "WandaSp"]
