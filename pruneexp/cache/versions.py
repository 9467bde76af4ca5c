"""Code as a part of a key: an answer is worth keeping as long as the code that gave it is the same."""

from __future__ import annotations

import hashlib
import sys
from functools import cache
from pathlib import Path

STAGE = ("calibrate", "criterion", "evidence", "model", "types")  # packages that calibration runs


@cache
def code_version(packages: tuple[str, ...] = STAGE) -> str:
    """16 hex digits over the source of these packages of ours, of modeling_pruned.py and the versions of torch and
    transformers."""
    from importlib.metadata import version

    root = Path(__file__).parent.parent
    files = [root / "modeling_pruned.py", *(path for name in packages for path in sorted((root / name).glob("*.py")))]
    digest = hashlib.sha256(f"torch {version('torch')} transformers {version('transformers')}".encode())
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def version_of(part: object) -> str:
    """What a method or a type of evidence is, settings and source: `repr`, and a hash of its module's file, for those
    that are not ours."""
    kind = part if isinstance(part, type) else type(part)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    source = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else ""
    return f"{kind.__module__}.{kind.__qualname__} {'' if part is kind else repr(part)} {source}"
