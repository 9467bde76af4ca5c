"""What went wrong with a config, in one line: the key, the value, what was expected, "did you mean"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from pruneexp.conf_files import conf_folder, did_you_mean, inherited, key_comments, option_file
from pruneexp.types import ConfigError, ConfigErrors

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra


def explained(
    error: BaseException, hydra: Hydra | None, overrides: Sequence[str], swept: Sequence[str] = ()
) -> ConfigError:
    """The ConfigError for what composing `overrides` raised. Of several overrides that cannot be read, or choose what
    is not there, it tells all. `swept`: the overrides of the multirun that they are one job of."""
    if isinstance(error, ConfigError):
        return error
    if hydra is not None:
        parsed, unreadable = _parsed(hydra, overrides)
        plain = [*unreadable, *(line for override in parsed for line in _unknown_choice(override, hydra))]
        if len(plain) > 1:
            return ConfigErrors(list(dict.fromkeys(plain)))
        for message in (*plain, *_override_mistakes(hydra, parsed, swept, error)):
            return ConfigError(message)
    if match := re.search(r"Too many components in '@package ([^']*)'", str(error)):
        return ConfigError(f"# @package {match[1]}: expected a name without spaces, as in '# @package evaluator.NAME'")
    if "RecursionError" in str(error) or "Recursive interpolation" in str(error):
        circular = [text for text in overrides if "${" in text] or [str(getattr(error, "full_key", None) or "")]
        return ConfigError(f"{circular[0]}: its ${{...}} leads back to itself; expected a value that is made of others")
    while error.__cause__ is not None and (not str(error) or str(error).startswith("Error merging override")):
        merged = str(error).removeprefix("Error merging override ")
        error = error.__cause__
        if merged and merged != "None":
            return ConfigError(f"{merged}: {_first_sentence(error)}")
    key = getattr(error, "full_key", None)
    return ConfigError(f"{key}: {_first_sentence(error)}" if key else _first_sentence(error))


def _first_sentence(error: BaseException) -> str:
    # What follows is a search path, a list of options or OmegaConf's own bookkeeping.
    text = re.split(r"\n\s*(?:Config search path|Search path|full_key|object_type)", str(error).strip())[0]
    return " ".join(text.split()) or type(error).__name__


def _parsed(hydra: Hydra, overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The overrides that can be read, and a message for each one that cannot."""
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    parsed, unreadable = [], []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException:
            unreadable.append(_malformed(text, hydra))
    return parsed, unreadable


def _override_mistakes(
    hydra: Hydra, parsed: Sequence[Override], swept: Sequence[str], error: BaseException
) -> Iterator[str]:
    """What else is wrong with what was typed, worst first."""
    for override in parsed:
        text, key = str(override.input_line), override.key_or_group
        if "more than once" in str(error) and override.is_add():
            yield f"{text}: this group has a choice already; expected {text.lstrip('+')}"
        if "BasicSweeper does not support" in str(error) and override.is_interval_sweep():
            yield f"{text}: a sweep needs values, {key}=A,B; an interval is searched by hydra/sweeper=optuna"
    if match := re.search(r"Could not (?:override|delete from config\.) '([^']+)'", str(error)):
        yield from _unknown_key(match[1], parsed, _parsed(hydra, swept)[0], hydra)


def _malformed(text: str, hydra: Hydra) -> str:
    if "=" in text:
        key, _, value = text.partition("=")
        # Hydra wants the quotes, and so does the shell around them.
        say = "" if set("'\"[]{}(),") & set(value) else f""", as in "{key}='{value}'\""""
        return f"{text}: cannot be read; expected key=value, with quotes around a value of special characters{say}"
    groups = [group for group in _own_groups(hydra) if text in hydra.config_loader.get_group_options(group)]
    return f"{text}: expected key=value" + (f"; did you mean {groups[0]}={text}?" if groups else "")


def _own_groups(hydra: Hydra) -> list[str]:
    groups = hydra.config_loader.list_groups("")
    return ["recipe", *(group for group in groups if group not in ("recipe", "hydra"))]


def _unknown_choice(override: Override, hydra: Hydra) -> Iterator[str]:
    group, loader = override.key_or_group, hydra.config_loader
    parent, _, last = group.rpartition("/")
    if "." in group or override.is_delete() or last not in loader.list_groups(parent):
        return
    options = loader.get_group_options(group, ObjectType.CONFIG)
    value = override.value()
    chosen = value if isinstance(value, list) else [value]
    if override.is_sweep_override():
        chosen = _values(override) if override.is_discrete_sweep() else []
    for choice in chosen:
        if str(choice) not in options:
            plugin = " (is its plug-in installed?)" if group.startswith("hydra/") else ""
            near = _meant(group, choice) or did_you_mean(str(choice), options, f"{group}={{}}")
            choice = "null" if choice is None else choice
            yield f"{group}={choice}: expected one of {', '.join(options)}{plugin}{near}"


def _meant(group: str, choice: Any) -> str:
    """What to suggest where a group was given the value of one of its choice's keys."""
    if group == "model" and isinstance(choice, str):
        if re.search(r"[/\\]|^[.~]|\.gguf$", choice) or Path(choice).exists():
            return f"; did you mean model=hf model.path={choice}?"
    if group == "sparsity" and isinstance(choice, (int, float)) and not isinstance(choice, bool):
        return f"; did you mean sparsity.ratio={choice}?"
    return ""


