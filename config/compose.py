"""From the command line to a typed configuration: Hydra composes, pydantic checks, errors name the nearest
valid key."""

import hashlib
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from config import ancestors
from config.translation import configuration_name
from training.config import TrainingConfig
from utils.config import Config
from utils.errors import UserError, nearest, reports_user_errors

CONFIG_DIR = Path(__file__).resolve().parent
T = TypeVar("T", bound=Config)
NO_GROUPS = ("parts", "sweep")  # what files are made of, and what tools.sweep searches: nobody's choice
LONGEST_NAME = 150  # characters of a run of a sweep
# Hydra does not change the working directory and writes no files of its own (a sweep: its description, in
# outputs/).
_QUIET = [
    "hydra.run.dir=.",
    "hydra.sweep.dir=outputs",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
]


def launch(config_name: str, schema: type[T], job: Callable[[T], None], about: str | None = None) -> None:
    """Run `job` with the configuration that sys.argv asks for.

    Hydra's own flags work as usual: --cfg job, --help, -m, -sc. --help prints `about` first.
    """
    if {"-sc", "--shell-completion"} & set(sys.argv):  # its arguments are no settings
        _started_by_hydra(config_name, lambda composed: None)
        return
    if about and {"-h", "--help"} & set(sys.argv):
        print(about)
    chosen, arguments = configuration_name(sys.argv[1:])
    as_typed = partial(_compose_as_typed, schema)
    config_name, arguments = ancestors.translated(chosen or config_name, arguments, as_typed)
    if not any(argument.startswith("-") for argument in arguments):
        job(validate(schema, as_typed(config_name, arguments)[0]))
        return

    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    flags = [argument for argument in arguments if argument not in overrides]
    sweep = bool({"-m", "--multirun"} & set(flags))
    overrides = _as_typed(schema, overrides, sweep)
    if sweep:
        _check_sweep(config_name, overrides)
    else:
        overrides = compose(config_name, overrides)[1]

    @reports_user_errors
    def checked_job(composed: DictConfig) -> None:
        config = validate(schema, composed)
        job(_named_by_sweep(config, overrides) if sweep else config)

    sys.argv[1:] = [*flags, *overrides, *_QUIET]
    _started_by_hydra(config_name, checked_job)


def _started_by_hydra(config_name: str, job: Callable[[DictConfig], None]) -> None:
    """Have Hydra read sys.argv."""
    hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(job)()


def load(schema: type[T], config_name: str, overrides: list[str]) -> T:
    """The typed configuration of a YAML file and overrides; for scripts and tests that do not own
    sys.argv."""
    as_typed = partial(_compose_as_typed, schema)
    return validate(schema, as_typed(*ancestors.translated(config_name, overrides, as_typed))[0])


def _compose_as_typed(
    schema: type[Config], config_name: str, overrides: list[str]
) -> tuple[DictConfig, list[str]]:
    return compose(config_name, _as_typed(schema, overrides))


def as_overrides(values: dict[str, Any]) -> list[str]:
    """Plain values as overrides that mean exactly them."""
    return [f"{key}={as_text(value)}" for key, value in values.items()]


