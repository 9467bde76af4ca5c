"""What calibration found, kept by the fingerprint of everything that it depends on.

`Cache` is `cache=on`, `NoCache` is `cache=off`; `code_version` and `version_of` make code a part of a key.
"""

from pruneexp.cache.store import Cache, Entries, NoCache
from pruneexp.cache.versions import STAGE, code_version, version_of

__all__ = ["STAGE", "Cache", "Entries", "NoCache", "code_version", "version_of"]
