"""A budget in time: the table that it is counted by, before pruning, and what the pruned layers take, after."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from pruneexp.cache import Cache, NoCache
from pruneexp.conf_files import typed_keys
from pruneexp.experiment.forecast import Forecast, timing_stages
from pruneexp.experiment.settings import Experiment
from pruneexp.files import write_atomic
from pruneexp.fingerprint import code_version
from pruneexp.latency import (
    Conditions,
    Table,
    Workload,
    check_table,
    compare_times,
    measure_table,
    read_table,
    same_device,
)
from pruneexp.latency.workload import widths
from pruneexp.model import Model
from pruneexp.model.modeling_pruned import head_size
from pruneexp.pruning import Pruned
from pruneexp.pruning.budget import check_pruning
from pruneexp.tracker.environment import processor
from pruneexp.tracker.structure import latency_figure
from pruneexp.types import QUERY_HEADS, ConfigError, Curve, LayerTimes, Site, Sparsity, Times

logger = logging.getLogger("pruneexp")

FILE, FIGURE = "latency.json", "latency.png"


@dataclass(frozen=True)
class Timing:
    """What a run counts times by. `work`: the layers before pruning, None where the table is another device's."""

    table: Table
    work: Workload | None

    def figures(self, model: Model, foretold: float) -> dict[str, float]:
        """The pruned layers against what they were, measured in turns, beside the share that the table foretold."""
        if self.work is None:
            return {}
        conditions, timed = self.table.conditions, compare_times(self.work, model)
        name = f"latency/decoder_{conditions.phase}_ms@b{conditions.batch}x{conditions.context}"
        shares = [1 - pruned / dense for dense, pruned in zip(timed.dense, timed.pruned, strict=True)]
        dense, pruned, share = median(timed.dense), median(timed.pruned), median(shares)
        logger.info(
            "latency: the table foretold %.1f %% less, measured are %.1f %% (%.1f to %.1f %% in %d repeats): %.4g ms "
            "became %.4g",
            *(100 * foretold, 100 * share, 100 * min(shares), 100 * max(shares), len(shares), dense, pruned),
        )
        return {f"dense/{name}": dense, f"pruned/{name}": pruned, "sparsity/latency_measured": share}

    def write(self, folder: Path | None, pruned: Pruned, origin: list[int]) -> None:
        """latency.json, which another run takes as its `sparsity.table`, and a picture of it."""
        if folder is None:
            return
        write_atomic(folder / FILE, self.table.to_json())
        try:
            latency_figure(self.table.times, pruned.plan, pruned.sites, origin, folder / FIGURE)
        except Exception as error:  # a picture is not worth a run
            logger.warning("no %s: %s: %s", FIGURE, type(error).__name__, error)


def given_table(experiment: Experiment, outline: Model) -> Table | None:
    """The table of the file that `sparsity.table` names; None where times are to be measured, or not asked for. Raises
    ConfigError for one of another model or at other conditions, and where times cannot be counted."""
    sparsity = experiment.sparsity
    if sparsity.of != "latency":
        if unused := _unused(experiment):
            said = ", ".join(f"sparsity.{key}={getattr(sparsity, key)!r}" for key in unused)
            logger.warning("%s: no effect with sparsity.of=%s", said, sparsity.of)
        return None
    if outline.mixture:
        raise ConfigError(
            "sparsity.of='latency': expected another quantity for a mixture of experts, whose times depend on where "
            "tokens are routed to"
        )
    longest = sparsity.context + (sparsity.phase == "decode")
    if outline.family.learned_positions and longest > (outline.max_length or longest):
        raise ConfigError(
            f"sparsity.context={sparsity.context}: expected fewer, the model has {outline.max_length} positions"
        )
    if sparsity.table is None:
        return None
    table = read_table(sparsity.table)
    check_table(table, conditions_of(outline, sparsity), QUERY_HEADS in experiment.search.granularity)
    return table


def _unused(experiment: Experiment) -> list[str]:
    """Keys of `sparsity` without effect, where it counts no times, or nothing that depends on a context: those that
    were typed, and a table. A sweep's jobs may have typed ones for the sake of other jobs."""
    keys = ["batch", "phase", *([] if experiment.sparsity.of in ("macs", "bytes") else ["context"])]
    typed = typed_keys(experiment.job["overrides"])
    of_one = [] if experiment.job["sweep"] else [key for key in keys if f"sparsity.{key}" in typed]
    return of_one + ([] if experiment.sparsity.table is None else ["table"])


def conditions_of(model: Model, sparsity: Sparsity) -> Conditions:
    """What the sparsity asks to measure at, here."""
    cpu = model.device.type != "cuda"
    return Conditions(
        device=(processor() or "cpu") if cpu else torch.cuda.get_device_name(model.device),
        threads=torch.get_num_threads() if cpu else 0,
        dtype=str(model.dtype).removeprefix("torch."),
        attention=str(model.module.config._attn_implementation),
        torch=torch.__version__,
        model={
            "architecture": model.family.stock,
            "hidden": model.config.hidden_size,
            "head": head_size(model.config),
            "widths": [list(widths(model.layer_sites(index))) for index in range(len(model.layers))],
        },
        batch=sparsity.batch,
        context=sparsity.context,
        phase=sparsity.phase,
    )


