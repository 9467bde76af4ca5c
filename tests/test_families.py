"""Every family, whatever leaves it: masked, shrunk, saved and reloaded, it is the same model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pruneexp.calibrate import Bookmark, Meter, site_walk, walk, walk_sites
from pruneexp.compensator import Bias, LeastSquares, NoCompensation
from pruneexp.evidence import Gram, Moments, WantedOutput
from pruneexp.model import Model, modeling_pruned, next_token_losses
from pruneexp.model.modeling_pruned import FAMILIES
from pruneexp.surgery import save, shrink_, shrink_layer_
from pruneexp.surgery.forms import stock_class
from pruneexp.types import ConfigError, Plan, SitePlan
from tests.cases import each
from tests.conftest import FAMILIES as IN_CONFTEST
from tests.masking import masked
from tests.tiny_families import TINY, is_mixture, model_type_of, of_every_family, others, says_heads, tiny_model

pytestmark = pytest.mark.usefixtures("modules_cache")

COMPENSATORS = {
    "none": NoCompensation(False),
    "bias": Bias(False),
    "least_squares": LeastSquares(1e-3, "pruned", False, "site"),
}
GRANULARITIES = ("heads", "channels", "sublayer", "block")
ONE_OF_EACH = of_every_family(conftests=False)  # OPT and BLOOM have their tests with conftest's models
MIXTURES = tuple(filter(is_mixture, ONE_OF_EACH))
FEW = ("gpt2", "gemma3", "mixtral")  # as unlike each other as can be: the quick tests have these alone
FEW_FIRST = [pytest.param(name, marks=[] if name in FEW else [pytest.mark.slow]) for name in TINY]
Made = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny_model(name).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="module")
def loaded(folder: Callable[[str], Path]) -> Made:
    """A model of a family; held ones are copies of one that is loaded once."""
    from pruneexp.model import ModelSource

    made: dict[str, Model] = {}

    def load(name: str, path: Path | None = None, stream: bool = False) -> Model:
        path_ = str(path or folder(name))
        source = ModelSource(name, path_, None, "float64", "cpu", stream, False, 4)
        if stream or path is not None:
            return source.load()
        if name not in made:
            made[name] = source.load()
        return deepcopy(made[name])

    return load


@pytest.fixture(scope="module")
def evidence(loaded: Made, tokens_NT: torch.Tensor) -> Callable[[str], dict[str, Any]]:
    """What the compensators ask for, of the dense model: compensator -> site name -> evidence."""
    made: dict[str, dict[str, Any]] = {}

    def collect(name: str) -> dict[str, Any]:
        if name not in made:
            by_compensator: dict[str, Any] = {"none": {}, "bias": {}, "least_squares": {}}
            for visit in walk(loaded(name), tokens_NT, (Moments, Gram), Bookmark(Meter(), "test"), read_only=True):
                by_compensator["bias"].update(visit.of(Moments))
                by_compensator["least_squares"].update(visit.of(Gram))
            made[name] = by_compensator
        return made[name]

    return collect


@pytest.fixture(scope="module")
def tokens_NT() -> torch.Tensor:
    return torch.randint(3, 64, (6, 20), generator=torch.Generator().manual_seed(1))


def plan_for(model: Model, granularity: str) -> Plan:
    """Uneven heads or channels; both sublayers of layer 0 and the attention of layer 1 emptied; layer 0 removed; whole
    experts gone, of layer 0 all that can."""
    if granularity == "block":
        return Plan({f"{model.layers_path}.0": SitePlan("block", 1, ())})
    if granularity == "experts":
        experts = [site for index in range(len(model.layers)) for site in model.whole_experts(index)]
        kept = [tuple(range(site.units))[-2 - site.layer :] for site in experts]
        return Plan({s.name: SitePlan(s.kind, s.units, own) for s, own in zip(experts, kept, strict=True)})
    rng, sites = torch.Generator().manual_seed(3), {}
    for site in model.sites():
        kept = torch.randperm(site.units, generator=rng)[: max(1, site.units - 1 - site.layer)].sort().values.tolist()
        if granularity == "sublayer" and (site.layer == 0 or (site.layer == 1 and site.kind == "attention")):
            sites[site.name] = SitePlan(site.kind, site.units, ())
        elif {"heads": "attention", "channels": "mlp"}.get(granularity) == site.kind:
            sites[site.name] = SitePlan(site.kind, site.units, tuple(kept))
    return Plan(sites)


def out_projections_for(model: Model, plan: Plan, compensator: Any, evidence: dict[str, Any]) -> dict[str, Any]:
    out_projections = {}
    for index in range(len(model.layers)):
        block = model.block(index)
        for site in block.sites:
            if plan.removed(site):
                weights, keep_C = block.weights[site.name], site.keep_C(plan.sites[site.name].kept)
                site_evidence = evidence.get(site.name)
                out_projections[site.name] = compensator(
                    weights.out_projection, weights.out_projection_bias, site_evidence, keep_C
                )
    return out_projections


@torch.no_grad()
def logits(module: Any, tokens_NT: torch.Tensor) -> torch.Tensor:
    return module(tokens_NT, use_cache=False).logits


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Norms in the stock code compute in float32: one rounding to the other side there is 1e-7 here."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def reload(path: Path) -> Any:
    """As any user would, with transformers alone."""
    from transformers import AutoModelForCausalLM

    remote = "auto_map" in json.loads((path / "config.json").read_text())
    eager = {"experts_implementation": "eager"}  # fused experts know no float64
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=remote, dtype=torch.float64, **eager).eval()


def test_every_family_has_a_tiny_model() -> None:
    without = set(FAMILIES) - {model_type_of(name) for name in (*TINY, *IN_CONFTEST)}
    assert not without, f"no test tries {sorted(without)}: expected a tiny config of each in tests/tiny_families.py"


@pytest.mark.slow
@each("name", TINY)
def test_it_loads_as_transformers_loads_it(
    name: str, loaded: Made, folder: Callable[[str], Path], tokens_NT: torch.Tensor
) -> None:
    model, streamed = loaded(name), loaded(name, stream=True)
    assert torch.equal(logits(model.module, tokens_NT), logits(reload(folder(name)), tokens_NT))
    assert torch.equal(model.token_losses(tokens_NT, 4), streamed.token_losses(tokens_NT, 4))
    if model.module._supports_sdpa:
        sdpa = logits(model.module, tokens_NT)
        model.module.set_attn_implementation("eager")
        close(logits(model.module, tokens_NT), sdpa, 1e-4)  # a softmax in float32


@pytest.mark.slow
@each("name", TINY)
def test_its_weights_by_role_are_what_leaves(name: str, loaded: Made) -> None:
    model = loaded(name)
    plan, sites, before = plan_for(model, "heads"), model.sites(), model.decoder_params
    kv = model.kv_elements
    block = model.block(1)
    for site in block.sites:
        weights = block.weights[site.name]
        assert {len(w) for w in weights.in_projections.values()} == {site.units}
        assert weights.out_projection.shape[1] == site.channels
        matrices = sum(w.numel() for w in weights.in_projections.values()) + weights.out_projection.numel()
        share = 2 / 4 if site.expert is not None else 1  # of the tokens come by an expert
        assert matrices * share == site.units * site.cost.macs
        own = {p.untyped_storage().data_ptr() for p in model.layers[1].parameters()}
        assert all(
            w.untyped_storage().data_ptr() in own for w in (*weights.in_projections.values(), weights.out_projection)
        )
    shrink_(model, plan)
    assert before - model.decoder_params == sum(plan.removed(site) * site.cost.params for site in sites)
    assert kv - model.kv_elements == sum(plan.removed(site) * site.cost.kv for site in sites)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW_FIRST)
@each("granularity", [*GRANULARITIES, "experts"])
def test_masked_is_shrunk_is_saved(
    name: str,
    granularity: str,
    loaded: Made,
    evidence: Callable[[str], dict[str, Any]],
    tokens_NT: torch.Tensor,
    tmp_path: Path,
) -> None:
    if granularity == "experts" and name not in MIXTURES:
        return  # it has none
    for compensator, method in COMPENSATORS.items():
        if granularity in ("block", "experts") and compensator != "none":
            continue  # nothing is left to compensate
        model = loaded(name)
        dense, plan = logits(model.module, tokens_NT), plan_for(model, granularity)
        out_projections = out_projections_for(model, plan, method, evidence(name)[compensator])
        with masked(model, plan, out_projections if compensator != "none" else {}):
            expected = logits(model.module, tokens_NT)
        assert torch.equal(logits(model.module, tokens_NT), dense), "masking left something behind"
        assert not torch.allclose(expected, dense, atol=1e-3), "the plan changes nothing: the comparison would be empty"
        shrink_(model, plan, out_projections)
        shrunk = logits(model.module, tokens_NT)
        close(shrunk, expected)
        form = save(model, tmp_path / compensator)
        assert form.kind == ("stock" if granularity == "block" else "remote_code")
        again = reload(tmp_path / compensator)
        close(logits(again, tokens_NT), shrunk)
        for module in (model.module, again):
            assert not [path for path, p in module.named_parameters() if p.numel() == 0]
            linears = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
            assert not [m for m in linears if 0 in (m.in_features, m.out_features)]
        parameters = sum(p.numel() for p in model.module.parameters())
        assert sum(p.numel() for p in again.parameters()) == parameters
        if compensator == "bias" or granularity in ("block", "experts"):
            generates_the_same(again, tokens_NT)
            streamed = loaded(name, tmp_path / compensator, stream=True)
            close(streamed.token_losses(tokens_NT, 6), next_token_losses(shrunk, tokens_NT))
            if again._supports_sdpa:
                again.set_attn_implementation("eager")
                close(logits(again, tokens_NT), shrunk, 1e-4)  # a softmax in float32


def generates_the_same(module: Any, tokens_NT: torch.Tensor) -> None:
    """Without a cache, with one that grows, and with one of fixed size; longer than the sliding windows."""
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = tokens_NT[:2, :7]
    with torch.no_grad():
        plain = module.generate(prompt, use_cache=False, **options)
        caches = ["dynamic"] if getattr(module.config, "alibi", False) else ["dynamic", "static"]
        for cache in caches:  # stock Falcon's slopes do not fit a cache of fixed size
            cached = module.generate(prompt, cache_implementation=cache, **options)
            assert torch.equal(plain, cached), cache


@pytest.mark.parametrize(
    ("name", "removed", "left"),
    [
        ("gemma3", (0, 2), ["full_attention"]),  # no sliding layer keeps its attention
        ("gemma2", (1,), ["sliding_attention"]),
        ("qwen2_sliding", (0,), ["sliding_attention"]),
        ("smollm3", (1,), ["full_attention"]),
        ("exaone4", (1,), ["sliding_attention"]),
        ("cohere2", (0, 2), ["full_attention"]),
        ("olmo3", (0, 2), ["full_attention"]),
    ],
)
def test_caches_of_each_kind_have_no_gaps(
    name: str, removed: tuple[int, ...], left: list[str], loaded: Made, tokens_NT: torch.Tensor, tmp_path: Path
) -> None:
    model = loaded(name)
    gone = {
        s.name: SitePlan(s.kind, s.units, ()) for s in model.sites() if s.kind == "attention" and s.layer in removed
    }
    with masked(model, Plan(gone)):
        expected = logits(model.module, tokens_NT)
    shrink_(model, Plan(gone))
    close(logits(model.module, tokens_NT), expected)
    save(model, tmp_path / "model")
    again = reload(tmp_path / "model")
    assert sorted(set(again.config.layer_types)) == left
    close(logits(again, tokens_NT), expected)
    for module in (model.module, again):
        generates_the_same(module, tokens_NT)


def stock_takes_heads(model: Model) -> bool:
    """Whether the stock class makes the attention of a pruned model, all layers alike, where its config says so: found
    without the table of `pruneexp.surgery.stock_widths`."""
    own = model.structures[0]
    heads = {name: getattr(own, name) for name in ("num_attention_heads", "num_key_value_heads")}
    values = {**model.config.to_dict(), **heads, "head_dim": modeling_pruned.head_size(model.config)}
    try:
        with torch.device("meta"):
            stock = stock_class(model.config.model_type)._from_config(type(model.config)(**values))
    except Exception:  # each config class checks itself in its own way
        return False
    layers = (stock.base_model.get_submodule(model.family.layers)[0], model.layers[0])
    one, other = (
        [(path, p.shape) for path, p in layer.get_submodule(model.family.attention).named_parameters()]
        for layer in layers
    )
    return one == other


@pytest.mark.parametrize("name", FEW_FIRST)
@each("kind", ["attention", "mlp"])
def test_one_width_in_all_layers_is_stock_where_the_class_can_say_it(
    name: str, kind: str, loaded: Made, tokens_NT: torch.Tensor, tmp_path: Path
) -> None:
    model = loaded(name)
    counts = {3: 2, 6: 4, 24: 16}  # heads that divide the hidden size; of one key/value head, four query heads
    sites = [site for site in model.sites() if site.kind == kind]
    shrink_(model, Plan({s.name: SitePlan(kind, s.units, tuple(range(counts[s.units]))) for s in sites}))
    form = save(model, tmp_path / "model")
    expected = "stock" if kind == "mlp" or stock_takes_heads(model) else "remote_code"
    assert form.kind == expected
    if kind == "attention":
        assert says_heads(name) == (expected == "stock"), f"{name}: pruneexp/surgery/stock_widths.py"
    assert bool(list((tmp_path / "model").glob("*.py"))) == (expected == "remote_code")
    again = loaded(name, tmp_path / "model")  # with our own loader
    close(logits(again.module, tokens_NT), logits(model.module, tokens_NT))
    close(logits(reload(tmp_path / "model"), tokens_NT), logits(model.module, tokens_NT))


TWICE = ["qwen3", "gemma_multi_query", "phi3", "gpt2", "falcon_7b", "olmo2", "stablelm_2_12b", *MIXTURES]


@pytest.mark.parametrize("name", TWICE)
def test_pruned_twice_is_pruned_once(name: str, loaded: Made, tokens_NT: torch.Tensor, tmp_path: Path) -> None:
    pruned_twice_is_pruned_once(name, loaded, tokens_NT, tmp_path)


@pytest.mark.slow
@each("name", others(ONE_OF_EACH, TWICE))
def test_pruned_twice_is_pruned_once_in_every_other_family(
    name: str, loaded: Made, tokens_NT: torch.Tensor, tmp_path: Path
) -> None:
    pruned_twice_is_pruned_once(name, loaded, tokens_NT, tmp_path)


def pruned_twice_is_pruned_once(name: str, loaded: Made, tokens_NT: torch.Tensor, tmp_path: Path) -> None:
    once, twice = loaded(name), loaded(name)
    sites = once.sites()
    shrink_(once, Plan({s.name: SitePlan(s.kind, s.units, tuple(range(1, s.units, 2))) for s in sites}))
    shrink_(twice, Plan({s.name: SitePlan(s.kind, s.units, tuple(range(1, s.units))) for s in sites if s.layer}))
    save(twice, tmp_path / "model")
    again = loaded(name, tmp_path / "model")
    rest = {}
    for site in again.sites():
        kept = range(0, site.units, 2) if site.layer else range(1, site.units, 2)
        rest[site.name] = SitePlan(site.kind, site.units, tuple(kept))
    shrink_(again, Plan(rest))
    close(logits(again.module, tokens_NT), logits(once.module, tokens_NT))


SUMS = ["granite", "pythia", "stablelm_2_12b", "falcon_7b", "falcon_40b", "phi3"]  # side by side, or scaled


@pytest.mark.parametrize("name", SUMS)
def test_site_by_site_an_untouched_model_wants_what_its_readers_give(
    name: str, loaded: Made, tokens_NT: torch.Tensor
) -> None:
    untouched_it_wants_what_its_readers_give(name, loaded, tokens_NT)


def untouched_it_wants_what_its_readers_give(name: str, loaded: Made, tokens_NT: torch.Tensor) -> None:
    model = loaded(name)
    for visit, site, collect in walk_sites(model, tokens_NT, WantedOutput, (), Bookmark(Meter(), "test")):
        seen = collect(torch.arange(site.channels))
        weights = model.block(visit.index).weights[site.name]
        given = (
            seen.inputs.covariance_CC @ weights.out_projection.T
        )  # covariance of the inputs and what the reader gives
        torch.testing.assert_close(seen.copy().covariance_(), given, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SUMS)
def test_site_by_site_layers_run_on_from_what_their_readers_were_left(
    name: str, loaded: Made, tokens_NT: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers_run_on_from_what_their_readers_were_left(name, loaded, tokens_NT, monkeypatch)


@pytest.mark.slow
@each("name", others(of_every_family(lambda family: family.adds_up and not family.experts, conftests=False), SUMS))
def test_site_by_site_in_every_other_family_that_adds_up(
    name: str, loaded: Made, tokens_NT: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched_it_wants_what_its_readers_give(name, loaded, tokens_NT)
    layers_run_on_from_what_their_readers_were_left(name, loaded, tokens_NT, monkeypatch)


def layers_run_on_from_what_their_readers_were_left(
    name: str, loaded: Made, tokens_NT: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    means = []
    for kept in (site_walk.KEPT_BYTES, 0):
        monkeypatch.setattr(site_walk, "KEPT_BYTES", kept)
        model, seen = loaded(name), {}
        for visit, site, collect in walk_sites(model, tokens_NT, WantedOutput, (), Bookmark(Meter(), "test")):
            half = tuple(range(0, site.units, 2))
            seen[site.name] = collect(site.keep_C(half)).wanted_mean_O
            shrink_layer_(model, visit.index, Plan({site.name: SitePlan(site.kind, site.units, half)}))
        means.append(seen)
    for name, wanted_O in means[0].items():
        torch.testing.assert_close(wanted_O, means[1][name], rtol=1e-9, atol=1e-9)


@each("name", of_every_family(lambda family: not family.adds_up, conftests=False))
def test_site_by_site_needs_sums(name: str, loaded: Made, tokens_NT: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="compensator.target='dense'"):
        next(iter(walk_sites(loaded(name), tokens_NT, WantedOutput, (), Bookmark(Meter(), "test"))))


def test_norms_in_front_as_they_scale(loaded: Made) -> None:
    gemma, olmo, parallel = loaded("gemma2"), loaded("olmo2"), loaded("stablelm_2_12b")
    norms = gemma.block(1).norms["model.layers.1.mlp"]
    assert torch.equal(norms, 1 + gemma.layers[1].pre_feedforward_layernorm.weight)
    assert olmo.block(1).norms == {}
    both = parallel.block(1).norms
    assert torch.equal(both["model.layers.1.self_attn"], both["model.layers.1.mlp"])


def test_a_class_that_this_transformers_lacks(
    loaded: Made, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = replace(modeling_pruned.SMOLLM3, stock="SmolLM9", since="9.0")
    monkeypatch.setitem(modeling_pruned.FAMILIES, "smollm3", family)
    with pytest.raises(ConfigError, match=r"needs SmolLM9ForCausalLM of transformers >= 9\.0; 5\.\S+ is installed"):
        loaded("smollm3", folder("smollm3"))


@each("name, key, value", [(n, *wrong) for n in ONE_OF_EACH for wrong in FAMILIES[model_type_of(n)].impossible])
def test_a_variant_that_no_table_covers(
    name: str, key: str, value: Any, loaded: Made, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(folder(name), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ConfigError, match=f"{model_type_of(name)} model with {key}={value} is not supported"):
        loaded(name, tmp_path / "model")


def test_names_of_older_checkpoints(
    loaded: Made, folder: Callable[[str], Path], tokens_NT: torch.Tensor, tmp_path: Path
) -> None:
    """GPT-2's lacks the base model's prefix and holds its causal mask; GPT-NeoX calls its head otherwise."""
    shutil.copytree(folder("gpt2"), tmp_path / "gpt2")
    tensors = load_file(tmp_path / "gpt2" / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 64, 64)}, tmp_path / "gpt2" / "model.safetensors")
    again = loaded("gpt2", tmp_path / "gpt2")
    assert torch.equal(logits(again.module, tokens_NT), logits(loaded("gpt2").module, tokens_NT))
    assert "embed_out.weight" in load_file(folder("pythia") / "model.safetensors")


def test_query_heads_leave_as_whole_groups(loaded: Made) -> None:
    """Layers may differ in their number of groups, never in how many query heads share a key/value head."""
    model = loaded("qwen3")
    layout = modeling_pruned.head_layout(model.family, model.config)
    assert (layout.group, layout.key_value_heads(4)) == (2, 2)
    with pytest.raises(AssertionError, match="leave together"):
        layout.key_value_heads(3)


@pytest.mark.parametrize("name", ["gemma_multi_query", "falcon_7b"])
def test_a_shared_key_value_head_stays_while_any_head_does(name: str, loaded: Made) -> None:
    model = loaded(name)
    site = model.layer_sites(0)[0]
    assert site.units == 6 and site.cost.kv == 0
    assert model.whole_block(0).sites[0].cost.kv == 2 * site.width
    assert list(model.block(0).weights[site.name].in_projections) == ["query"]
    before = model.kv_elements
    shrink_(model, Plan({site.name: SitePlan("attention", 6, (4,))}))
    assert model.kv_elements == before
    shrink_(model, Plan({site.name: SitePlan("attention", 1, ())}))
    assert model.kv_elements == before - 2 * site.width


@each("name", TINY)
def test_the_ffn_reads_what_attention_has_added_unless_they_stand_side_by_side(name: str, loaded: Made) -> None:
    model, seen = loaded(name), []
    site = model.layer_sites(0)[0]
    module = model.layers[0].get_submodule(model.family.mlp)
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    for plan in (Plan({}), Plan({site.name: SitePlan(site.kind, site.units, ())})):
        with masked(model, plan), torch.no_grad():
            model.module(torch.arange(3, 19)[None])
    hook.remove()
    assert torch.equal(*seen) == model.block(0).side_by_side == model.family.side_by_side


@each("name", TINY)
def test_norms_add_the_tables_offset_to_their_weights(name: str, loaded: Made) -> None:
    """Where the weight is minus the offset, a norm gives its bias alone."""
    model = loaded(name)
    family, layer = model.family, model.layers[1]
    paths = {family.attention_norm, family.mlp_norm, family.attention_post_norm, family.mlp_post_norm}
    for path in (paths | {norm.path for norm in family.head_norms}) - {None}:
        norm = layer.get_submodule(path)
        for part in getattr(norm, "norms", [norm]):
            if (weight := getattr(part, "weight", None)) is None:
                continue  # OLMo's
            weight.data.fill_(-family.norm_offset)
            bias = getattr(part, "bias", None)
            given = part(torch.randn(2, len(weight), dtype=torch.float64))
            assert torch.equal(given, torch.zeros_like(given) + (0 if bias is None else bias)), path


@each("name", TINY)
def test_norms_and_sums_are_where_the_table_says(name: str, loaded: Made, tokens_NT: torch.Tensor) -> None:
    model, read, given = loaded(name), {}, {}
    family, layer = model.family, model.layers[1]

    def seen(path: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            read[path] = (args[0] if args else kwargs["hidden_states"]).clone()
            given[path] = (output[0] if isinstance(output, tuple) else output).clone()  # Falcon adds to it in place

        return hook

    def equal(path: str, seen_there: dict[str, torch.Tensor], tensor: torch.Tensor) -> list[str]:
        """The path, where a norm is there that has read or given just this tensor."""
        return [path] if path in seen_there and torch.equal(seen_there[path], tensor) else []

    for path, module in layer.named_modules():
        module.register_forward_hook(seen(path), with_kwargs=True)
    logits(model.module, tokens_NT)
    norms = [path for path, module in layer.named_modules() if "norm" in type(module).__name__.lower()]
    mixed = modeling_pruned.experts_of(layer, family) is not None
    readers = (family.attention_in[0].path, family.mlp if mixed else family.mlp_in[0].path)
    for named, reader in zip((family.attention_norm, family.mlp_norm), readers, strict=True):
        assert sum((equal(path, given, read[reader]) for path in norms), []) == [named] * (named is not None)
    behind = [(family.attention_post_norm, family.attention_out), (family.mlp_post_norm, family.mlp_out)]
    for named, out_projection in behind[: 1 if mixed else 2]:
        assert sum((equal(path, read, given[out_projection]) for path in norms), []) == [named] * (named is not None)
    if not mixed:
        scale = 1.0 if family.residual_scale is None else getattr(model.config, family.residual_scale)
        sums = read[""] + scale * (given[family.attention_out] + given[family.mlp_out])
        assert torch.allclose(given[""], sums, rtol=1e-9, atol=1e-9) == family.adds_up


@each("name", TINY)
def test_positions_have_an_end_where_they_are_looked_up(name: str, loaded: Made) -> None:
    model = loaded(name)
    beyond_NT = torch.arange(model.config.max_position_embeddings + 1)[None] % 61 + 3
    with pytest.raises(IndexError) if model.family.learned_positions else nullcontext():
        logits(model.module, beyond_NT)
