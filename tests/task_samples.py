"""A few made-up items of each task with a local format: as its authors' files have them, and as the data set on the hub
that the harness's definition names has them. Each is written out, so that neither is made from the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def choices(*texts: str) -> list[dict[str, str]]:
    return [{"text": text, "label": label} for text, label in zip(texts, "ABCDE", strict=False)]


ARC_LOCAL: Rows = [
    {
        "id": "a1",
        "question": {"stem": "What do plants drink?", "choices": choices("water", "sand", "fire")},
        "answerKey": "A",
    },
    {
        "id": "a2",
        "question": {
            "stem": "Where is the moon?",
            "choices": [{"text": "in a box", "label": "1"}, {"text": "above", "label": "2"}],
        },
        "answerKey": "2",
    },
]
ARC_HUB: Rows = [
    {
        "id": "a1",
        "question": "What do plants drink?",
        "choices": {"text": ["water", "sand", "fire"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    {
        "id": "a2",
        "question": "Where is the moon?",
        "choices": {"text": ["in a box", "above"], "label": ["1", "2"]},
        "answerKey": "2",
    },
]
GOALS: Rows = [
    {"goal": "dry a cup", "sol1": "Use a towel.", "sol2": "Put it under the tap."},
    {"goal": "wake a friend", "sol1": "Whisper to a tree.", "sol2": "Ring the bell."},
    {"goal": "find a key", "sol1": "Look under the mat.", "sol2": "Shout at the lock, then wait."},
]
SENTENCES: Rows = [
    {"sentence": "Ann thanked Rosa because _ had helped.", "option1": "Ann", "option2": "Rosa", "answer": "2"},
    {"sentence": "The cup did not fit the box, as the _ was small.", "option1": "box", "option2": "cup", "answer": "1"},
]

# file -> rows as the authors wrote them; texts as they are
FILES: dict[str, Rows | str] = {
    "boolq/dev.jsonl": [
        {"question": "is the sea dry", "answer": False, "passage": "The sea is full of water."},
        {"question": "do birds fly", "title": "Bird", "answer": True, "passage": "Most birds can fly."},
    ],
    "boolq/train.jsonl": [
        {"question": "is snow cold", "title": "Snow", "answer": True, "passage": "Snow is frozen."},
        {"question": "is coal white", "title": "Coal", "answer": False, "passage": "Coal is black."},
        {"question": "is a dog a bird", "title": "Dog", "answer": False, "passage": "A dog has four legs."},
    ],
    "piqa/valid.jsonl": GOALS,
    "piqa/valid-labels.lst": "0\n1\n0\n",
    "piqa/train.jsonl": GOALS[::-1],
    "piqa/train-labels.lst": "0\n1\n0\n",
    "hellaswag/hellaswag_val.jsonl": [
        {
            "ind": 4,
            "activity_label": "Baking",
            "ctx_a": "[header] How to bake [title] Mix flour. [step] A man stirs.",
            "ctx_b": "he",
            "ctx": "[header] How to bake [title] Mix flour. [step] A man stirs. he",
            "endings": ["eats [substeps] the flour.", "sleeps.", "pours  milk.", "sings."],
            "label": 2,
            "split": "val",
        },
        {
            "ind": 5,
            "activity_label": "Rowing",
            "ctx": "A boat is on the lake. Two women",
            "endings": ["row.", "melt.", "rain.", "boil."],
            "label": 0,
            "split": "val",
        },
    ],
    "winogrande/dev.jsonl": SENTENCES,
    "arc/ARC-Easy-Test.jsonl": ARC_LOCAL,
    "arc/ARC-Challenge-Test.jsonl": ARC_LOCAL[::-1],
    "openbookqa/test.jsonl": [
        {
            "id": "o1",
            "question": {"stem": "A stone falls because", "choices": choices("of gravity", "it is sad", "of wind")},
            "answerKey": "A",
        },
    ],
    "lambada/lambada_openai_test.jsonl": [
        {"context": "The dog saw the cat and ran after the", "continuation": "cat"},
        {"text": "She opened the door and closed the door"},
    ],
}

# task -> split -> rows as the hub has them
HUB: dict[str, dict[str, Rows]] = {
    "boolq": {
        "validation": [
            {"question": "is the sea dry", "passage": "The sea is full of water.", "idx": 0, "label": 0},
            {"question": "do birds fly", "passage": "Bird -- Most birds can fly.", "idx": 1, "label": 1},
        ],
        "train": [
            {"question": "is snow cold", "passage": "Snow -- Snow is frozen.", "idx": 0, "label": 1},
            {"question": "is coal white", "passage": "Coal -- Coal is black.", "idx": 1, "label": 0},
            {"question": "is a dog a bird", "passage": "Dog -- A dog has four legs.", "idx": 2, "label": 0},
        ],
    },
    "piqa": {
        "validation": [{**row, "label": label} for row, label in zip(GOALS, (0, 1, 0), strict=True)],
        "train": [{**row, "label": label} for row, label in zip(GOALS[::-1], (0, 1, 0), strict=True)],
    },
    "hellaswag": {
        "validation": [
            {
                "ind": 4,
                "activity_label": "Baking",
                "ctx_a": "[header] How to bake [title] Mix flour. [step] A man stirs.",
                "ctx_b": "he",
                "ctx": "[header] How to bake [title] Mix flour. [step] A man stirs. he",
                "endings": ["eats [substeps] the flour.", "sleeps.", "pours  milk.", "sings."],
                "label": "2",
            },
            {
                "ind": 5,
                "activity_label": "Rowing",
                "ctx_a": "A boat is on the lake.",
                "ctx_b": "two women",
                "ctx": "A boat is on the lake. two women",
                "endings": ["row.", "melt.", "rain.", "boil."],
                "label": "0",
            },
        ],
    },
    "winogrande": {"validation": SENTENCES},
    "arc_easy": {"test": ARC_HUB},
    "arc_challenge": {"test": ARC_HUB[::-1]},
    "openbookqa": {
        "test": [
            {
                "id": "o1",
                "question_stem": "A stone falls because",
                "choices": {"text": ["of gravity", "it is sad", "of wind"], "label": ["A", "B", "C"]},
                "answerKey": "A",
            },
        ]
    },
    "lambada_openai": {
        "test": [
            {"text": "The dog saw the cat and ran after the cat"},
            {"text": "She opened the door and closed the door"},
        ]
    },
}
SOURCES = {  # what the harness's definitions name: path and name on the hub
    "boolq": ("aps/super_glue", "boolq"),
    "piqa": ("baber/piqa", None),
    "hellaswag": ("Rowan/hellaswag", None),
    "winogrande": ("allenai/winogrande", "winogrande_xl"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "openbookqa": ("allenai/openbookqa", "main"),
    "lambada_openai": ("EleutherAI/lambada_openai", "default"),
}


def write_files(folder: Path) -> Path:
    """The authors' files, below `folder`."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(text, encoding="utf-8")
    return folder
