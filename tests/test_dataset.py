"""Token windows: exact ids, seeds, the papers' protocols on small texts, and what goes wrong with files."""

from __future__ import annotations

import logging
import socket
import socketserver
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from pruneexp.dataset import Embedded, HubText, check_vocabulary, fingerprint, overlap, text, tokens
from pruneexp.dataset.offline import unreachable
from pruneexp.dataset.rows import document, joined
from pruneexp.dataset.windows import cut, draw
from pruneexp.types import ConfigError, Dataset, RunError
from tests.cases import each

CONF = Path(__file__).parents[1] / "conf"
REAL = Path(__file__).parents[2] / "shared" / "data"
BOS = 256


@pytest.fixture(scope="module")
def byte_tokenizer() -> Any:
    """One token a byte, id = the byte's value; BOS in front where special tokens are asked for; made for 16 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {character: byte for byte, character in bytes_to_unicode().items()} | {"<s>": BOS}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=16)


def ids(string: str) -> list[int]:
    return list(string.encode())


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {"calibration": tmp_path / "train.txt", "evaluation": tmp_path / "te st.txt"}
    paths["calibration"].write_text("".join(chr(97 + i % 26) for i in range(500)))
    paths["evaluation"].write_text("abcdefghij\nklmé")
    return paths


def a_text(files: dict[str, Path], **changes: Any) -> Any:
    paths = {part: str(path) for part, path in files.items()}
    return text(
        **({**paths, "name": None, "samples": 6, "length": 8, "seed": 0, "sampling": "random", "bos": False} | changes)
    )


def a_hub(**changes: Any) -> HubText:
    config = yaml.safe_load((CONF / "dataset/wikitext2.yaml").read_text())
    return HubText(**({k: v for k, v in config.items() if k != "_target_"} | {"seed": 0, "bos": False} | changes))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, str]]]:
    """What the hub holds, split by split; slices like "train[:2]" are cut as `datasets` does."""
    import datasets

    rows: dict[str, list[dict[str, str]]] = {}

    def load_dataset(path: str, split: str, streaming: bool, data_files: Any, **options: Any) -> Any:
        base, _, cut = split.rstrip("]").partition("[")
        assert data_files is None or list(data_files) == [base]
        start, stop = (int(x) if x else None for x in cut.split(":")) if cut else (None, None)
        documents = datasets.Dataset.from_list(rows[base][start:stop])
        return documents.to_iterable_dataset() if streaming else documents

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return rows


# windows of a stream


def test_cut_is_consecutive_and_drops_the_tail():
    assert cut(torch.arange(11), 4, "key").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(torch.arange(4), 4, "key").tolist() == [[0, 1, 2, 3]]


def test_random_windows_reach_every_start_and_follow_the_seed():
    stream = torch.arange(6)
    windows = draw(stream, 400, 4, seed=3, sampling="random", key="key")
    assert windows.dtype == torch.int64
    assert torch.equal(windows, windows[:, :1] + torch.arange(4))
    starts, counts = windows[:, 0].unique(return_counts=True)
    assert starts.tolist() == [0, 1, 2] and counts.min() > 100
    assert torch.equal(windows, draw(stream, 400, 4, seed=3, sampling="random", key="key"))
    assert not torch.equal(windows, draw(stream, 400, 4, seed=4, sampling="random", key="key"))


def test_consecutive_windows_are_the_first_ones():
    assert draw(torch.arange(11), 2, 3, 0, "consecutive", "key").tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ConfigError, match=r"key: 11 tokens found, 3 windows of 3; expected at least dataset.samples=4"):
        draw(torch.arange(11), 4, 3, 0, "consecutive", "key")


@pytest.mark.parametrize("sampling", ["random", "consecutive"])
def test_a_stream_shorter_than_a_window(sampling: str):
    with pytest.raises(ConfigError, match="key: 3 tokens found; expected at least 4, one window"):
        draw(torch.arange(3), 1, 4, 0, sampling, "key")


# text


def test_text_is_tokenised_whole_without_special_tokens(files, byte_tokenizer, caplog):
    caplog.set_level(logging.WARNING)
    dataset = a_text(files)
    assert dataset.evaluation(byte_tokenizer, 5).tolist() == [ids("abcde"), ids("fghij"), ids("\nklmé")[:5]]
    assert dataset.evaluation(byte_tokenizer, None).tolist() == [ids("abcdefgh"), ids("ij\nklmé")[:8]]
    windows = dataset.calibration(byte_tokenizer)
    assert windows.shape == (6, 8) and windows.dtype == torch.int64
    assert not caplog.records  # no "longer than the maximum"


def test_a_byte_order_mark_is_no_text(files, byte_tokenizer):
    windows = a_text(files).evaluation(byte_tokenizer, 5)
    files["evaluation"].write_bytes(b"\xef\xbb\xbf" + files["evaluation"].read_bytes())
    assert torch.equal(a_text(files).evaluation(byte_tokenizer, 5), windows)


def test_text_names(files):
    assert a_text(files).name == "te_st"
    assert a_text(files, name="mine").name == "mine"
    assert a_text(files, evaluation=None).name == "text"
    with pytest.raises(ConfigError, match="^name='a b': expected letters"):
        a_text(files, name="a b")


@pytest.mark.parametrize("part", ["calibration", "evaluation"])
def test_text_file_errors(files, part, tmp_path):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"abc\xff")
    for path, problem in [
        (None, "=null: expected a UTF-8 text file"),
        (str(tmp_path / "none"), "none: no such file; expected a UTF-8 text file"),
        (str(tmp_path), ": this is a directory"),
        (str(tmp_path / "empty"), "empty: the file is empty"),
        (str(tmp_path / "binary"), "binary: byte 3 is not UTF-8"),
    ]:
        dataset = a_text(files, **{part: path})
        with pytest.raises(ConfigError, match=rf"^dataset\.{part}.*{problem}"):
            dataset.check()
        dataset.check(**{part: False})


def test_text_needs_a_tokenizer_and_enough_text(files, byte_tokenizer):
    with pytest.raises(ConfigError, match="expected dataset=tokens"):
        a_text(files).calibration(None)
    with pytest.raises(ConfigError, match=r"dataset\.evaluation=.*te st\.txt: 16 tokens found; expected at least 17"):
        a_text(files).evaluation(byte_tokenizer, 17)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("samples", 0, "samples=0: expected an integer >= 1"),
        ("length", 1, "length=1: expected an integer >= 2"),
        ("seed", -1, "seed=-1: expected an integer >= 0"),
        ("sampling", "all", "sampling='all': expected one of random, consecutive"),
    ],
)
def test_ranges(files, field, value, expected):
    with pytest.raises(ConfigError, match=f"^{expected}$"):
        a_text(files, **{field: value})
    with pytest.raises(ConfigError, match=f"^{expected}$"):
        a_hub(**{field: value})


def test_description_fingerprints_files(files):
    import hashlib

    record = a_text(files).description()
    assert record["evaluation"]["sha256"] == hashlib.sha256(files["evaluation"].read_bytes()).hexdigest()
    assert record["special_tokens"] is False


# tokens


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, str]:
    np.save(tmp_path / "calib.npy", np.arange(12, dtype=np.int32).reshape(3, 4))
    np.save(tmp_path / "test.npy", np.arange(20, dtype=np.uint16).reshape(2, 10))
    return {"calibration": str(tmp_path / "calib.npy"), "evaluation": str(tmp_path / "test.npy")}


def test_tokens_are_used_as_they_are(arrays):
    dataset = tokens(**arrays, name=None, length=None, bos=False)
    dataset.check()
    assert dataset.name == "test"
    assert torch.equal(dataset.calibration(None), torch.arange(12).reshape(3, 4))
    assert torch.equal(dataset.evaluation(None, None), torch.arange(20).reshape(2, 10))
    assert torch.equal(dataset.evaluation(None, 10), torch.arange(20).reshape(2, 10))
    assert dataset.calibration(None).dtype == torch.int64


def test_wider_token_windows_are_cut_row_by_row(arrays):
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [10, 11, 12, 13], [14, 15, 16, 17]]
    assert tokens(**arrays, name=None, length=None, bos=False).evaluation(None, 4).tolist() == expected
    assert tokens(**arrays, name=None, length=4, bos=False).evaluation(None, None).tolist() == expected
    with pytest.raises(ConfigError, match=r"dataset\.evaluation=.*10 tokens wide; expected at least .* 11"):
        tokens(**arrays, name=None, length=11, bos=False).check()


@each(
    "array, problem",
    [
        (np.zeros(3, np.int64), r"its shape is \[3\]"),
        (np.zeros((2, 3)), "its values are float64"),
        (np.zeros((2, 3), bool), "its values are bool"),
        (np.zeros((0, 3), np.int64), r"it is empty, \[0, 3\]"),
        (np.zeros((3, 1), np.int64), "its windows are 1 token wide, which predicts nothing"),
        (np.array([[1, 2], [3, -7]]), "token id -7 at window 1, position 1 is negative"),
        (np.array([["a", None]], dtype=object), r"not a plain \.npy array"),
    ],
)
def test_token_array_errors(tmp_path, array, problem):
    np.save(tmp_path / "bad.npy", array, allow_pickle=True)
    with pytest.raises(ConfigError, match=rf"^dataset\.calibration=.*bad\.npy: {problem}; expected an \.npy file"):
        tokens(str(tmp_path / "bad.npy"), None, None, None, False).check(evaluation=False)


def test_token_files_that_are_no_arrays(tmp_path):
    (tmp_path / "a.npy").write_text("text")
    np.savez(tmp_path / "b.npz", x=np.zeros((2, 2), np.int64))
    for name, problem in [("a.npy", "not a plain"), ("b.npz", "not a plain"), ("c.npy", "no such file")]:
        with pytest.raises(ConfigError, match=problem):
            tokens(None, str(tmp_path / name), None, None, False).check(calibration=False)


# the embedded language


def test_embedded_windows_begin_with_stories(byte_tokenizer):
    from pruneexp.embedded.language import CALIBRATION, texts
    from tests.embedded_process import windows

    dataset = Embedded(samples=3, length=40, seed=5, evaluation_samples=4, bos=False)
    windows_NT = dataset.calibration(byte_tokenizer)
    assert windows_NT.shape == (3, 40) and dataset.evaluation(byte_tokenizer, 24).shape == (4, 24)
    assert torch.equal(windows_NT, torch.from_numpy(windows(byte_tokenizer, CALIBRATION[5], 3, 40)[0]))
    assert bytes(windows_NT[0].tolist()).decode() == next(texts(CALIBRATION[5]))[:40]


def test_embedded_seeds(byte_tokenizer):
    one, two = (Embedded(samples=2, length=64, seed=seed, evaluation_samples=2, bos=False) for seed in (0, 1))
    assert not torch.equal(one.calibration(byte_tokenizer), two.calibration(byte_tokenizer))
    assert torch.equal(one.evaluation(byte_tokenizer, 64), two.evaluation(byte_tokenizer, 64))
    assert not torch.equal(one.calibration(byte_tokenizer), one.evaluation(byte_tokenizer, 64))
    with pytest.raises(ConfigError, match="^evaluation_samples=0: expected an integer >= 1"):
        Embedded(samples=2, length=64, seed=0, evaluation_samples=0, bos=False)


# the hub


def test_a_document_is_its_fields():
    row = {"instruction": "Say it.", "input": "", "output": "It."}
    assert document(row, ["instruction", "input", "output"]) == "Say it.\nIt."
    assert joined([{"text": "a"}, {"text": ""}, {"text": "b"}], ["text"], "\n\n") == "a\n\n\n\nb"
    with pytest.raises(ConfigError, match="no column 'text'; expected some of instruction, input, output"):
        document(row, ["text"])


@each("value", [[{"role": "user", "content": "Say it."}], 7, 0, []])
def test_a_column_that_is_no_text_is_named(value, hub, byte_tokenizer):
    assert document({"text": "a", "title": None}, ["title", "text"]) == "a"
    hub["train"] = [{"text": "a", "other": value}]
    kind = type(value).__name__
    said = rf"^dataset.fields=\['text', 'other'\]: 'other' is no text but of type {kind}; expected columns of text$"
    with pytest.raises(ConfigError, match=said):
        a_hub(fields=["text", "other"]).calibration(byte_tokenizer)


def test_wikitext2_protocol(hub, byte_tokenizer):
    hub |= {"train": [{"text": "ab"}, {"text": "cd"}], "test": [{"text": "wx"}, {"text": ""}, {"text": "yz"}]}
    dataset = a_hub(samples=50, length=3)
    stream = [BOS, *ids("ab cd")]
    expected = {tuple(stream[i : i + 3]) for i in range(4)}
    assert {tuple(row) for row in dataset.calibration(byte_tokenizer).tolist()} == expected
    assert dataset.evaluation(byte_tokenizer, 4).tolist() == [[BOS, *ids("wx\n")], ids("\n\n\ny")]
    without = a_hub(special_tokens=False, evaluation_windows=1)
    assert without.evaluation(byte_tokenizer, 4).tolist() == [ids("wx\n\n")]


def test_windows_from_documents_of_their_own(hub, byte_tokenizer):
    hub["train"] = [{"text": chr(97 + i) * (i + 1)} for i in range(8)]
    changes = {"calibration_join": None, "length": 4, "special_tokens": False}
    windows = a_hub(**changes, samples=5).calibration(byte_tokenizer)
    assert sorted(row[0] for row in windows.tolist()) == ids("defgh")
    assert all(len(set(row)) == 1 for row in windows.tolist())
    again = a_hub(**changes, samples=5).calibration(byte_tokenizer)
    assert torch.equal(windows, again)
    first = a_hub(**changes, samples=2, sampling="consecutive").calibration(byte_tokenizer)
    assert first.tolist() == [ids("dddd"), ids("eeee")]
    with pytest.raises(
        ConfigError, match=r"5 of 8 documents have 4 tokens or more; expected at least dataset.samples=6"
    ):
        a_hub(**changes, samples=6).calibration(byte_tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_slices_and_streaming(hub, byte_tokenizer, streaming):
    hub["train"] = [{"text": c * 4} for c in "abcd"]
    dataset = a_hub(
        streaming=streaming,
        calibration_split="train[:2]",
        evaluation_split="train[2:]",
        sampling="consecutive",
        special_tokens=False,
        samples=2,
        length=4,
    )
    assert dataset.calibration(byte_tokenizer).tolist() == [ids("aaaa"), ids(" bbb")]
    assert dataset.evaluation(byte_tokenizer, 5).tolist() == [ids("cccc\n"), ids("\ndddd")]


@each(
    "changes, expected",
    [
        ({"fields": []}, r"fields=\[\]: expected at least one column"),
        ({"evaluation_split": "test["}, r"evaluation_split='test\[': expected a split"),
        ({"streaming": True, "calibration_split": "train[-9:]"}, "calibration_split=.*from its start"),
        ({"data_files": {"train": "a.json"}}, "evaluation_split='test': expected one of data_files, train"),
        ({"evaluation_windows": 0}, "evaluation_windows=0: expected an integer >= 1, or null"),
    ],
)
def test_hub_config_errors(changes, expected):
    with pytest.raises(ConfigError, match=f"^{expected}"):
        a_hub(**changes)


def test_a_hub_out_of_reach_is_one_line(monkeypatch, byte_tokenizer):
    import datasets

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach\n it")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(RunError, match="^dataset.path=Salesforce/wikitext: .*ConnectionError.*dataset=text") as caught:
        a_hub().calibration(byte_tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("listens", "offline"), [(True, False), (False, False), (False, True)])
def test_a_hub_that_takes_no_connection_is_not_asked(listens, offline, monkeypatch, byte_tokenizer):
    import datasets
    import huggingface_hub

    flags = (datasets.config, huggingface_hub.constants)
    seen: list[bool] = []

    def load_dataset(*_: Any, **__: Any) -> Any:
        seen.extend(each.HF_HUB_OFFLINE for each in flags)
        raise ConnectionError("never had")

    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        if not listens:
            server.close()
        for each in flags:
            monkeypatch.setattr(each, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(RunError) as caught:
            a_hub().calibration(byte_tokenizer)
    assert seen == [not listens] * 2 and [each.HF_HUB_OFFLINE for each in flags] == [offline] * 2
    message = str(caught.value)
    assert ("cannot be reached: Connection refused" in message) == (not listens and not offline)
    assert ("ConnectionError: never had" in message) == (listens or offline)


@contextmanager
def a_proxy(answer: bytes) -> Iterator[tuple[str, list[str]]]:
    """A proxy on this machine that answers each request alike: its address, and what it was asked."""
    lines: list[str] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline().strip():
                lines.append(line.decode())
            self.wfile.write(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}", lines
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("answer", "phrase"),
    [
        (b"HTTP/1.1 200 Connection established\r\n\r\n", ""),
        (b"HTTP/1.1 503 No route\r\n\r\n", "503 No route"),
        (b"HTTP/1.1 407 Who are you\r\n\r\n", "407 Who are you"),
        (b"what?\r\n\r\n", "what?"),
        (b"", "closed connection"),
    ],
)
def test_behind_a_proxy_the_hub_is_asked_for_through_it(answer, phrase, monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for key, form in (("https", "http://us%40er:pass@{}"), ("all", "http://{}/"), ("https", "{}")):
        with a_proxy(answer) as (address, lines):
            monkeypatch.setattr(urllib.request, "getproxies", {key: form.format(address)}.copy)
            why = unreachable("https://hub.example")
        assert lines[0].startswith("CONNECT hub.example:443 ")
        assert ("Proxy-Authorization: Basic dXNAZXI6cGFzcw==" in lines) == ("pass" in form)
        assert "pass" not in why and bool(why) == bool(phrase) and phrase in why
        assert why == "" or why.startswith("https://hub.example cannot be reached through the proxy 127.0.0.1: ")
    why = unreachable("https://hub.example")  # the proxy is gone
    assert why == "https://hub.example cannot be reached through the proxy 127.0.0.1: Connection refused"


def test_a_hub_that_no_proxy_is_for_is_asked_itself(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "http://127.0.0.1:9"})
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert unreachable(url) == ""
    assert unreachable(url) == f"{url} cannot be reached: Connection refused"
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"http": "http://127.0.0.1:9"})
    monkeypatch.setenv("no_proxy", "")
    assert unreachable(url)  # the proxy is for another scheme


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "https://127.0.0.1:9", "http://proxy.example:port"])
def test_proxies_that_cannot_be_asked_are_left_to_the_hubs_libraries(proxy, monkeypatch):
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"all": proxy})
    monkeypatch.setenv("no_proxy", "")
    assert unreachable("https://127.0.0.1:9") == ""


# what can be said about windows


def test_check_vocabulary_names_the_first_token():
    windows = torch.tensor([[0, 1], [2, 70000], [80000, 0]])
    check_vocabulary(windows, 80001, "key")
    with pytest.raises(ConfigError, match=r"^key: token id 70000 at window 1, position 1 is out of .* \(32000\)$"):
        check_vocabulary(windows, 32000, "key")


def test_fingerprint_is_of_the_ids_and_the_shape():
    windows = torch.arange(6).reshape(2, 3)
    assert fingerprint(windows) == fingerprint(windows.int())
    assert len({fingerprint(windows), fingerprint(windows.reshape(3, 2)), fingerprint(windows + 1)}) == 3


def test_overlap_is_the_share_of_windows_that_hold_a_seen_run():
    rng = torch.Generator().manual_seed(0)
    calibration = torch.randint(3, (20, 64), generator=rng)
    evaluation = torch.randint(3, (4, 50), generator=rng)
    assert overlap(calibration, evaluation) == 0.0
    evaluation[1, 7:39] = calibration[3, 20:52]
    assert overlap(calibration, evaluation) == 0.25
    assert overlap(calibration, evaluation, n=33) in (0.0, 0.25)  # the neighbours may be equal by chance
    assert overlap(calibration, calibration[:, :16]) == 1.0  # shorter than a run: whole windows


def test_overlap_agrees_with_sets_of_runs():
    rng = torch.Generator().manual_seed(1)
    calibration, evaluation = (torch.randint(2, (n, 12), generator=rng) for n in (5, 40))
    runs = {tuple(row[i : i + 8]) for row in calibration.tolist() for i in range(5)}
    expected = [any(tuple(row[i : i + 8]) in runs for i in range(5)) for row in evaluation.tolist()]
    assert overlap(calibration, evaluation, n=8) == sum(expected) / 40


# configs


@each("choice", sorted(path.stem for path in (CONF / "dataset").glob("*.yaml")))
def test_every_option_composes_and_builds(choice):
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose(overrides=["+seed=7", f"+dataset={choice}", "dataset.bos=false"])
    dataset = instantiate(config.dataset, _convert_="all")
    assert isinstance(dataset, Dataset)
    assert dataset.description()["kind"]
    assert choice == "tokens" or (dataset.seed == 7 and OmegaConf.to_container(config.dataset)["seed"] == "${seed}")


@pytest.mark.slow
def test_nothing_heavy_is_imported():
    program = "import sys, pruneexp.dataset, pruneexp.evaluator; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"transformers", "datasets", "wandb", "lm_eval", "hydra", "omegaconf"} & set(loaded)


# real text, where it is at hand


@pytest.mark.skipif(not REAL.is_dir(), reason="needs shared/data")
def test_c4_protocol_on_real_documents(hub, byte_tokenizer):
    import json

    with open(REAL / "c4_sample/sample_c4-rp1.jsonl") as lines:
        hub["train"] = [{"text": json.loads(line)["text"]} for line, _ in zip(lines, range(200), strict=False)]
    hub["validation"] = hub["train"][:20]
    config = yaml.safe_load((CONF / "dataset/c4.yaml").read_text())
    dataset = HubText(**{k: v for k, v in config.items() if k != "_target_"} | {"seed": 0, "samples": 16, "bos": False})
    documents = [bytes(row["text"], "utf-8") for row in hub["train"]]
    for row in dataset.calibration(byte_tokenizer).tolist():
        assert any(bytes(i for i in row if i != BOS) in content for content in documents)
    assert len(dataset.evaluation(byte_tokenizer, 32)) <= 256


# windows that are made once


class Counting:
    """A tokenizer that counts how often it is asked."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.calls = tokenizer, 0

    def __call__(self, *args: Any, **settings: Any) -> Any:
        self.calls += 1
        return self.tokenizer(*args, **settings)


