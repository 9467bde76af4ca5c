"""pruneexp: structured, training-free pruning of language models, composed from configs."""

__version__ = "0.1.0"
