"""The walk that goes sublayer by sublayer, the dense model's hidden states beside the pruned one's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from pruneexp.calibrate.bookmark import Bookmark, Meter
from pruneexp.calibrate.dense_states import DenseStates
from pruneexp.calibrate.observe import Visit, Windows, check_finite, observe
from pruneexp.model import Call, Model
from pruneexp.model.sites import site_parts
from pruneexp.types import Block, ConfigError, Cost, Site

KEPT_BYTES = 2**28  # of out-projections' inputs, held until the sublayer has been shrunk, rather than made once more

Collect = Callable[[Tensor], Any]


def walk_sites(
    model: Model,
    tokens_NT: Tensor,
    kind: type,
    kinds: Sequence[type],
    bookmark: Bookmark,
    dense_states: DenseStates | None = None,
) -> Iterator[tuple[Visit, Site | None, Collect]]:
    """Goes sublayer by sublayer, the dense model's hidden states beside the pruned one's, and yields each site with
    what collects its evidence of type `kind` (source "wanted"): to be called with the channels that the caller leaves
    the out-projection, before the walk goes on, or not at all. For kinds with `of(site, keep_C)` the others may have
    left already, so that nothing need be run for them; kinds without are of everything. Layers without sites come, too.

    Evidence is of the out-projection's input, the sublayers before it as the caller left them, and of the output with
    which the hidden state behind it would be the dense model's. With d in front of the layer and d' behind it in the
    dense model, x in front of it in the pruned one, a() what attention's out-projection gives, and r what outputs are
    multiplied by before they are added, that output is a(d) + (d - x) / r for attention, (d' - x) / r - a(x) for FFNs.

    The layer's visits hold its evidence of `kinds` on the pruned model's hidden states, as in `walk`, and the first one
    its weights, before anything left it. `bookmark` as there. Runs the dense layers and the pruned ones, these last
    from the inputs of their out-projections that were kept: two plain passes; what is beyond `KEPT_BYTES` of a site's
    inputs is made once more, less than one pass in all (`passes_of_layer`). One more with `kinds`. Holds three times
    the hidden states, N x D each, beside them, and once more in the first layer. `dense_states`: of a walk over the
    same model and windows, which run through no dense layer again; the meter is charged for them as if they did.

    Raises:
        ConfigError: as `require_sums`.
        RunError: NaN or Inf in weights or activations.
    """
    require_sums(model)
    total, meter = len(model.layers), bookmark.meter
    windows = Windows.entering(model, tokens_NT) if bookmark.index < total else Windows([], [])
    dense, windows.hidden = bookmark.take_hidden(model.device) or (windows.hidden, list(windows.hidden))
    for index in bookmark.layers(total):
        with model.loaded(index, index + 1) as layer:
            block, device = model.block(index), model.layer_device(index)
            dense, windows.hidden = ([x_BTD.to(device) for x_BTD in each] for each in (dense, windows.hidden))
            bare = Visit(index, layer, Block(block.name, index, block.sites, {}))
            bare = replace(bare, evidence=observe(model, bare, windows, kinds, windows.unknown()) if kinds else {})
            visit, sites = replace(bare, block=block), {site.kind: site for site in block.sites}
            cost = model.whole_block(index).sites[0].cost
            shares = sublayer_shares(cost, block.sites, model.config.hidden_size, tokens_NT.shape[1])
            parts = _Parts(model, bare, windows, meter, shares)
            given, known = parts.dense_(dense, dense_states or DenseStates(0))
            if not sites:
                yield visit, None, _nothing
            if "attention" in sites:
                yield visit, sites["attention"], partial(parts.evidence, kind, sites["attention"], given, None, known)
                visit = bare
            del known, block  # views of weights, which leave
            parts.attention_(given)
            if "mlp" in sites:
                wanted = ((d - x) / parts.scale - a for d, x, a in zip(dense, windows.hidden, given, strict=True))
                yield visit, sites["mlp"], partial(parts.evidence, kind, sites["mlp"], wanted, given, [])
                del wanted
            if index + 1 < total:
                parts.on_(given)
            meter.forward += (1 + bool(kinds)) / total
            del visit, bare, parts, given  # views of weights, before the next layer's come
        bookmark.reached(index + 1, total, (dense, windows.hidden))


def _nothing(_keep_C: Tensor) -> None:
    """The evidence of a layer without sites."""


def sublayer_shares(
    layer: Cost, sites: Sequence[Site], hidden_size: int, length: int
) -> dict[str, tuple[float, float]]:
    """What attention and FFN take of a plain run of their layer, by multiply-accumulates in windows of `length` tokens:
    up to the out-projection's input, and whole."""
    macs = max(1, layer.macs + length * layer.context_macs)
    ffn = sum(site.units * site.cost.macs for site in sites if site.kind == "mlp") / macs
    out_projections = {site.kind: site.channels * hidden_size / macs for site in sites}
    whole = {"attention": 1 - ffn, "mlp": ffn}
    return {kind: (share - out_projections.get(kind, 0.0), share) for kind, share in whole.items()}


def passes_of_layer(
    layer: Cost,
    sites: Sequence[Site],
    hidden_size: int,
    length: int,
    kept: Callable[[Site], float],
    *,
    first: bool,
    last: bool,
) -> float:
    """What `walk_sites` takes for a layer of which all evidence is collected, in plain runs of it: the dense one, each
    sublayer up to its out-projection (in the `first` layer attention's comes with the dense one), and the rest of the
    pruned one (of the `last` layer without its FFN), from the out-projection on where inputs were `kept` (a share of
    the windows, by site)."""
    shares = sublayer_shares(layer, sites, hidden_size, length)
    runs = 1 + sum(shares[site.kind][0] for site in sites if not (first and site.kind == "attention"))
    held = {site.kind: kept(site) for site in sites}
    for kind in ("attention",) if last else ("attention", "mlp"):
        before, whole = shares[kind]
        runs += whole - held.get(kind, 0.0) * before
    return runs


def require_sums(model: Model) -> None:
    """Raises ConfigError for normalisation behind the sublayers and for mixtures of experts, where hidden states are no
    plain sums of what out-projections give."""
    if model.mixture:
        raise ConfigError(
            "compensator.target='dense': a mixture of experts, whose router weighs out-projections' outputs; expected "
            "compensator.target=pruned"
        )
    if not model.family.adds_up:
        raise ConfigError(
            "compensator.target='dense': this model normalises behind its sublayers; expected compensator.target=pruned"
        )


class _Reached(Exception):
    """Ends a layer's run where nothing behind is wanted."""


@dataclass(frozen=True)
class _Parts:
    """A decoder layer that is run in parts: up to an out-projection, and from what attention's out-projection gives to
    the end."""

    model: Model
    visit: Visit
    windows: Windows  # as the pruned layers before it leave them
    meter: Meter
    shares: dict[str, tuple[float, float]]  # as `sublayer_shares` has them
    inputs: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # of shrunk out-projections, by kind and batch

    @property
    def scale(self) -> float:
        """What a sublayer's output is multiplied by before it is added."""
        named = self.model.family.residual_scale
        return 1.0 if named is None else getattr(self.model.config, named)

    def dense_(self, dense: list[Tensor], states: DenseStates) -> tuple[list[Tensor], list[Tensor]]:
        """Puts the dense hidden states behind the layer into `dense`; returns what is wanted of attention's
        out-projection, and of the first layer what this out-projection gets, there also in the pruned model."""
        wanted, read, index = [], [], self.visit.index
        known, keeps = states.layers.get(index), states.keeps(self.model, index, dense)
        for number, (d_BTD, x_BTD) in enumerate(zip(dense, self.windows.hidden, strict=True)):
            if known is None:
                got_BTC, given_BTD = self._part(d_BTD, number, self.model.family.attention_out, True)
                given_BTD = given_BTD.view_as(d_BTD)
                dense[number] = self._on(d_BTD, number, given_BTD)
                read += [(got_BTC, given_BTD)] if keeps or index == 0 else []
            else:
                given_BTD, dense[number] = (t.to(d_BTD.device) for t in known[number])  # from another job's GPU
            wanted.append(given_BTD + (d_BTD - x_BTD) / self.scale)
        if keeps:
            states.put(index, read, dense)
        first = [got for got, _ in read] if known is None else [got.to(wanted[0].device) for got in states.entered]
        return wanted, first if index == 0 else []

    def attention_(self, given: list[Tensor]) -> None:
        """Puts into `given` what attention's out-projection gives."""
        for number, x_BTD in enumerate(self.windows.hidden):
            kept_BTK = self._kept("attention", number)
            if kept_BTK is None:
                given[number] = self._part(x_BTD, number, self.model.family.attention_out, True)[1].view_as(x_BTD)
            else:
                given[number] = self._read(self.model.family.attention_out, kept_BTK)

    def on_(self, given: list[Tensor]) -> None:
        """Runs the layer from what attention's out-projection gives to the end, in place."""
        hidden = self.windows.hidden
        for number, (x_BTD, given_BTD) in enumerate(zip(hidden, given, strict=True)):
            kept_BTK = self._kept("mlp", number)
            if kept_BTK is None:
                hidden[number] = self._on(x_BTD, number, given_BTD)
            else:
                added_BTD = self._read(self.model.family.mlp_out, kept_BTK)
                hidden[number] = x_BTD.add(given_BTD, alpha=self.scale).add_(added_BTD, alpha=self.scale)
                check_finite(hidden[number], self.visit.block, number)

    def _kept(self, kind: str, number: int) -> Tensor | None:
        """A batch's input of the shrunk out-projection, where it was kept; it is held no longer. Charges for the rest
        of the sublayer's run, or for all of it where nothing was kept."""
        kept_BTK = self.inputs.get(kind, {}).pop(number, None)
        before, whole = self.shares[kind]
        self._count(whole if kept_BTK is None else whole - before)
        return kept_BTK

    def evidence(
        self,
        kind: Any,
        site: Site,
        wanted: Iterable[Tensor],
        given: list[Tensor] | None,
        known: list[Tensor],
        keep_C: Tensor,
    ) -> Any:
        """Evidence of an out-projection's input, of the FFN's where attention's out-projection gives `given`, and of
        its wanted output. The input is `known` already, or the layer is run up to it. The channels `keep_C` are held
        for the run of the shrunk layer."""
        narrows, path = kind.of is not None, site_parts(self.model.family, site)[1]
        evidence = kind.of(site, keep_C) if narrows else kind.empty(site)
        held, inputs = 0, self.inputs.setdefault(site.kind, {})
        for number, (x_BTD, wanted_BTD) in enumerate(zip(self.windows.hidden, wanted, strict=True)):
            if narrows and not len(keep_C):
                input_BTC = x_BTD[..., :0]
            elif known:
                input_BTC = known[number]
            else:
                with nullcontext() if given is None else self._attention_gives(given[number]):
                    input_BTC = self._part(x_BTD, number, path, False)[0]
                input_BTC = input_BTC.view(*x_BTD.shape[:2], -1)  # OPT flattens windows in front of its FFN
                self._count(self.shares[site.kind][0])
            kept_BTK = input_BTC
            if input_BTC.shape[-1] != len(keep_C):
                kept_BTK = input_BTC.index_select(-1, keep_C.to(input_BTC.device))
            evidence = evidence.update_(kept_BTK if narrows else input_BTC, wanted_BTD)
            held += kept_BTK.nbytes
            if len(keep_C) and held <= KEPT_BYTES:  # a sublayer that loses all has no out-projection any more
                inputs[number] = kept_BTK
        return evidence

    def _read(self, path: str, kept_BTK: Tensor) -> Tensor:
        """What the out-projection at `path` gives, as the caller left it, for the inputs that it was left."""
        return self.model.run_layer(self.visit.layer.get_submodule(path), kept_BTK, Call((), {}))

    def _count(self, share: float) -> None:
        """Charges a share of a plain run of the layer for one batch."""
        self.meter.forward += share / len(self.windows.hidden) / len(self.model.layers)

    def _on(self, x_BTD: Tensor, number: int, given_BTD: Tensor) -> Tensor:
        with self._attention_gives(given_BTD):
            output_BTD = self.model.run_layer(self.visit.layer, x_BTD, self.windows.calls[number][self.visit.index])
        check_finite(output_BTD, self.visit.block, number)
        return output_BTD

    def _part(self, x_BTD: Tensor, number: int, path: str, through: bool) -> list[Tensor]:
        """What the module at `path` gets, and what it gives if the layer is run `through` it, but no further."""
        seen: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Tensor, ...], *output: Tensor) -> None:
            seen.extend((args[0], *output))
            raise _Reached

        module = self.visit.layer.get_submodule(path)
        register = module.register_forward_hook if through else module.register_forward_pre_hook
        with register(stop), suppress(_Reached):
            self.model.run_layer(self.visit.layer, x_BTD, self.windows.calls[number][self.visit.index])
        return seen

    @contextmanager
    def _attention_gives(self, given_BTD: Tensor) -> Iterator[None]:
        """In the place of attention, what its out-projection has given; the norm in front of it is left out."""
        family, layer = self.model.family, self.visit.layer

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            residual = (args[0] if args else kwargs["residual"]) if family.adds_residual else None
            return given_BTD if residual is None else given_BTD + residual, None

        attention: Any = layer.get_submodule(family.attention)
        replaced: list[tuple[Any, Callable]] = [(attention, forward)]
        if family.attention_norm not in (None, family.mlp_norm):
            norm: Any = layer.get_submodule(family.attention_norm)
            replaced.append((norm, lambda hidden_states: hidden_states))
        for module, own in replaced:
            module.forward = own
        try:
            yield
        finally:
            for module, _ in replaced:
                del module.forward