def _unknown_key(key: str, parsed: Sequence[Override], swept: Sequence[Override], hydra: Hydra) -> Iterator[str]:
    varied = [override for override in swept if override.is_discrete_sweep() and len(_values(override)) > 1]
    typed = next((str(override.input_line) for override in (*varied, *parsed) if override.key_or_group == key), key)
    groups = [group for group in parsed if "/" in group.key_or_group or group.key_or_group in _own_groups(hydra)]
    try:
        # The same choices without the settings: what could have been set.
        lines = [str(group.input_line) for group in groups]
        config = hydra.compose_config("config", lines, RunMode.MULTIRUN, with_log_configuration=False)
    except Exception:
        return
    choices, folders = config.hydra.runtime.choices, [Path(s.path) for s in config.hydra.runtime.config_sources]
    known = list(_dotted(OmegaConf.to_container(config, resolve=False)))
    section, _, rest = key.partition(".")
    siblings = [name for name in known if name.startswith(f"{section}.")]
    if section not in known:
        whole = sorted((name for name in known if name.endswith(f".{key}")), key=lambda name: name.count("."))
        near = f"; did you mean {typed.replace(key, whole[0], 1)}?" if whole else ""  # ratio=0.3 for sparsity.ratio=0.3
        yield f"{typed}: unknown key{near or did_you_mean(key, [*known, *_own_groups(hydra)])}"
    choice, elsewhere = f"{section}={choices.get(section)}", _keys_of_choices(section, folders)
    option, value = rest.partition(".")[0], typed.partition("=")[2]
    if option in hydra.config_loader.get_group_options(section, ObjectType.CONFIG):
        yield from _choice_as_key(section, option, typed, value, list(config[section]), elsewhere)
    if swept_over := section != "evaluator" and any(o.key_or_group in (section, "recipe") for o in varied):
        # Of all choices at once: the same line for every job that has the mistake, so that it is told once.
        siblings = [f"{section}.{name}" for name in elsewhere]
    if rest in elsewhere:
        lacks = f"not every {section} that is swept over has such a key" if swept_over else f"{choice} has no such key"
        apart = f"; expected two commands with one sweep.dir, {key} only in that of the choices that have it"
        has = f"it is one of {section}={', '.join(elsewhere[rest])}"
        yield f"{typed}: {lacks}; {has}{apart if swept_over else ''}"
    if siblings:
        near = did_you_mean(rest, [name.partition(".")[2] for name in siblings], f"{section}.{{}}")
        yield f"{typed}: unknown key; expected one of {', '.join(siblings)}{near}"
    near = did_you_mean(rest, elsewhere, f"{section}.{{}}")
    yield f"{typed}: {choice} has no keys{near}"


def _choice_as_key(
    group: str, option: str, typed: str, value: str, chosen: Sequence[Any], keys: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """What to say of a group's choice that was typed as one of its keys. `keys`: those of all choices, with the choices
    that have them."""
    if group == "evaluator":
        if option not in chosen:
            having = ",".join(map(str, [*chosen, option]))
            yield f"{typed}: evaluator {option} is not chosen; expected it to be, as in evaluator=[{having}]"
        return
    meant = f"{group}={option}"
    if option in keys.get("calibration", ()):  # files of one's own
        meant = f"{meant} {group}.calibration={value or 'FILE'} {group}.evaluation=FILE"
    yield f"{typed}: {option} is a choice, no key; did you mean {meant}?"


def _values(override: Override) -> list[str]:
    return list(override.sweep_string_iterator())


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        name = f"{prefix}{key}"
        if name.startswith("hydra") or str(key).startswith("_"):
            continue
        yield name
        yield from _dotted(value, f"{name}.")


def _keys_of_choices(group: str, folders: Iterable[Path]) -> dict[str, list[str]]:
    """Every key that some choice of the group has, and the choices that have it."""
    holders: dict[str, list[str]] = {}
    for path in sorted(path for folder in folders for path in (folder / group).glob("*.yaml")):
        for key in {key: None for file in inherited(path) for key in key_comments(file)}:
            holders.setdefault(key, []).append(path.stem)
    return {key: choices for key, choices in holders.items() if not key.startswith(("_", "defaults"))}


def key_hint(key: str, choices: Mapping[str, Any], folders: Iterable[Path]) -> str:
    """What the comment beside the key says it is, "" where there is none."""
    section, _, rest = key.partition(".")
    choice = choices.get(section)
    if section == "evaluator":  # each evaluator lies under its own name: evaluator.perplexity.batch_size
        choice, _, rest = rest.partition(".")
    path = option_file(folders, section, str(choice)) if isinstance(choice, str) else conf_folder() / "config.yaml"
    if path is None:
        return ""
    rest = rest if isinstance(choice, str) else key
    return next((comment for file in inherited(path) if (comment := key_comments(file).get(rest))), "")


def missing_key(key: str, choices: Mapping[str, Any], folders: Iterable[Path], expected: str = "") -> ConfigError:
    hint = key_hint(key, choices, folders) or expected
    return ConfigError(f"{key} is missing: expected {hint or 'a value'}")


def known_keys(present: Iterable[str], known: Sequence[str]) -> None:
    """Raises ConfigError for a key that nothing reads."""
    for key in present:
        if key not in known:
            raise ConfigError(f"{key}: unknown key; expected one of {', '.join(known)}{did_you_mean(key, known)}")
