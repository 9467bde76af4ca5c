"""Scores and a budget to a Plan: which units stay."""

# ruff: noqa: F401

from pruneexp.search.budgeted import Global
from pruneexp.search.common import layer_budgets
from pruneexp.search.evolutionary import Evolutionary
from pruneexp.search.flap import AlAm, AlAmOfficial, AlAmQueryHeads, AlMm, UlMm, UlUm
from pruneexp.search.granularity import KIND, UNITS, WHOLE, scored_as
from pruneexp.search.greedy import Greedy
from pruneexp.search.layer_shares import LayerShares
from pruneexp.search.layerwise import Layerwise
from pruneexp.search.policy import PolicyGradient
from pruneexp.search.query_heads import Turns, in_turns
from pruneexp.search.removable import block_scores, expert_scores
from pruneexp.search.reordered import reordered
from pruneexp.search.serve_safe import ServeSafe
from pruneexp.search.two_stage import TwoStage
from pruneexp.search.uniform import Uniform
from pruneexp.types.defaults import SEARCH, fill_in

fill_in(globals(), SEARCH)
