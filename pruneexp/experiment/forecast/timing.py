"""What a run with a budget in time holds while layers are timed, which is beside calibration and pruning."""

from __future__ import annotations

from pruneexp.experiment.forecast.memory import Stage, activations
from pruneexp.experiment.forecast.shape import Shape, Windows
from pruneexp.latency.workload import POOL_BYTES
from pruneexp.types import Sparsity

TIMED = ("time layers", "time pruned")  # the stages' names


def timing_stages(shape: Shape, left: int, process: int, sparsity: Sparsity) -> tuple[Stage, Stage]:
    """Timing for the table, before anything else, and at the end that of all layers before and after pruning, when the
    model takes `left` bytes.

    copies       the pool that the weights of timed layers, and what their KV caches begin with, are views of
    activations  of the widest sublayer: of all tokens (prefill), or of one (decode; where scores are written out, keys
                 and values of all are repeated for every query head); the KV cache that a pass leaves, of one layer or
                 of all
    """
    e, decodes = shape.itemsize, sparsity.phase == "decode"
    tokens = sparsity.batch * (sparsity.context + decodes)
    attention = [site for site in shape.sites if site.kind == "attention"]
    caches = [tokens * site.units * site.cost.kv * e for site in attention]
    widest = max(caches, default=0)
    pool = min(POOL_BYTES, shape.decoder * e)
    if decodes and sparsity.context and widest // 2 > pool:  # it grows by copying itself
        pool += -(-widest // 2 // pool) * pool
    in_flight = activations(shape, Windows(sparsity.batch, 1 if decodes else sparsity.context, sparsity.batch))
    if decodes and shape.scores:
        in_flight += 2 * tokens * max((site.channels for site in attention), default=0) * e
    held = {"process": process, "copies": pool}
    first = Stage(TIMED[0], {**held, "weights": shape.bytes, "activations": in_flight + widest})
    last = Stage(TIMED[1], {**held, "weights": left, "activations": in_flight + sum(caches)})
    return first, last
