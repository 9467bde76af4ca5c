"""Recovery: a little training after pruning, where it is asked for."""

from pruneexp.recovery.blockwise import Blockwise
from pruneexp.recovery.common import Adapter, NoRecovery, Recovered, rate_factor
from pruneexp.recovery.lora import Lora
from pruneexp.types.defaults import RECOVERY, fill_in

__all__ = ["Adapter", "Blockwise", "Lora", "NoRecovery", "Recovered", "rate_factor"]

fill_in(globals(), __all__, RECOVERY)
