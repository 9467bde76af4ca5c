"""`pruneexp-export`: a finished run's checkpoint in another form, proved to be the same model."""

from pruneexp.export.command import HELP, KEYS, main, request
from pruneexp.export.write import Request, export

__all__ = ["HELP", "KEYS", "Request", "export", "main", "request"]