def as_text(value: Any) -> str:
    """A plain value as it is typed on a command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def compose(config_name: str, overrides: list[str]) -> tuple[DictConfig, list[str]]:
    """The composed configuration and the overrides without needless `+`, paths quoted. Raises `UserError` for
    what does not exist."""
    overrides = [_with_quoted_path(override) for override in overrides]
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        try:
            if any(override.startswith("+") for override in overrides):
                known = _keys(
                    hydra.compose(
                        config_name, [override for override in overrides if not override.startswith("+")]
                    )
                )
                overrides = [
                    o[1:] if o.startswith("+") and o[1:].split("=", 1)[0] in known else o for o in overrides
                ]
            return hydra.compose(config_name, overrides), overrides
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(_explain(config_name, overrides, error)) from None


def validate(schema: type[T], composed: DictConfig) -> T:
    """Check types and rules. Raises `UserError` with one line per problem."""
    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = str(error).splitlines()[0].rsplit(": ", 1)[-1]
        raise UserError(f"{key} has no default; give it as {key}=VALUE") from None
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from None
    try:
        return schema(**cast(dict[str, Any], values))
    except ValidationError as error:
        # The members of a union that a value does not fit give one line together.
        problems = dict.fromkeys(_problem(schema, problem) for problem in error.errors())
        raise UserError("\n       ".join(problems)) from None


def _as_typed(schema: type[Config], overrides: list[str], sweep: bool = False) -> list[str]:
    """The overrides with every name quoted: `run_name=1e5` and `task_id=1_2` are words, whatever numbers they
    look like."""
    words = _words(schema)
    return [
        _quoted_words(override, sweep) if override.split("=", 1)[0] in words else override
        for override in overrides
    ]


def _words(schema: type[Config], prefix: str = "") -> set[str]:
    """The dotted keys of `schema` that hold a word and nothing else."""
    found = set()
    for name, field in schema.model_fields.items():
        types = _types(field.annotation)
        if types <= {str, type(None)}:
            found.add(prefix + name)
        for inner in types:
            if isinstance(inner, type) and issubclass(inner, Config):
                found |= _words(inner, f"{prefix}{name}.")
    return found


def _types(annotation: Any) -> set[Any]:
    """The types that an annotation allows: the members of unions, without what Annotated adds."""
    if get_origin(annotation) is Annotated:
        return _types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_types, get_args(annotation)))
    return {annotation}


def _quoted_words(override: str, sweep: bool) -> str:
    """`key=value` with each value quoted that Hydra would read as something else than the word that was
    typed."""
    key, _, text = override.partition("=")
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return override
    if sweep and parsed.is_sweep_override():
        return f"{key}={','.join(_quoted_word(word) for word in text.split(','))}"
    if parsed.is_sweep_override() or not isinstance(parsed.value(), (str, QuotedString)):
        return f"{key}={_quoted_word(text)}"
    return override


def _quoted_word(text: str) -> str:
    return (
        text if text in ("", "null") or not text.isprintable() or "'" in text or '"' in text else f"'{text}'"
    )


def _swept(overrides: list[str]) -> dict[str, list[str]]:
    """The overrides of a sweep that take several values, each as the overrides that a run of it gets."""
    found = {}
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException:
            continue  # `compose` says what is wrong with it
        if parsed.is_sweep_override():
            found[override] = [
                f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()
            ]
    return found


def _check_sweep(config_name: str, overrides: list[str]) -> None:
    """Compose with every value of the sweep once, so that a mistake in it ends the sweep before its first
    run."""
    swept = _swept(overrides)
    first = {override: values[0] for override, values in swept.items()}
    for override, values in swept.items() if swept else {"": [""]}.items():
        for value in values:
            compose(config_name, [{**first, override: value}.get(given, given) for given in overrides])


def _named_by_sweep(config: T, overrides: list[str]) -> T:
    """The run under a name of its own: two runs of a sweep must not meet in one folder."""
    keys = [override.split("=", 1)[0] for override in _swept(overrides)]
    if not isinstance(config, TrainingConfig) or "run_name" in keys:
        return config
    values = dict(override.split("=", 1) for override in HydraConfig.get().overrides.task if "=" in override)
    differs = ",".join(f"{key}={values[key]}" for key in keys if key in values)
    safe = re.sub(r"[^\w.=,+-]", "_", f"{config.name}-{differs}")
    if len(safe) > LONGEST_NAME:  # a file system's limit is 255
        safe = f"{safe[:LONGEST_NAME]}-{hashlib.sha256(safe.encode()).hexdigest()[:8]}"
    return config.model_copy(update={"run_name": safe})


def _with_quoted_path(override: str) -> str:
    """The override as Hydra reads it, whose grammar knows few characters beside ASCII letters: a path may
    have any name."""
    key, _, value = override.partition("=")
    if "/" not in value and not os.path.exists(value):
        return override
    try:
        if not OverridesParser.create().parse_override(override).is_sweep_override():
            return override
    except HydraException:
        pass
    quoted = value.replace("'", r"\'")
    return f"{key}='{quoted}'"


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        keys.append(prefix + str(key))
        value = config._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none():
            keys += _keys(value, f"{prefix}{key!s}.")
    return keys


def _explain(config_name: str, overrides: list[str], error: Exception) -> str:
    """Name the override that is wrong, and what was probably meant."""
    groups = {
        path.name: [file.stem for file in sorted(path.glob("*.yaml"))]
        for path in CONFIG_DIR.iterdir()
        if path.is_dir() and path.name not in NO_GROUPS
    }
    if not (CONFIG_DIR / f"{config_name}.yaml").is_file():
        names = [*(file.stem for file in CONFIG_DIR.glob("*.yaml")), *ancestors.CONFIGS]
        hint = nearest(config_name, names)
        return f"there is no configuration '{config_name}'{hint}; there are {', '.join(sorted(names))}"
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as problem:
        form = "overrides have the form key=value, or \"key='value'\" for unusual characters"
        return f"cannot read the command line: {str(problem).splitlines()[0]}; {form}"
    for text, override in zip(overrides, parsed, strict=True):
        if override.key_or_group in groups and override.value() is None and not override.is_delete():
            choices = ", ".join(groups[override.key_or_group])
            return f"{text} is no choice; leave it out, or choose one of {choices}"
    good: list[str] = []
    for text, override in zip(overrides, parsed, strict=True):
        try:
            hydra.compose(config_name, [*good, text])
            good.append(text)
        except (HydraException, OmegaConfBaseException) as problem:
            key, value = override.key_or_group, override.value()
            if key in groups and isinstance(value, str) and value not in groups[key]:
                hint = nearest(value, groups[key])
                return f"{key}={value}: there is no such {key}{hint}; there are {', '.join(groups[key])}"
            known = _keys(hydra.compose(config_name, good))
            if key in groups and key in known:
                return f"{text}: {key} cannot be chosen with this configuration"
            if key not in known:
                theirs = ancestors.keys_of(config_name)
                return f"unknown key '{key}'{nearest(key, [*known, *groups, *theirs])}"
            return f"{text}: {str(problem).splitlines()[0]}"
    return str(error).splitlines()[0]


def _problem(schema: type[Config], problem: ErrorDetails) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest(key, schema.model_fields)}"
    if problem["type"] == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] == "string_pattern_mismatch":
        return (
            f"{key}={problem['input']}: a name is made of letters, digits and _ . = , + -; "
            "its first character that is no point is a letter, a digit or _"
        )
    field, alternatives = _alternatives(schema, problem["loc"])
    inside = problem["loc"][field.count(".") + 2 :]  # the part between is pydantic's name of a member
    if alternatives and not inside:
        return f"{field}={problem['input']}: it may be {alternatives}"
    if alternatives:
        key = ".".join([field, *map(str, inside)])
    hint = (
        nearest(
            str(problem["input"]),
            [w.strip("' ") for w in problem["ctx"]["expected"].replace(" or ", ",").split(",")],
        )
        if problem["type"] == "literal_error"
        else ""
    )
    return f"{key}={problem['input']}: {problem['msg'][0].lower()}{problem['msg'][1:]}{hint}"


def _alternatives(schema: type[Config], loc: tuple[int | str, ...]) -> tuple[str, str]:
    """The dotted key of the field that an error lies in, and what it may hold if it has several types."""
    # pydantic tells of every member of a union that a value does not fit, under a name of its own making.
    annotation: Any = schema
    depth = 0
    for part in loc:
        models = [kind for kind in _types(annotation) if isinstance(kind, type) and issubclass(kind, Config)]
        fields = [model.model_fields[str(part)] for model in models if part in model.model_fields]
        if not fields:
            break
        annotation, depth = fields[0].annotation, depth + 1
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    several = len([member for member in members if member is not type(None)]) > 1
    if not several or any(isinstance(kind, type) and issubclass(kind, Config) for kind in _types(annotation)):
        return "", ""
    words = [word for member in members for word in _described(member)]
    return ".".join(map(str, loc[:depth])), f"{', '.join(words[:-1])} or {words[-1]}"


_TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}
_LIMIT_WORDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}


def _described(member: Any) -> list[str]:
    """One member of a union in words: its type and limits, or the words that it allows."""
    if get_origin(member) is Literal:
        return [str(word) for word in get_args(member)]
    if member is bool:
        return ["true", "false"]
    kind, *extra = get_args(member) if get_origin(member) is Annotated else (member,)
    limits = [
        f"{words} {getattr(limit, name)}"
        for one in extra
        for limit in (one.metadata if isinstance(one, FieldInfo) else [one])
        for name, words in _LIMIT_WORDS.items()
        if getattr(limit, name, None) is not None
    ]
    return [" ".join([_TYPE_WORDS.get(get_origin(kind) or kind, str(kind)), " and ".join(limits)]).strip()]
