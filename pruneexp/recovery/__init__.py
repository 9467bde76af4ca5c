"""Recovery: a little training after pruning, where it is asked for."""

from pruneexp.recovery.blockwise import Blockwise
from pruneexp.recovery.common import Adapter, NoRecovery
from pruneexp.recovery.lora import Lora
from pruneexp.types.defaults import RECOVERY, fill_in

__all__ = ["Adapter", "Blockwise", "Lora", "NoRecovery"]

fill_in(globals(), __all__, RECOVERY)
