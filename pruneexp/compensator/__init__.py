"""The out-projection's weight and bias after units are gone: what the removed channels gave, given by what stays."""

# ruff: noqa: F401

from pruneexp.compensator.least_squares import LeastSquares
from pruneexp.compensator.means import Bias, BiasOfficial, NoCompensation
from pruneexp.compensator.regression import LinearRegression
from pruneexp.types.defaults import COMPENSATOR, fill_in

fill_in(globals(), COMPENSATOR)
