"""The only code that changes models: masking for a while, shrinking for good, saving and proving what was saved."""

from pruneexp.surgery.forms import Form, remote_code_form, save_form
from pruneexp.surgery.mask import masked, masked_layer
from pruneexp.surgery.pad import Padding, pad_, padding
from pruneexp.surgery.period import broken_period, period_warning
from pruneexp.surgery.prove import BlockProof, prove_in_place, prove_in_process
from pruneexp.surgery.prove_source import Dense, check_source, dense_logits
from pruneexp.surgery.save import STREAMED_SHARD_BYTES, StreamedSave, save
from pruneexp.surgery.served import vllm_note
from pruneexp.surgery.shrink import check_plan, remove_blocks_, replace_readers_, shrink_, shrink_layer_

__all__ = [
    "STREAMED_SHARD_BYTES",
    "BlockProof",
    "Dense",
    "Form",
    "Padding",
    "StreamedSave",
    "broken_period",
    "check_plan",
    "check_source",
    "dense_logits",
    "masked",
    "masked_layer",
    "pad_",
    "padding",
    "period_warning",
    "prove_in_place",
    "prove_in_process",
    "remote_code_form",
    "remove_blocks_",
    "replace_readers_",
    "save",
    "save_form",
    "shrink_",
    "shrink_layer_",
    "vllm_note",
]
