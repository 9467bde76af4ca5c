import io
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

from pruneexp.experiment.summary_table import print_summary, summary
from pruneexp.tracker.structure import removed_share, structure_figure, widths
from pruneexp.types import Cost, Plan, Site, SitePlan

METRICS = {
    "dense/params": 1000,
    "pruned/params": 800,
    "sparsity/decoder": 0.25,
    "dense/ppl/wikitext2@2048": 5.0,
    "pruned/ppl/wikitext2@2048": 6.0,
    "pruned/ppl/ptb@2048": 9.0,
    "dense/acc/arc_easy@0shot": 0.75,
    "pruned/acc/arc_easy@0shot": 0.7,
    "dense/latency/prefill_ms": 40.0,
    "pruned/latency/prefill_ms": 30.0,
    "dense/kv_bytes/token": 4096,
    "pruned/kv_bytes/token": 2048,
    "memory/peak_bytes": 3 * 2**30,
    "passes/forward": 1.5,
    "seconds/calibrate": 12.25,
    "dense/surprise": 0.0,
    "pruned/surprise": 1.0,
}


def sites(layers: int, heads: int = 4, channels: int = 10) -> list[Site]:
    decoder_sites = []
    for layer in range(layers):
        decoder_sites.append(Site(f"model.layers.{layer}.self_attn", "attention", layer, heads, 2, Cost(10, 10, 4)))
        decoder_sites.append(Site(f"model.layers.{layer}.mlp", "mlp", layer, channels, 1, Cost(6, 6, 0)))
    return decoder_sites


def plan(**kept: tuple[str, int, int]) -> Plan:
    """attn0=("attention", units, kept) and so on."""
    names = {"attn": "self_attn", "mlp": "mlp"}
    return Plan(
        {
            f"model.layers.{key[-1]}" + (f".{names[key[:-1]]}" if key[:-1] in names else ""): SitePlan(
                kind, units, tuple(range(k))
            )
            for key, (kind, units, k) in kept.items()
        }
    )


def rows(metrics, a_plan, some_sites) -> dict[tuple[str, str], tuple[str, str, str]]:
    return {(r.group, r.what): (r.dense, r.pruned, r.change) for r in summary(metrics, a_plan, some_sites)}


def test_widths_count_what_is_left_with_removed_blocks_and_unnamed_sites():
    by_kind = widths(plan(attn0=("attention", 4, 3), mlp1=("mlp", 10, 0), block2=("block", 1, 0)), sites(4))
    assert [(w.layer, w.kept, w.units, w.block_gone) for w in by_kind["attention"]] == [
        (0, 3, 4, False),
        (1, 4, 4, False),
        (2, 0, 4, True),
        (3, 4, 4, False),
    ]
    assert [w.kept for w in by_kind["mlp"]] == [10, 0, 0, 10]


def test_a_block_with_a_longer_number_is_another_block():
    by_kind = widths(plan(block1=("block", 1, 0)), sites(12))
    assert [w.layer for w in by_kind["mlp"] if w.block_gone] == [1]


def test_removed_share_weighs_units_by_their_parameters():
    assert removed_share(plan(attn0=("attention", 4, 2), mlp0=("mlp", 10, 5)), sites(1)) == pytest.approx(0.5)
    assert removed_share(plan(attn0=("attention", 4, 0)), sites(1)) == pytest.approx(0.4)
    assert removed_share(Plan.keep_all(sites(3)), sites(3)) == 0
    assert removed_share(Plan({}), []) == 0


def test_summary_says_what_was_removed():
    a_plan = plan(attn0=("attention", 4, 3), mlp1=("mlp", 10, 0), block2=("block", 1, 0))
    table = rows(METRICS, a_plan, sites(4))
    assert table["removed", "heads (KV groups)"] == ("16", "11", "-31.2 %")
    assert table["removed", "FFN channels"] == ("40", "20", "-50.0 %")
    assert table["removed", "FFN sublayers"] == ("4", "3", "-1")
    assert table["removed", "layers"] == ("4", "3", "-25.0 %")
    assert table["removed", "parameters"] == ("1,000", "800", "-20.0 %")
    assert table["removed", "decoder parameters"] == ("", "", "-25.0 %")
    assert ("removed", "attention sublayers") not in table


