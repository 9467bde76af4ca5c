"""What a model is worth and what it costs: figures whose names carry their protocol.

An evaluator is called with a model and its tokenizer, dense and pruned alike. Before any weight is loaded the runner
reads `streams` (False: not possible with model.stream=true) and calls `check` (files) and `prepare` (windows).
"""

from pruneexp.evaluator.latency import Latency
from pruneexp.evaluator.perplexity import Perplexity
from pruneexp.evaluator.questions import Questions
from pruneexp.evaluator.size import Size

__all__ = ["Latency", "Perplexity", "Questions", "Size"]
