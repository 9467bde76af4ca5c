"""Times of a model's sublayers by what they keep, on the device at hand: measured, read, written and drawn."""

from pruneexp.latency.measure import compared, measured_table
from pruneexp.latency.table import Conditions, Table, check_table, read_table, same_device
from pruneexp.latency.workload import Workload

__all__ = [
    "Conditions",
    "Table",
    "Workload",
    "check_table",
    "compared",
    "measured_table",
    "read_table",
    "same_device",
]