def test_summary_of_removed_layers_alone():
    blocks = [Site(f"model.layers.{i}", "block", i, 1, 1, Cost(100, 100, 1)) for i in range(5)]
    table = rows({}, plan(b3=("block", 1, 0), b1=("block", 1, 1)), blocks)
    assert table == {("removed", "layers"): ("5", "4", "-20.0 %")}


def test_summary_of_a_run_that_removed_nothing():
    table = rows({"sparsity/decoder": 0}, Plan.keep_all(sites(2)), sites(2))
    assert table["removed", "heads (KV groups)"] == ("8", "8", "+0.0 %")
    assert table["removed", "decoder parameters"] == ("", "", "+0.0 %")


def test_summary_sets_the_pruned_figure_beside_the_dense_one():
    table = rows(METRICS, plan(), sites(1))
    assert table["perplexity", "wikitext2@2048"] == ("5", "6", "x1.2")
    assert table["perplexity", "ptb@2048"] == ("", "9", "")
    assert table["accuracy", "acc/arc_easy@0shot"] == ("0.75", "0.7", "-5.0 points")
    assert table["speed", "latency/prefill_ms"] == ("40", "30", "x0.75")
    assert table["memory", "kv_bytes/token"] == ("4.00 KiB", "2.00 KiB", "x0.5")
    assert table["memory", "peak_bytes"] == ("", "3.00 GiB", "")
    assert table["passes", "forward"] == ("", "1.5", "")
    assert table["seconds", "calibrate"] == ("", "12.25", "")
    assert table["other", "surprise"] == ("0", "1", "")


def test_a_summary_in_a_file_has_no_escape_codes_and_whole_paths(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    (tmp_path / "model").mkdir()
    print_summary(METRICS, plan(), sites(1), tmp_path)
    text = capsys.readouterr().out
    assert "\x1b" not in text and "wikitext2@2048" in text and "x1.2" in text
    assert f"Everything is in {tmp_path}\n" in text and f"The pruned model is {tmp_path / 'model'}\n" in text


def test_a_summary_on_a_terminal_may_be_in_colour(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    print_summary(METRICS, plan(), sites(1), Path("outputs/x"))
    assert "\x1b[1m" in terminal.getvalue()


@pytest.mark.parametrize("layers", [1, 6, 80])
def test_structure_figure(tmp_path, layers):
    draw = random.Random(layers)
    kept = {s.name: SitePlan(s.kind, s.units, tuple(range(draw.randint(0, s.units)))) for s in sites(layers)}
    removed = {"model.layers.0": SitePlan("block", 1, ())}
    structure_figure(Plan({**kept, **removed}), sites(layers), tmp_path / "structure.png")
    assert (tmp_path / "structure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("some_sites", [[], [Site("model.layers.0", "block", 0, 1, 1, Cost(1, 1, 1))]])
def test_structure_figure_without_sublayers(tmp_path, some_sites):
    structure_figure(plan(), some_sites, tmp_path / "structure.png")
    assert (tmp_path / "structure.png").stat().st_size > 1000


def pixels(path: Path) -> Counter[tuple[int, int, int]]:
    from PIL import Image

    image = Image.open(path)
    return Counter({colour: count for count, colour in image.getcolors(image.width * image.height)})


def test_the_picture_shows_what_is_kept(tmp_path):
    """The share of the bars' area that is filled is the share of units kept."""
    path, kept, gone = tmp_path / "structure.png", (0x2F, 0x6F, 0x9F), (0xE9, 0xED, 0xF0)
    for half in (plan(attn0=("attention", 4, 2), mlp0=("mlp", 10, 5)), plan(attn0=("attention", 4, 0))):
        structure_figure(half, sites(1), path)
        counts = pixels(path)
        assert counts[kept] / (counts[kept] + counts[gone]) == pytest.approx(0.5, abs=0.02)
    structure_figure(Plan.keep_all(sites(1)), sites(1), path)
    assert not pixels(path)[gone]
