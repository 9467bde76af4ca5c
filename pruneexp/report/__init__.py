"""Finished runs as one page, with tables and figures beside it. Reads folders alone."""
