"""`pruneexp-report`: finished runs as one page, with tables and figures beside it."""

from __future__ import annotations

from pruneexp.pages.command import main

__all__ = ["main"]
