"""Importance of every unit of every site, higher = keep: weights and evidence to scores.

Criteria that judge an out-projection's channels answer with `ColumnScores`: a unit's score is the sum of its channels'
(heads: W channels, FFN: one), and the channels stay at hand for searches that standardise by their spread. Scores are
as the paper's formula has them, never standardised here: comparing sites is the search's business.
"""

# ruff: noqa: F401

from pruneexp.criterion.activations import ActivationNorm, Flap, FlapOfficial, WandaSp
from pruneexp.criterion.depth import BlockInfluence, LossDrop
from pruneexp.criterion.influence import Ifso
from pruneexp.criterion.obs import Obs
from pruneexp.criterion.propagation import LlmBip
from pruneexp.criterion.sensitivity import MiniLlm
from pruneexp.criterion.slimllm import SlimLlm
from pruneexp.criterion.taylor import Taylor
from pruneexp.criterion.weights import Magnitude, Random
from pruneexp.types.defaults import CRITERION, fill_in

fill_in(globals(), CRITERION)
