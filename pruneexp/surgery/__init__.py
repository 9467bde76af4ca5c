"""The only code that changes models: masking for a while, shrinking for good, saving, and verifying what was saved."""

# ruff: noqa: F401

from pruneexp.surgery.forms import Form, remote_code_form, save_form
from pruneexp.surgery.mask import masked_layer
from pruneexp.surgery.pad import Padding, pad_, padding
from pruneexp.surgery.prove import BlockProof, prove_in_place, prove_in_process
from pruneexp.surgery.prove_source import Dense, check_source, dense_logits
from pruneexp.surgery.save import STREAMED_SHARD_BYTES, StreamedSave, save
from pruneexp.surgery.served import broken_period, period_warning, vllm_note
from pruneexp.surgery.shrink import check_plan, remove_blocks_, replace_out_projections_, shrink_, shrink_layer_
