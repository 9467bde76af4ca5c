"""What a run did, for people: a short table at its end, a picture of the structure that is left, the model's card."""

from pruneexp.report.card import Card, Written, base_model, card_text, is_ours, license_of, reworded
from pruneexp.report.structure import Width, removed_share, structure_figure, widths
from pruneexp.report.summary import Row, print_summary, summary, summary_line, summary_table

__all__ = [
    "Card",
    "Row",
    "Width",
    "Written",
    "base_model",
    "card_text",
    "is_ours",
    "license_of",
    "print_summary",
    "removed_share",
    "reworded",
    "structure_figure",
    "summary",
    "summary_line",
    "summary_table",
    "widths",
]
