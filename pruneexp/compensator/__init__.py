"""The reader's weight and bias after units are gone: what the removed channels gave, given by what stays."""

from pruneexp.compensator.least_squares import LeastSquares
from pruneexp.compensator.means import Bias, BiasOfficial, NoCompensation

__all__ = ["Bias", "BiasOfficial", "LeastSquares", "NoCompensation"]
