"""A small language with exactly known probabilities, and models trained on it: the default that works offline.

The checkpoints are the folders `llama`, `opt` and `bloom` beside this file. Importing this loads neither torch nor
transformers.
"""

from pathlib import Path

from pruneexp.embedded.language import (
    CALIBRATION,
    EVALUATION,
    TRAINING,
    Process,
    Question,
    Story,
    questions,
    stories,
    text,
    windows,
)

FOLDER = Path(__file__).parent

__all__ = [
    "CALIBRATION",
    "EVALUATION",
    "FOLDER",
    "TRAINING",
    "Process",
    "Question",
    "Story",
    "questions",
    "stories",
    "text",
    "windows",
]
