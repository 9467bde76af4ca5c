"""What calibration found, kept by the fingerprint of everything that it depends on.

`Cache` is `cache=on`, `NoCache` is `cache=off`.
"""

from pruneexp.cache.store import Cache, NoCache

__all__ = ["Cache", "NoCache"]
