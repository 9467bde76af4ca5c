"""The only code that changes models: masking for a while, shrinking for good, saving and proving what was saved."""

from pruneexp.surgery.forms import Form, save_form
from pruneexp.surgery.mask import masked, masked_layer
from pruneexp.surgery.prove import BlockProof, prove_in_place, prove_in_process
from pruneexp.surgery.save import StreamedSave, save
from pruneexp.surgery.shrink import remove_blocks_, shrink_, shrink_layer_

__all__ = [
    "BlockProof",
    "Form",
    "StreamedSave",
    "masked",
    "masked_layer",
    "prove_in_place",
    "prove_in_process",
    "remove_blocks_",
    "save",
    "save_form",
    "shrink_",
    "shrink_layer_",
]
