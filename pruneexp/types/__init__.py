"""The nouns of a pruning run: sites, layers, plans, budgets, and the protocols that methods satisfy.

Shape letters, used as suffixes of tensor names everywhere in this package:

    B batch        T time (tokens of a window)   N tokens in all, N = B*T (of a token array: windows)
    D hidden size  C input channels of an out-projection  U units of a site
    W channels per unit, C = U*W                 R in-projection rows per unit
    K kept channels                              O outputs of an out-projection (= D)

A *site* is one prunable axis of one decoder layer: U interchangeable units. Removing a unit removes its rows of the
*in-projections* (query, key, value; gate, up; fc1) and its columns of the one *out-projection* (o_proj, down_proj,
fc2).
"""

# ruff: noqa: F401

from pruneexp.types.defaults import evidence_kinds, filled
from pruneexp.types.nouns import (
    Candidate,
    ColumnScores,
    ConfigError,
    ConfigErrors,
    Measured,
    RemovalPath,
    Reorderable,
    RunError,
    RunRecord,
    Score,
    Scores,
    one_line,
    own_scores,
    require_least,
    require_within,
    size_text,
    start_name,
    unit_scores,
)
from pruneexp.types.plan import PLAN_VERSION, Budget, Plan, SitePlan
from pruneexp.types.protocols import (
    Compensator,
    Criterion,
    Evaluator,
    Evidence,
    Objective,
    Oracle,
    Quantise,
    Recovery,
    Search,
    Sparsity,
)
from pruneexp.types.site import NOTHING, QUERY_HEADS, Block, Cost, Site, SiteWeights
from pruneexp.types.sources import ALWAYS, SOURCES, Sequential, collected_by, source_of
from pruneexp.types.times import PICOSECONDS, Curve, LayerTimes, Times, times_of
from pruneexp.types.tracking import Tracker
from pruneexp.types.windows import Augmentation, Dataset
