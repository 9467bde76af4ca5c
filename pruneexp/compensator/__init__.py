"""The out-projection's weight and bias after units are gone: what the removed channels gave, given by what stays."""

from pruneexp.compensator.least_squares import LeastSquares
from pruneexp.compensator.means import Bias, BiasOfficial, NoCompensation
from pruneexp.compensator.regression import LinearRegression
from pruneexp.types.defaults import COMPENSATOR, fill_in

__all__ = ["Bias", "BiasOfficial", "LeastSquares", "LinearRegression", "NoCompensation"]

fill_in(globals(), __all__, COMPENSATOR)
