"""Times of a model's sublayers by what they keep, on the device at hand: measured, read, written and drawn."""

# ruff: noqa: F401

from pruneexp.latency.measure import compare_times, measure_table
from pruneexp.latency.table import Conditions, Table, check_table, read_table, same_device
from pruneexp.latency.workload import Workload
