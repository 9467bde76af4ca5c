"""What a model is worth and what it costs: figures whose names carry their protocol.

An evaluator is called with a model and its tokenizer, dense and pruned alike, and gives figures, and files for the run
folder's samples/ where it has any. Before any weight is loaded the runner reads `streams` (False: not possible with
model.stream=true) and calls `check` (files), `prepare` (windows) and `longest` (tokens of the longest text that the
model will see).
"""

# ruff: noqa: F401

from pruneexp.evaluator.generation import Generation
from pruneexp.evaluator.latency import Latency
from pruneexp.evaluator.perplexity import Perplexity
from pruneexp.evaluator.questions import Questions
from pruneexp.evaluator.size import Size
from pruneexp.evaluator.zeroshot import Zeroshot
from pruneexp.types.defaults import EVALUATOR, fill_in

fill_in(globals(), EVALUATOR)
