"""A GGUF file holds the pruned model: a second reading of llama.cpp's `deci` computes the same from the file alone, and
so does llama.cpp where llama-cpp-python is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneexp.export import gguf_file, gguf_layout, gguf_proof, gguf_run, main
from pruneexp.export.folders import stored_source
from pruneexp.export.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary
from pruneexp.model import ModelSource
from pruneexp.surgery import save
from tests.llama_like import MODELS, Kept, fewer_query_heads, model_logits, pruned_folder
from tests.tiny_families import random_model, tiny_model

gguf = pytest.importorskip("gguf")

NO_FIRST_ATTENTION = ((0, 5), (2, 0), (1, 7))
NO_LAST_FFN = ((1, 7), (0, 0), (2, 0))


def deci_logits(file: Path, tokens_T: Tensor) -> Tensor:
    """What llama.cpp's `deci` computes from the file [T, V], quirks included: written from its description, for one
    sequence, without anything of pruneexp."""
    reader = gguf.GGUFReader(file)
    read = {
        name.removeprefix("deci."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith("deci.")
    }
    tensor = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    size = read["attention.key_length"] if read["attention.head_count"][0] else 0  # asked of layer 0 alone
    assert read["rope.dimension_count"] == read["attention.value_length"] == size
    frequencies = read["rope.freq_base"] ** (-torch.arange(0, size, 2) / size)
    frequencies = frequencies / tensor.get("rope_freqs.weight", torch.ones(size // 2))
    angles = torch.arange(len(tokens_T))[:, None] * frequencies  # [T, S/2]

    def norm(x_TD: Tensor, name: str) -> Tensor:
        rms = (x_TD.square().mean(-1, keepdim=True) + read["attention.layer_norm_rms_epsilon"]).rsqrt()
        return x_TD * rms * tensor[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ tensor[f"{name}.weight"].T + tensor.get(f"{name}.bias", torch.zeros(()))

    def rotated(x_THS: Tensor) -> Tensor:
        even, odd = x_THS[..., 0::2], x_THS[..., 1::2]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def attention(x_TD: Tensor, blk: str, heads: int, kv_heads: int) -> Tensor:
        counts = {"q": heads, "k": kv_heads, "v": kv_heads}
        q, k, v = (linear(x_TD, f"{blk}.attn_{name}").unflatten(-1, (n, size)) for name, n in counts.items())
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (rotated(k), v))
        scores = torch.einsum("ths,uhs->htu", rotated(q), k) * size**-0.5
        causal = torch.ones(len(x_TD), len(x_TD), dtype=torch.bool).tril()
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        return linear(torch.einsum("htu,uhs->ths", weights, v).flatten(1), f"{blk}.attn_output")

    x_TD = tensor["token_embd.weight"][tokens_T]
    counts = (read[name] for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"))
    layers = list(zip(*counts, strict=True))
    assert len(layers) == read["block_count"]
    for index, (heads, kv_heads, channels) in enumerate(layers):
        blk = f"blk.{index}"
        here = x_TD
        if heads:
            here = x_TD + attention(norm(x_TD, f"{blk}.attn_norm"), blk, heads, kv_heads)
        if channels == 0:
            continue  # whatever attention gave
        gate, up = (linear(norm(here, f"{blk}.ffn_norm"), f"{blk}.ffn_{name}") for name in ("gate", "up"))
        x_TD = here + linear(torch.nn.functional.silu(gate) * up, f"{blk}.ffn_down")
    head = tensor.get("output.weight", tensor["token_embd.weight"])
    return norm(x_TD, "output_norm") @ head.T


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kept", "biases"),
    [
        *((name, NO_FIRST_ATTENTION, True) for name in MODELS),
        ("llama", NO_FIRST_ATTENTION, False),
        ("llama", NO_LAST_FFN, False),
        ("phi3", NO_LAST_FFN, True),
    ],
)
def test_the_file_is_the_model(name: str, kept: Kept, biases: bool, tmp_path: Path) -> None:
    folder = pruned_folder(tmp_path, name, kept, biases)
    assert main([str(folder), "format=gguf", f"out={tmp_path / 'out'}", "prove=in_place"]) == 0
    file = tmp_path / "out" / "model.gguf"
    length = gguf.GGUFReader(file).fields["deci.context_length"].contents()
    assert length == MODELS[name][1].get("sliding_window", 64)
    tokens_T = torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(deci_logits(file, tokens_T), model_logits(folder, tokens_T), rtol=1e-4, atol=1e-4)
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["prove"] == "read_back" and record["tensors_equal"] == len(gguf.GGUFReader(file).tensors)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_layers_with_groups_of_other_sizes(name: str, tmp_path: Path) -> None:
    folder = fewer_query_heads(tmp_path, name, ((3, 3), (2, 1), (3, 4)))
    assert main([str(folder), "format=gguf", f"out={tmp_path / 'out'}", "prove=in_place"]) == 0
    file = tmp_path / "out" / "model.gguf"
    fields = gguf.GGUFReader(file).fields
    assert fields["deci.attention.head_count"].contents() == [9, 2, 12]
    assert fields["deci.attention.head_count_kv"].contents() == [3, 2, 3]
    length = fields["deci.context_length"].contents()  # of Phi-3, a sliding window
    tokens_T = torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(deci_logits(file, tokens_T), model_logits(folder, tokens_T), rtol=1e-4, atol=1e-4)


def widths(file: Path) -> list[int]:
    return gguf.GGUFReader(file).fields["deci.feed_forward_length"].contents()


def test_no_wider_than_the_model(tmp_path: Path) -> None:
    folder = pruned_folder(tmp_path, "llama", NO_LAST_FFN)
    assert main([str(folder), "format=gguf", "multiple=1", f"out={tmp_path / 'out'}", "prove=off"]) == 0
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["deci.attention.head_count"].contents() == [2, 4]  # the empty layer is left out
    assert fields["deci.attention.head_count_kv"].contents() == [1, 2]
    assert widths(tmp_path / "out" / "model.gguf") == [7, 1]


def test_rows_that_can_be_quantised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pruned_folder(tmp_path, "llama_biased", NO_LAST_FFN, biases=True)
    tokens_T = torch.randint(3, 64, (64,), generator=torch.Generator().manual_seed(1))
    for multiple, typed in ((32, []), (256, ["multiple=256"])):  # llama.cpp's blocks, and those of K-quants
        out = tmp_path / str(multiple)
        assert main([str(folder), "format=gguf", *typed, f"out={out}", "prove=in_place"]) == 0
        assert f"FFNs filled up with zeros to multiples of {multiple})" in capsys.readouterr().out
        assert widths(out / "model.gguf") == [multiple] * 3
        expected = model_logits(folder, tokens_T)
        torch.testing.assert_close(deci_logits(out / "model.gguf", tokens_T), expected, rtol=1e-4, atol=1e-4)


def test_llama_cpp_runs_what_fits_into_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = pruned_folder(tmp_path, "llama", NO_LAST_FFN), tmp_path / "out"
    monkeypatch.setattr(gguf_proof, "installed", lambda: None)

    def note(free: float) -> str:
        monkeypatch.setattr(gguf_proof, "available_memory", lambda device: free)
        assert main([str(folder), "format=gguf", "stream=true", f"out={out}", "overwrite=true"]) == 0
        return json.loads((out / "export.json").read_text())["notes"][-1]

    assert "does not fit" in note(0) and "is installed" in note(2**40)
    once = 4 * stored_source(folder).outline().params + (out / "model.gguf").stat().st_size
    assert "does not fit" in note(0.89 * once / 0.9) and "is installed" in note(1.01 * once / 0.9)


def test_out_is_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = pruned_folder(tmp_path, "llama", NO_LAST_FFN), tmp_path / "small.gguf"
    command = [str(folder), "format=gguf", f"out={out}", "prove=off"]
    assert main(command) == 0
    assert widths(out) == [32, 32]
    record = json.loads((tmp_path / "small.gguf.json").read_text())
    assert record["form"] == "gguf" and record["out"] == str(out) and record["bytes"] == out.stat().st_size
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "pruned", "small.gguf", "small.gguf.json"}
    capsys.readouterr()
    assert main(command) == 2
    assert "small.gguf exists; expected a new file, or overwrite=true" in capsys.readouterr().err
    assert main([*command, "overwrite=true", "multiple=64"]) == 0
    assert widths(out) == [64, 64]


def test_a_file_that_no_export_wrote_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = pruned_folder(tmp_path, "llama", NO_LAST_FFN), tmp_path / "mine.gguf"
    command = [str(folder), "format=gguf", f"out={out}", "prove=off", "overwrite=true"]
    for record in (None, "[1]", json.dumps({"form": "gguf", "bytes": 3})):
        out.write_text("mine")
        if record:
            (tmp_path / "mine.gguf.json").write_text(record)
        assert main(command) == 2
        assert "overwrite=true replaces earlier exports alone" in capsys.readouterr().err
        assert out.read_text() == "mine"
    (tmp_path / "folder.gguf").mkdir()
    assert main([str(folder), "format=gguf", f"out={tmp_path / 'folder.gguf'}"]) == 2
    assert "is a folder; expected the file to write" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "code", "kind"), [("bfloat16", 32, torch.bfloat16), ("float16", 1, torch.float16)])
def test_half_precision(dtype: str, code: int, kind: torch.dtype, tmp_path: Path) -> None:
    folder, out = pruned_folder(tmp_path, "llama", NO_FIRST_ATTENTION), tmp_path / "out"
    assert main([str(folder), "format=gguf", f"dtype={dtype}", f"out={out}", "prove=in_place"]) == 0
    reader = gguf.GGUFReader(out / "model.gguf")
    assert reader.fields["general.file_type"].contents() == code
    dense = ModelSource("own", str(folder), None, "float64", "cpu", False, False, 4).load()
    tensors = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    embeddings = dense.module.get_input_embeddings().weight
    torch.testing.assert_close(tensors["token_embd.weight"], embeddings.to(kind).float(), rtol=0, atol=0)
    torch.testing.assert_close(tensors["output_norm.weight"], dense.module.model.norm.weight.float(), rtol=0, atol=0)


def test_numbers_too_large_for_float16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pruned_folder(tmp_path, "llama", NO_FIRST_ATTENTION)
    model = ModelSource("own", str(folder), None, "float64", "cpu", False, False, 4).load()
    model.layers[2].mlp.up_proj.weight[0, 0] = 1e6
    save(model, tmp_path / "large")
    assert main([str(tmp_path / "large"), "format=gguf", "dtype=float16", f"out={tmp_path / 'out'}"]) == 1
    assert "dtype=float16: blk.2.ffn_up.weight holds values too large" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    write = gguf_file.GgufExporter.write

    def damaged(self: Any, model: Any, folder: Path) -> list[str]:
        notes = write(self, model, folder)
        with open(folder / "model.gguf", "r+b") as file:
            file.seek(-100, 2)
            file.write(b"\x01")
        return notes

    monkeypatch.setattr(gguf_file.GgufExporter, "write", damaged)
    assert (
        main(
            [
                str(pruned_folder(tmp_path, "llama", NO_FIRST_ATTENTION)),
                "format=gguf",
                f"out={tmp_path / 'out'}",
                "prove=in_place",
            ]
        )
        == 1
    )
    assert "tensor blk.2.ffn_down.weight is not the model's" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "reason", "instead"),
    [
        ("gemma", "only llama, mistral", "expected format=stock"),
        ("qwen3", "only llama, mistral", "expected format=stock"),
        ("granite", "its multipliers are not 1", "expected format=stock"),
        ("smollm3", "some layers have no positions", "expected format=stock"),
        ("phi4_mini", "rotary positions are of type longrope", "expected format=stock"),
    ],
)
def test_models_that_are_no_llama(
    name: str, reason: str, instead: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(name).save_pretrained(tmp_path / "dense")
    capsys.readouterr()  # transformers' own progress
    assert main([str(tmp_path / "dense"), "format=gguf", f"out={tmp_path / 'out'}"]) == 2
    line = capsys.readouterr().err
    assert reason in line and instead in line and line.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_the_package(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    folder = pruned_folder(tmp_path, "llama", NO_FIRST_ATTENTION)
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    assert main([str(folder), "format=gguf", f"out={tmp_path / 'out'}"]) == 2
    assert "pip install 'pruneexp[gguf]'" in capsys.readouterr().err


def test_without_llama_cpp(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    folder = pruned_folder(tmp_path, "llama", NO_FIRST_ATTENTION)
    monkeypatch.setattr(gguf_run, "find_spec", lambda name: None)
    assert main([str(folder), "format=gguf", f"out={tmp_path / 'out'}"]) == 0
    assert "not run by llama.cpp (neither llama-cpp-python nor xllamacpp is installed)" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["prove"] == "read_back" and "max_logit_difference" not in record


@pytest.fixture(params=sorted(gguf_run.SCRIPTS))
def llama_cpp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of the packages that run llama.cpp, as if it were the only one."""
    pytest.importorskip(request.param)
    monkeypatch.setattr(gguf_run, "find_spec", lambda name: name if name == request.param else None)
    return request.param


