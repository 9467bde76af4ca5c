"""The default that works offline: a small language of exactly known probabilities, and models trained on it.

The checkpoints are the folders `llama`, `opt` and `bloom` in `FOLDER`. Importing this loads neither torch nor
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
