"""Weights & Biases. Whatever goes wrong there, the run goes on: its record is in the run folder."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from pruneexp.conf_files import override_parts
from pruneexp.types import QUERY_HEADS, ConfigError, Plan, RunRecord, Scores, Site, unit_scores

MODES = ("online", "offline", "shared", "disabled")
INIT_SECONDS = 30  # to reach the server or log in, before the run goes on offline
FINISH_SECONDS = 120  # to upload the rest; what is left can be sent later with `wandb sync`
HISTOGRAM_BINS = 64
PUBLIC_HOST = "api.wandb.ai"
LONGEST_NAME = 128  # of a run, in characters

logger = logging.getLogger("pruneexp")


Figure = tuple[str, bytes]  # its caption, and a PNG


@dataclass
class _Live:
    """What a tracker holds while a run is on."""

    run: Any = None  # wandb.Run; None before the start, after the end, and where W&B could not start
    folder: Path = Path()
    warned: bool = False


@dataclass(frozen=True)
class Wandb:
    """A W&B run beside the run folder: config, metrics, the plan and the evaluators' samples as artifacts, the
    structure, score histograms. Jobs of a sweep share its name as their group, which a last run, its summary, ends.

    `mode`: online, offline (its files lie in the run folder's wandb/, for `wandb sync`), shared, disabled, or None:
    what the user's environment says (WANDB_MODE, a login), offline where it says nothing."""

    project: str
    entity: str | None
    mode: str | None
    tags: Sequence[str]
    _live: _Live = field(init=False, repr=False, compare=False, default_factory=_Live)

    def __post_init__(self) -> None:
        if not isinstance(self.project, str) or not self.project:
            raise ConfigError(f"project={self.project!r}: expected a project's name")
        if self.entity is not None and (not isinstance(self.entity, str) or not self.entity):
            raise ConfigError(f"entity={self.entity!r}: expected a user's or team's name, or null")
        if self.mode not in (None, *MODES):
            raise ConfigError(f"mode={self.mode!r}: expected one of {', '.join(MODES)}, or null")
        if isinstance(self.tags, str) or not all(isinstance(tag, str) and tag for tag in self.tags):
            raise ConfigError(f"tags={self.tags!r}: expected a list of words")

    def start(self, record: RunRecord) -> None:
        """Opens the W&B run, its files in the run folder."""
        # Absolute: W&B writes from a process of its own, which keeps the directory it was started in.
        self._live.run, self._live.folder, self._live.warned = None, record.folder.resolve(), False
        decided = self.mode is not None or _environment_decides()
        # A server out of reach costs the upload alone: offline, the files are there for `wandb sync`.
        for mode in dict.fromkeys((self.mode if decided else "offline", "offline")):
            try:
                self._live.run = run = self._init(mode, record)
                where = f"{Path(run.dir).parent}, for `wandb sync`" if run.offline else run.url or "disabled"
                logger.info("Weights & Biases: %s", where)
            except Exception as error:
                self._warn("start", error)
            if self._live.run is not None:
                return

    def _init(self, mode: Any, record: RunRecord) -> Any:
        import wandb

        settings = {"init_timeout": INIT_SECONDS, "login_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS}
        known = set(wandb.Settings.model_fields)  # finish_timeout is younger than the oldest W&B that works
        own: dict[str, Any] = {
            k: v for k, v in settings.items() if k in known and f"WANDB_{k.upper()}" not in os.environ
        }
        # What of the config has names: the recipe, the choice of each group.
        named = {name: record.job[name] for name in ("recipe", "choices") if name in record.job}
        return wandb.init(
            project=self.project,
            entity=self.entity,
            mode=mode,  # None: wandb reads the environment and its own files
            tags=list(self.tags),
            config={**record.config, **named},
            group=record.group,
            id=_own_id(record),
            name=record.name or os.environ.get("WANDB_NAME") or _name(record),
            job_type=record.job_type,
            dir=str(self._live.folder),
            # A run that is still open in this process is the caller's own, or another job's: never write into it.
            reinit="create_new",
            settings=wandb.Settings(**own, silent=mode == "offline"),
        )

    def log(self, metrics: Mapping[str, float]) -> None:
        self._attempt("log metrics", lambda run: run.log(dict(metrics)))

    def artifacts(self, plan: Plan, scores: Scores, sites: Sequence[Site]) -> None:
        """The plan.json and structure.png of the run folder, which the local run has written, and the scores."""
        plans = [self._live.folder / "plan.json"]
        self._attempt("store the plan", lambda run: self._log_artifact(run, "plan", plans))
        self._attempt("draw the structure", self._log_structure)
        self._attempt("draw the scores", lambda run: run.log(_histograms(scores, sites)))

    def _log_artifact(self, run: Any, kind: str, files: Sequence[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
        for file in files:
            # immutable: W&B refers to the file where it lies instead of copying it to the user's home first.
            artifact.add_file(str(file), policy="immutable")
        run.log_artifact(artifact)

    def _log_structure(self, run: Any) -> None:
        import wandb

        picture = self._live.folder / "structure.png"
        if picture.exists():
            run.log({"structure": wandb.Image(str(picture))})

    def finish(self, metrics: Mapping[str, float]) -> None:
        if samples := sorted((self._live.folder / "samples").glob("*")):
            self._attempt("store the samples", lambda run: self._log_artifact(run, "samples", samples))
        self._attempt("store the metrics", lambda run: run.summary.update(dict(metrics)))
        self._close(exit_code=0)

    def summarise(
        self, record: RunRecord, header: Sequence[str], rows: Sequence[Sequence[Any]], figures: Mapping[str, Figure]
    ) -> None:
        """Makes a sweep that has ended a run of its own: a row for each job in the table `jobs`, `figures/<name>` as
        images. Not of a sweep of W&B's own (`wandb agent`): each of its agents would add one."""
        if os.environ.get("WANDB_SWEEP_ID"):
            return
        self.start(record)
        self._attempt("store the table", lambda run: run.log({"jobs": _table(header, rows)}))
        self._attempt("store the figures", lambda run: run.log(_images(figures)))
        self._close(exit_code=0)

    def fail(self, reason: str, trace: str = "") -> None:
        self._attempt("store the failure", lambda run: run.summary.update({"failure": reason}))
        self._close(exit_code=1)

    def _close(self, exit_code: int) -> None:
        try:
            self._attempt("finish", lambda run: run.finish(exit_code=exit_code))
        except KeyboardInterrupt:
            # Whoever is tired of waiting for an upload still wants the run, whose results are all there.
            logger.warning("Weights & Biases: stopped waiting for the upload; `wandb sync` sends the rest")
        self._live.run = None

    def _attempt(self, what: str, call: Callable[[Any], Any]) -> None:
        if self._live.run is None:
            return
        try:
            call(self._live.run)
        except Exception as error:
            self._warn(what, error)

    def _warn(self, what: str, error: Exception) -> None:
        if not self._live.warned:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            logger.warning("Weights & Biases could not %s, the run goes on: %s", what, reason)
        self._live.warned = True


def _own_id(record: RunRecord) -> str | None:
    """The run's id; None leaves it to W&B: what the environment says, or a new one. WANDB_RUN_ID names a single run, so
    a sweep's jobs and its summary get ids made from it. A sweep of W&B's own starts a process for each run and needs
    none."""
    given = os.environ.get("WANDB_RUN_ID")
    if not given or os.environ.get("WANDB_SWEEP_ID") or record.job_type not in ("job", "summary"):
        return None
    return f"{given}-{record.folder.name if record.job_type == 'job' else 'summary'}"


def _name(record: RunRecord) -> str | None:
    """What tells the run from others: recipe, model, ratio, and what else was typed about the method and the data."""
    model, sparsity = (record.config.get(section) or {} for section in ("model", "sparsity"))
    parts = [record.job.get("recipe"), model.get("name"), sparsity.get("ratio")]
    elsewhere = ("model", "recipe", "evaluator", "tracker", "cache", "run", "sweep", "hydra")
    for text in record.job.get("overrides", ()):
        key, _ = override_parts(text)
        if key.partition(".")[0].partition("/")[0] not in elsewhere and key != "sparsity.ratio":
            parts.append(text)
    return " ".join(str(part) for part in parts if part is not None)[:LONGEST_NAME] or None


def _environment_decides() -> bool:
    """Whether the user has told W&B anything: a mode, a key or token, or a login for the server in use."""
    if any(os.environ.get(name) for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    servers, named = _servers(), os.environ.get("NETRC")
    for path in [named] if named else map(os.path.expanduser, ("~/.netrc", "~/_netrc")):
        try:
            logins = netrc.netrc(path)
        except (OSError, netrc.NetrcParseError):
            continue
        return any(logins.authenticators(server) for server in servers)
    return False


def _servers() -> set[str]:
    """Hosts that a login may be for: the one in use, and the old name of the public one."""
    if named := os.environ.get("WANDB_BASE_URL"):
        return {urlsplit(named).netloc}
    try:
        import wandb

        url = wandb.setup().settings.base_url  # `wandb login --host` keeps it in a file of W&B's
        public = url == wandb.Settings().base_url
    except Exception:
        # Whatever is wrong there, wandb.init meets it again and says it.
        return {PUBLIC_HOST}
    return {urlsplit(url).netloc} | ({PUBLIC_HOST} if public else set())


def _histograms(scores: Scores, sites: Sequence[Site]) -> dict[str, Any]:
    """A histogram of all finite scores of each kind of site, {"scores/attention": ...}. Where none is negative, it is
    of their logarithms, {"log10_scores/mlp": ...}: a few channels' scores are so large that the others would share one
    bar."""
    import wandb

    kinds = {site.name: site.kind for site in sites}
    values: dict[str, list[torch.Tensor]] = {}
    for name, score in scores.items():
        score_U = unit_scores(score)
        finite = score_U[torch.isfinite(score_U)].detach().to("cpu", torch.float64)
        if finite.numel():
            kind = QUERY_HEADS if name.endswith(f".{QUERY_HEADS}") else kinds.get(name, "other")
            values.setdefault(kind, []).append(finite)
    histograms = {}
    for kind, parts in values.items():
        scores_N = torch.cat(parts)
        positive_N = scores_N[scores_N > 0]
        in_log = bool(positive_N.numel()) and bool((scores_N >= 0).all())
        name, drawn_N = (f"log10_scores/{kind}", positive_N.log10()) if in_log else (f"scores/{kind}", scores_N)
        histograms[name] = wandb.Histogram(drawn_N.tolist(), num_bins=HISTOGRAM_BINS)
    return histograms


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A W&B table, whose columns are of one type each: numbers where nothing else is in them, else text; a cell that is
    "" stays empty."""
    import wandb

    columns = []
    for column in zip(*rows, strict=True):
        numbers = all(cell == "" or (isinstance(cell, (int, float)) and not isinstance(cell, bool)) for cell in column)
        kind = float if numbers else str
        columns.append([None if cell == "" else kind(cell) for cell in column])
    return wandb.Table(columns=list(header), data=[list(row) for row in zip(*columns, strict=True)])


def _images(figures: Mapping[str, Figure]) -> dict[str, Any]:
    import wandb
    from PIL import Image

    return {
        f"figures/{name}": wandb.Image(Image.open(BytesIO(png)), caption=caption)
        for name, (caption, png) in figures.items()
    }