def test_windows_are_made_once_until_the_file_changes(files, byte_tokenizer):
    counting = Counting(byte_tokenizer)
    first = a_text(files).calibration(counting)
    assert torch.equal(a_text(files).calibration(counting), first) and counting.calls == 1
    assert not torch.equal(a_text(files, seed=9).calibration(counting), first)
    text = files["calibration"].read_text()
    files["calibration"].write_text("another text, and longer than the one before it. " + text)
    changed = a_text(files).calibration(counting)
    assert counting.calls == 3 and not torch.equal(changed, first)
    assert torch.equal(changed, a_text(files).calibration(byte_tokenizer))


def test_hub_windows_are_made_once_of_the_same_documents(hub, byte_tokenizer):
    hub["test"] = [{"text": "abcdefgh"}]
    counting, dataset = Counting(byte_tokenizer), a_hub(special_tokens=False)
    for _ in range(2):
        assert dataset.evaluation(counting, 4).tolist() == [ids("abcd"), ids("efgh")]
        assert counting.calls == 1
    hub["test"] = [{"text": "stuvwxyz"}]  # the hub's data set has moved on
    assert dataset.evaluation(counting, 4).tolist() == [ids("stuv"), ids("wxyz")]


def test_embedded_windows_are_made_once_for_each_seed(byte_tokenizer):
    counting = Counting(byte_tokenizer)
    made = [Embedded(2, 20, seed, 3, False).calibration(counting) for seed in (0, 0, 1)]
    calls = counting.calls
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert torch.equal(Embedded(2, 20, 1, 3, False).calibration(counting), made[2]) and counting.calls == calls