def run_by(package: str, out: Path) -> dict[str, Any]:
    record = json.loads((out / "export.json").read_text())
    assert record["prove"] == "llama.cpp" and record["run_by"].startswith(f"{package} ")
    return record


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kept"), [("llama3", NO_FIRST_ATTENTION), ("llama_biased", NO_LAST_FFN)])
def test_run_by_llama_cpp(name: str, kept: Kept, llama_cpp: str, tmp_path: Path) -> None:
    folder = pruned_folder(tmp_path, name, kept, biases=True)
    assert main([str(folder), "format=gguf", f"out={tmp_path / 'out'}"]) == 0
    record = run_by(llama_cpp, tmp_path / "out")
    what = "logit" if llama_cpp == "llama_cpp" else "log_probability"
    assert record["greedy_tokens_equal"] and record[f"max_{what}_difference"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("context", [16, 17, 32])
def test_run_by_llama_cpp_as_far_as_the_context_goes(context: int, llama_cpp: str, tmp_path: Path) -> None:
    values = {**MODELS["llama"][1], "max_position_embeddings": context}
    random_model("Llama", values).save_pretrained(tmp_path / "dense")
    model = ModelSource("dense", str(tmp_path / "dense"), None, "float64", "cpu", False, False, 4).load()
    save(model, tmp_path / "own")
    assert main([str(tmp_path / "own"), "format=gguf", f"out={tmp_path / 'out'}"]) == 0
    if context > 16:
        assert run_by(llama_cpp, tmp_path / "out")["greedy_tokens_equal"]
        return
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["prove"] == "read_back" and "a context of 16 tokens is too short to try it" in record["notes"][-1]


def test_rows_in_transformers_order_are_another_model(
    llama_cpp: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    folder = pruned_folder(tmp_path, "llama", NO_LAST_FFN)
    monkeypatch.setattr(gguf_layout, "neighbouring", lambda rows, heads: rows)  # so is it read back
    assert main([str(folder), "format=gguf", f"out={tmp_path / 'out'}"]) == 1
    assert "the export computes something else" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_crash_of_llama_cpp_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    folder = pruned_folder(tmp_path, "llama", NO_LAST_FFN)
    capsys.readouterr()  # transformers tells of its progress
    monkeypatch.setattr(gguf_run, "find_spec", lambda name: name)
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(gguf_run, "SCRIPTS", {"xllamacpp": crash})
    assert main([str(folder), "format=gguf", f"out={tmp_path / 'out'}"]) == 1
    line = capsys.readouterr().err
    assert "llama.cpp does not run model.gguf (ended by SIGSEGV)" in line and line.count("\n") == 1
    says = r"import sys; sys.stderr.buffer.write(b'a token of \xff'); sys.exit(1)"
    monkeypatch.setattr(gguf_run, "SCRIPTS", {"xllamacpp": says})
    assert main([str(folder), "format=gguf", f"out={tmp_path / 'out'}"]) == 1
    line = capsys.readouterr().err
    assert "llama.cpp does not run model.gguf (a token of \ufffd)" in line and line.count("\n") == 1


def test_the_tokenizer_of_the_embedded_model(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    embedded = Path(gguf_file.__file__).parents[1] / "embedded" / "llama"
    assert main([str(embedded), "format=gguf", f"out={tmp_path / 'out'}"]) == 0
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    spec = json.loads((embedded / "tokenizer.json").read_text())
    read = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items() if "ggml" in name}
    assert (read["model"], read["pre"], read["add_bos_token"]) == ("gpt2", "gpt-2", False)
    assert read["tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert read["token_type"][:4] == [CONTROL, CONTROL, CONTROL, NORMAL]
    assert [merge.split(" ") for merge in read["merges"]] == [list(pair) for pair in spec["model"]["merges"]]
    assert (read["bos_token_id"], read["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert "prompt_tokens_equal" not in record or record["prompt_tokens_equal"]


_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_of(split: Any, ignore_merges: bool = False) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "<s>"]
    vocab = {word: token for token, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab, [("h", "e")], ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def test_other_tokenizers() -> None:
    from tokenizers import Regex, pre_tokenizers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated")
    vocab = vocabulary(tokenizer_of(pre_tokenizers.Sequence([words, plain]), ignore_merges=True), 300)
    assert (vocab.split, vocab.begins, vocab.ends) == ("llama-bpe", True, False)
    assert vocab.tokens[257:260] == ("<s>", "<tool>", "[PAD259]") and len(vocab.tokens) == 300
    assert vocab.types[256:260] == (NORMAL, CONTROL, USER_DEFINED, UNUSED)
    assert vocab.merges == ("h e",) and vocab.special["bos"] == 257
    spelled = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert vocabulary(tokenizer_of(spelled), 300).split == "smollm"
    for unknown in (
        tokenizer_of(pre_tokenizers.Sequence([words, plain])),  # llama.cpp would take whole words first
        tokenizer_of(pre_tokenizers.Metaspace()),
        tokenizer_of(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    ):
        none = vocabulary(unknown, 300)
        assert not none.tokens and "is no BPE, of bytes or of pieces, that llama.cpp knows" in none.notes[0]
    assert "259 tokens are more than the model's 100" in vocabulary(tokenizer_of(spelled), 100).notes[0]


def pieces_tokenizer(complete: bool = True) -> Any:
    """As LLaMA 2's: pieces learned from a few words, every pair that makes one among the merges, bytes for the rest."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    space = "\u2581"
    text = [
        "the other mother gathers another feather",
        "aaa aaaa aa a banana",
        "it's 3.14 in 2024, don't",
        "x_i == (y+z)",
    ]
    normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizer
    learned.train_from_iterator(text * 3, trainers.BpeTrainer(vocab_size=140, show_progress=False))
    joined = [a + b for a, b in json.loads(learned.to_str())["model"]["merges"]]
    letters = sorted({letter for line in text for letter in line.replace(" ", space)} | {space})
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(joined), *letters]
    vocab = {word: token for token, word in enumerate(dict.fromkeys(words))}
    cuts = [(piece, cut) for piece in dict.fromkeys(joined) for cut in range(1, len(piece))]
    merges = [(piece[:cut], piece[cut:]) for piece, cut in cuts if piece[:cut] in vocab and piece[cut:] in vocab]
    merges = merges if complete else merges[:-1]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizer
    backend.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(word, special=True) for word in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def joined_by_score(text: str, vocab: Any) -> list[int]:
    """llama.cpp's way with pieces: of all neighbours that make one, the best score first, the leftmost of equals."""
    tokens = {word: token for token, word in enumerate(vocab.tokens)}
    parts = list(("\u2581" if vocab.space_prefix else "") + text.replace(" ", "\u2581"))
    while True:
        joins = (a + b for a, b in zip(parts, parts[1:], strict=False))
        made = [(-vocab.scores[tokens[word]], place) for place, word in enumerate(joins) if word in tokens]
        if not made:
            break
        place = min(made)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    ids = [[tokens[p]] if p in tokens else [tokens[f"<0x{byte:02X}>"] for byte in p.encode()] for p in parts]
    return [token for part in ids for token in part]


def test_tokenizers_of_pieces(tmp_path: Path) -> None:
    tokenizer = pieces_tokenizer()
    vocab = vocabulary(tokenizer, len(tokenizer) + 2)
    assert vocab.types[:4] == (UNKNOWN, CONTROL, CONTROL, BYTE) and vocab.types[-1] == UNUSED
    assert vocab.space_prefix and not vocab.merges and not vocab.notes and not vocab.begins
    for text in (*gguf_proof.TEXTS, "aaaa aaaaaaa banana bananas", "the mothers gathered  other feathers"):
        assert joined_by_score(text, vocab) == tokenizer(text, add_special_tokens=False).input_ids, text
    incomplete = vocabulary(pieces_tokenizer(complete=False), 600)
    assert not incomplete.tokens and "is no BPE, of bytes or of pieces" in incomplete.notes[0]


def test_llama_cpp_splits_text_into_the_same_pieces(llama_cpp: str, tmp_path: Path) -> None:
    tokenizer = pieces_tokenizer()
    random_model("Llama", {**MODELS["llama"][1], "vocab_size": len(tokenizer) + 2}).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    assert main([str(tmp_path / "dense"), "format=gguf", f"out={tmp_path / 'out'}"]) == 0
    assert run_by(llama_cpp, tmp_path / "out")["prompt_tokens_equal"]