def assumed(model: Model) -> Times:
    """Times in proportion to parameters, which stand in until some are measured."""

    def curve(site: Site | None) -> Curve:
        whole = [] if site is None else [(site.units, site.units * site.cost.params * 1e-6, 0.0)]
        return Curve(((0, 0.0, 0.0), *whole))

    layer_times = []
    for index in range(len(model.layers)):
        there = {site.kind: site for site in model.layer_sites(index)}
        attention, ffn = curve(there.get("attention")), curve(there.get("mlp"))
        site, heads = there.get("attention"), None
        if site is not None and site.head_cost is not None:
            ms = attention.at(site.units)
            least = ms - (site.group - 1) * site.units * site.head_cost.params * 1e-6
            heads = Curve(((1, max(0.0, least), 0.0), (site.group, ms, 0.0)))
        layer_times.append(LayerTimes((index,), attention, ffn, heads))
    return Times(tuple(layer_times))


def with_timing(experiment: Experiment, model: Model, given: Table | None, expected: Forecast) -> Forecast:
    """A forecast with the stages in which layers are timed: for a table, unless it is `given`; at the end before and
    after pruning, on the table's own device. The model cannot be streamed."""
    sparsity = experiment.sparsity
    if sparsity.of != "latency":
        return expected
    expected = replace(expected, streamed=())
    if given is not None and of_another_device(given, conditions_of(model, sparsity)):
        return expected
    process = expected.held[-1].parts.get("process", 0)
    first, last = timing_stages(expected.shape, expected.bytes_left, process, sparsity)
    return replace(expected, held=[*([first] if given is None else []), *expected.held, last])


def timing_of(experiment: Experiment, model: Model, given: Table | None) -> Timing | None:
    """The table that a run counts by, set in its model: the `given` one or a measured one, which is cached for a
    device, a model's shapes and the conditions asked for. None where no times are counted.

    Raises ConfigError where the search cannot remove so much, by what was measured, or where layers lie on several
    devices."""
    sparsity = experiment.sparsity
    if sparsity.of != "latency":
        return None
    here = conditions_of(model, sparsity)
    logger.info("latency: timed is %s (sparsity.phase, context, batch)", timed_pass(sparsity))
    if given is not None:
        tell_unsteady(given)
    if given is not None and (other := of_another_device(given, here)):
        logger.info("%s", other)
        model.times = given.times
        return Timing(given, None)
    if len(model.devices) > 1:
        raise ConfigError("sparsity.of='latency': the model's layers lie on several devices; expected one, or a table")
    work = Workload(sparsity.batch, sparsity.context, sparsity.phase, model)
    if given is None:
        given = _measured(experiment.cache, work, here, experiment.config["search"].get("multiple", 1))
    model.times = given.times
    check_pruning(model, experiment.search, sparsity, experiment.compensator)
    return Timing(given, work)


def _measured(cache: Cache | NoCache, work: Workload, here: Conditions, multiple: int) -> Table:
    """From the cache, where it was measured before and steady."""
    code = code_version("pruneexp.latency")
    key = {"what": "the latency table", **asdict(here), "multiple": multiple, "code": code}
    with cache.held([key]) as entries:
        times = entries.get(key)
        table = measure_table(work, here, multiple) if times is None else Table(here, times)
        if times is None and table.steady:
            entries.put(key, table.times)
    if times is not None:
        logger.info("latency: the table is from the cache, measured before on this device")
    tell_unsteady(table, measured=True)
    return table


def of_another_device(table: Table, here: Conditions) -> str | None:
    """What to say of a table that was measured on another device than `here`."""
    if same_device(table, here):
        return None
    of = table.conditions
    return (
        f"sparsity.table={table.source!r}: times of {of.device} ({of.threads} threads), this run is on {here.device} "
        f"({here.threads}); what is pruned is not measured"
    )


def tell_unsteady(table: Table, measured: bool = False) -> None:
    """`measured`: here and now, for this run alone."""
    if not table.steady:
        kept = f"; the cache does not keep this table, sparsity.table=<run>/{FILE} gives other runs the same prices"
        logger.warning(
            "latency: %d of %d times spread by more than a quarter of their median, perhaps something else was running"
            "%s; what would help: an idle machine, or sparsity.table with times of one",
            *(*table.unsteady(), kept if measured else ""),
        )


def timed_pass(sparsity: Sparsity) -> str:
    """What a table's times are of."""
    what = "one token behind" if sparsity.phase == "decode" else "a pass of"
    tokens, batch = sparsity.context, sparsity.batch
    return f"{what} {tokens} token{'s' * (tokens != 1)}, for {batch} sequence{'s' * (batch > 1)}"


def without_table(sparsity: Sparsity) -> str:
    """What a forecast says of a share of times that are not known yet."""
    return (
        f"to remove: {sparsity.ratio:.1%} of the decoder layers' milliseconds ({timed_pass(sparsity)}), measured when "
        "the run starts; here as if times went with parameters"
    )
