"""Text to token windows, int64 [N, T]: from the hub, from files, in the embedded language, or of several of these.

Every dataset has the same face (`types.Dataset`): `calibration(tokenizer)` draws its `samples` windows of `length`
tokens; `evaluation(tokenizer, length)` is the whole evaluation text as consecutive, non-overlapping windows.
"""

# ruff: noqa: F401

from pruneexp.dataset.document_files import DocumentFiles, documents, forget_documents
from pruneexp.dataset.embedded import Embedded
from pruneexp.dataset.files import Text, Tokens, text, tokens
from pruneexp.dataset.given import GivenTokens
from pruneexp.dataset.hub import HubText
from pruneexp.dataset.mixed import Mixed
from pruneexp.dataset.windows import (
    bos_token,
    check_takes_bos,
    check_vocabulary,
    encode,
    evaluation_parts,
    evaluation_windows,
    fingerprint,
    overlap,
    takes_bos,
    windows_of,
    with_bos,
)
from pruneexp.types.defaults import DATASET, fill_in

fill_in(globals(), DATASET)
