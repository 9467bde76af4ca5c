"""Recovery: a little training after pruning, where it is asked for."""

# ruff: noqa: F401

from pruneexp.recovery.blockwise import Blockwise
from pruneexp.recovery.common import Adapter, NoRecovery
from pruneexp.recovery.lora import Lora
from pruneexp.types.defaults import RECOVERY, fill_in

fill_in(globals(), RECOVERY)
