"""Settings: flag > ``HESTCTL_*`` environment > profile (TOML) > default, each value with its origin.

Every room of the program receives only its own sub-model from here.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from hestctl import __version__
from hestctl.errors import Exit, HestError
from hestctl.records import FULL, INT8, OFF, BlockStates

DEFAULT_PROFILE = "quickstart"
_PREFIX = "HESTCTL_"

MethodName = Literal["hest", "tabs", "bhsp", "lora", "base"]
EngineName = Literal["auto", "hestctl", "transformers"]
BackbonePrecision = Literal["full", "int8"]
Scope = Literal["network", "adapter"]


def _listed(value: object) -> object:
    """A list given as text, in the environment or by a flag: ``1,4`` or ``[1, 4]``."""
    return tuple(value.strip("[] ").split(",")) if isinstance(value, str) else value


def _counts(value: tuple[int, ...]) -> tuple[int, ...]:
    if not value or min(value) < 1:
        raise ValueError("takes whole numbers of at least 1, such as 1,4")
    return value


def _meter(value: str) -> str:
    words = ("auto", "nvml", "rapl", "estimate", "none")
    if value not in words and not re.fullmatch("replay:.+", value):
        # What a Literal raises, so that the nearest word is named here as for every other choice.
        choices = ", ".join(f"'{word}'" for word in words) + " or 'replay:FILE'"
        raise PydanticKnownError("literal_error", {"expected": choices})
    return value


# NoDecode: pydantic-settings would take the environment's text for JSON, and name no key if it is not.
Choices = Annotated[tuple[int, ...], NoDecode, BeforeValidator(_listed), AfterValidator(_counts)]
Range = Annotated[tuple[float, float], NoDecode, BeforeValidator(_listed)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class BackboneSettings(_Section):
    """Which frozen causal LM, in which floating type, on which device.

    ``precision`` int8 runs all decoder layers' MatMuls in int8, and ``skip_last`` leaves the last layers out:
    the controls, in training as in generation.
    """

    name: str = "smollm2-135m"
    weights: Literal["pretrained", "random"] = "pretrained"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    precision: BackbonePrecision = "full"
    skip_last: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def blocks(self, layers: int) -> BlockStates:
        """The states that these controls give the blocks of a model of that many layers.

        Raises HestError (usage) where more layers are to be left out than there are.
        """
        if self.skip_last > layers:
            raise HestError(
                f"backbone.skip_last={self.skip_last}: {self.name} has {layers} layers",
                f"leave out at most {layers}",
                Exit.USAGE,
            )
        state = INT8 if self.precision == "int8" else FULL
        states = (state,) * (layers - self.skip_last) + (OFF,) * self.skip_last
        return BlockStates(states, states)


class DataSettings(_Section):
    """Where the samples come from; ``None`` for a count takes the whole split.

    ``units``: what a text is cut into, the tokenizer's tokens or one token a byte of UTF-8; auto takes bytes
    for lra-text, which is a task over bytes. ``instruction`` takes the place of the one before every text.
    """

    source: str = "embedded"
    train_file: Path | None = None
    validation_file: Path | None = None
    test_file: Path | None = None
    article_column: str = "article"
    summary_column: str = "highlights"
    id_column: str = "id"
    train_samples: int | None = Field(default=None, ge=1)
    validation_samples: int | None = Field(default=None, ge=1)
    test_samples: int | None = Field(default=None, ge=1)
    units: Literal["auto", "tokens", "bytes"] = "auto"
    instruction: str | None = Field(default=None, min_length=1)
    max_tokens: int = Field(default=4096, ge=16)
    max_answer_tokens: int = Field(default=256, ge=4)


class MethodSettings(_Section):
    """What is trained (METHOD names: hest, tabs, bhsp, lora, base) and its ablations.

    ``scope`` is what a budget counts: ``network`` the whole generation, with the layers' own MatMuls among
    what is chosen, ``adapter`` the directions alone. ``layers`` greedy fixes the blocks' states before
    training, by sensitivity for joules: the control of what learning the choice is worth.
    """

    name: MethodName = "hest"
    scope: Scope = "network"
    layers: Literal["learned", "greedy"] = "learned"
    rank: int = Field(default=16, ge=1, le=256)
    controller_width: int = Field(default=32, ge=1, le=1024)
    controller: Literal["factorised", "unfactorised"] = "factorised"
    precision: Literal["mixed", "fp16-only"] = "mixed"
    tau: float = Field(default=0.67, gt=0, le=10)
    lora_rank: int = Field(default=8, ge=1, le=256)
    lora_alpha: float = Field(default=16.0, gt=0)


class BudgetSettings(_Section):
    """The budget in joules per sample, and the multiplier that enforces it in training.

    ``envelope`` matched allows every sample a ratio of what TABS spends at its very lengths, absolute one
    number whatever the lengths; auto takes matched in scope network, absolute in scope adapter and for
    joules given outright. A plan fits prompts of ``shortest`` to ``longest`` tokens (None: from the shortest
    prompt of the validation and test splits to data.max_tokens), and generation refuses others that do not
    fit. ``spend`` useful leaves joules unspent that buy no likelihood.

    In scope network blocks start by their ``sensitivity``, over so many training samples: by one backward
    pass each, or exactly, block after block. The budget tightens from all that the backbone spends to E_max
    over the first ``tighten`` of training after the warm-up; blocks draw their states until ``settle`` of it
    and keep them from there on, after so many ``swaps`` were tried on the samples of the sensitivities.
    """

    emax_ratio: float | None = Field(default=0.6, gt=0, le=10)
    emax_j: float | None = Field(default=None, gt=0)
    reference: str | None = None
    dual: Literal["pi", "clamp", "plain", "none"] = "pi"
    alpha: float = Field(default=0.05, gt=0, le=1)
    lambda0: float = Field(default=0.1, ge=0)
    margin: float = Field(default=0.01, ge=0, lt=0.5)
    envelope: Literal["auto", "matched", "absolute"] = "auto"
    spend: Literal["useful", "all"] = "useful"
    shortest: int | None = Field(default=None, ge=1)
    longest: int | None = Field(default=None, ge=1)
    sensitivity: Literal["gradient", "exact"] = "gradient"
    sensitivity_samples: int = Field(default=8, ge=2)
    swaps: int = Field(default=24, ge=0)
    tighten: float = Field(default=0.1, ge=0, le=1)
    settle: float = Field(default=0.1, ge=0, le=1)


class TrainSettings(_Section):
    """The optimiser, its schedule, and when to look, to save and to stop.

    ``learning_rate`` is for directions and LoRA matrices, ``scale_learning_rate`` for their scales s,
    ``gate_learning_rate`` for controllers, ``threshold_learning_rate`` for thresholds (in spreads of
    their layer's scores), ``block_learning_rate`` for those of whole blocks. ``max_energy_j`` is what a
    run's training may spend by the live meter, over all restarts: evaluations and checkpoints in it count.
    ``rank_timeout_s``: how long one of several processes waits for the others, evaluations among that.
    """

    epochs: int = Field(default=3, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    max_energy_j: float | None = Field(default=None, gt=0)
    learning_rate: float = Field(default=3e-5, gt=0)
    gate_learning_rate: float = Field(default=1e-3, gt=0)
    threshold_learning_rate: float = Field(default=0.03, gt=0)
    block_learning_rate: float = Field(default=0.1, gt=0)
    scale_learning_rate: float = Field(default=0.02, gt=0)
    warmup_steps: int = Field(default=500, ge=0)
    batch_size: int = Field(default=4, ge=1)
    accumulation: int = Field(default=8, ge=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool = False
    eval_steps: int = Field(default=200, ge=1)
    save_steps: int = Field(default=1000, ge=1)
    log_steps: int = Field(default=50, ge=1)
    patience: int = Field(default=3, ge=1)
    early_stop_samples: int = Field(default=16, ge=0)
    keep_checkpoints: int = Field(default=2, ge=1)
    seed: int = Field(default=42, ge=0)
    rank_timeout_s: float = Field(default=7200.0, gt=0)


class GenerationSettings(_Section):
    """How text is generated in every evaluation, the same for every method."""

    new_tokens: int = Field(default=128, ge=1, le=4096)
    num_beams: int = Field(default=1, ge=1, le=16)
    batch_size: int = Field(default=1, ge=1, le=256)
    engine: EngineName = "auto"


class EnergySettings(_Section):
    """The meter, and what ``calibrate`` measures with it.

    ``nominal_watts`` is per busy core and serves the estimate alone. Every figure of the energy table is
    metered for five times ``calibration_s`` seconds at least, and until the meter's bound on it is within
    ``calibration_precision``. ``lengths`` are prompt tokens; the meter's own check takes ``check_samples``
    samples of known relative work.
    """

    meter: Annotated[str, AfterValidator(_meter)] = "auto"
    nominal_watts: float = Field(default=8.0, gt=0)
    poll_s: float = Field(default=0.005, gt=0, le=1)
    calibration_s: float = Field(default=0.3, gt=0, le=60)
    calibration_precision: float = Field(default=0.02, gt=0, lt=1)
    lengths: Choices = (64, 256, 512)
    batch_sizes: Choices = (1,)
    check_samples: int = Field(default=30, ge=4, le=1000)


class ProfileSettings(_Section):
    """What ``hestctl profile`` sweeps: lengths up to ``seq_len`` tokens.

    A sample is generated again and again until the meter's bound on its joules is within ``precision``.
    """

    seq_len: int = Field(default=1024, ge=16)
    batch_sizes: Choices = (1,)
    new_tokens: int = Field(default=128, ge=1)
    repeats: int = Field(default=3, ge=1)
    precision: float = Field(default=0.05, gt=0, lt=1)


class SearchSettings(_Section):
    """The Optuna search: ranges are ``[low, high]``, choices are lists.

    ``trials`` are counted over all workers, ``workers`` is how many processes of this machine try them.
    ``joules`` auto takes the meter's where one measures and a single process works, else those that the
    energy table predicts; only a search by predicted joules can be joined.
    """

    trials: int = Field(default=0, ge=0)
    workers: int = Field(default=1, ge=1, le=256)
    joules: Literal["auto", "predicted"] = "auto"
    timeout_min: float = Field(default=360.0, gt=0)
    learning_rate: Range = (1e-5, 5e-4)
    controller_width: Choices = (16, 32, 64)
    emax_ratio: Range = (0.4, 0.8)
    tau: Range = (0.4, 1.0)
    alpha: Range = (0.01, 0.2)
    batch_size: Choices = (2, 4)
    accumulation: Choices = (4, 8, 16)

    @field_validator("learning_rate", "emax_ratio", "tau", "alpha")
    @classmethod
    def _rising(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("a range is two numbers above 0, the lower one first, such as 0.4,0.8")
        return value


class Settings(BaseSettings):
    """Everything a command may be told; one sub-model a room."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, validate_default=True
    )

    backbone: BackboneSettings = BackboneSettings()
    data: DataSettings = DataSettings()
    method: MethodSettings = MethodSettings()
    budget: BudgetSettings = BudgetSettings()
    train: TrainSettings = TrainSettings()
    generation: GenerationSettings = GenerationSettings()
    energy: EnergySettings = EnergySettings()
    profile: ProfileSettings = ProfileSettings()
    search: SearchSettings = SearchSettings()
    db: Path = Path("runs.duckdb")

    @model_validator(mode="after")
    def _room_for_the_answer(self) -> Settings:
        if self.data.max_answer_tokens >= self.data.max_tokens:
            raise ValueError(
                f"data.max_answer_tokens = {self.data.max_answer_tokens} leaves no room for a text "
                f"in data.max_tokens = {self.data.max_tokens}"
            )
        return self


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings, and for every dotted key where its value came from."""

    settings: Settings
    origins: Mapping[str, str]
    profile: str


def with_values(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """A copy with some dotted keys changed, validated. Raises HestError (usage) for a bad value."""
    document = settings.model_dump()
    for key, value in values.items():
        *parents, leaf = key.split(".")
        room = document
        for parent in parents:
            room = room[parent]
        room[leaf] = value
    return from_document(document)


def from_document(document: Mapping[str, Any]) -> Settings:
    """Settings as a run recorded them. Raises HestError (usage) where they no longer fit."""
    rooms: dict[str, Any] = {}
    for name, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            try:
                rooms[name] = field.annotation.model_validate(document[name])
            except (ValidationError, KeyError) as error:
                why = _told(error, name) if isinstance(error, ValidationError) else f"no section '{name}'"
                raise HestError(
                    f"these settings do not fit hestctl {__version__}: {why}", "train again", Exit.USAGE
                ) from None
    return Settings.model_construct(**rooms, db=Path(document["db"]))


def of_run(resolved: Resolved, document: Mapping[str, Any]) -> Settings:
    """The settings a run was made with, under whatever this call sets by flag or environment.

    What is a matter of the call and not of the run (meter, profile sweep, search, store) is this
    call's. Raises HestError (usage) where the run's settings no longer fit.
    """
    own = ("energy.", "profile.", "search.", "db")
    recorded = from_document(document)
    told = dict(flatten(resolved.settings.model_dump()))
    changes = {
        key: told[key]
        for key, origin in resolved.origins.items()
        if origin in ("flag", "environment") or key.startswith(own)
    }
    return with_values(recorded, changes)


def of_profile(name: str) -> Settings:
    """The settings of a shipped profile alone, whatever flags and the environment say.

    Raises HestError (usage) for an unknown profile.
    """
    table = _read_toml(_profile_path(name))
    document: dict[str, Any] = {}
    for room, field in Settings.model_fields.items():
        own = table.get(room, {})
        document[room] = (
            {**field.default.model_dump(), **own}
            if isinstance(field.default, BaseModel)
            else own or field.default
        )
    return from_document(document)


def profile_dir() -> Path:
    """The folder of the shipped profiles: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).with_name("profiles")
    return inside if inside.is_dir() else Path(__file__).parent.parent / "profiles"


def profile_names() -> list[str]:
    """The names that ``--profile`` accepts besides a path."""
    return sorted(path.stem for path in profile_dir().glob("*.toml"))


def keys(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Every dotted settings key, such as ``train.learning_rate``."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def load(
    profile: str = DEFAULT_PROFILE,
    flags: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
) -> Resolved:
    """Resolve the settings from all four sources.

    ``flags`` maps dotted keys to values; ``None`` values are flags that were not given. ``names`` says
    what the user typed for a key, such as ``--lr``. A budget as a ratio and one in joules exclude each
    other: the one from the stronger source holds.
    Raises HestError (usage) for an unknown profile, key or variable, malformed TOML, or a value out
    of range, naming the source, the key and the nearest match.
    """
    path = _profile_path(profile)
    table = _read_toml(path)
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    _check_environment()
    sources: dict[str, Mapping[str, Any]] = {
        "flag": given,
        "environment": _environment(),
        f"profile {profile}": dict(flatten(table)),
    }

    def where(key: str) -> str:
        match _origin(key, sources):
            case "flag":
                return (names or {}).get(key, "a flag")
            case "environment":
                return _variable(key)
            case _:
                return str(path)

    for values in sources.values():
        for key in values:
            _check_key(key, where(key))

    class FromProfile(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, path)

    origins = {key: _origin(key, sources) for key in keys()}
    try:
        loaded = FromProfile(**_nest(given))
    except ValidationError as error:
        sources_told = {key: where(key) for key, origin in origins.items() if origin != "default"}
        raise HestError(
            _told(error, places=sources_told), "`hestctl env --settings` shows every key", Exit.USAGE
        ) from None
    settings = Settings.model_construct(**{name: getattr(loaded, name) for name in Settings.model_fields})
    if _prefers_ratio(sources):
        settings = with_values(settings, {"budget.emax_j": None})
        origins["budget.emax_j"] = origins["budget.emax_ratio"]
    return Resolved(settings, origins, profile)


def _prefers_ratio(sources: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the strongest source that gives a budget gives a ratio. It cannot give joules as well."""
    for label, values in sources.items():
        given = [name for name in ("budget.emax_ratio", "budget.emax_j") if name in values]
        if len(given) == 2:
            raise HestError(
                f"two budgets, {' and '.join(given)}, from one source ({label})",
                "give --emax-ratio (of what TABS spends) or --emax (joules)",
                Exit.USAGE,
            )
        if given:
            return given == ["budget.emax_ratio"]
    return False


def _profile_path(profile: str) -> Path:
    path = Path(profile) if profile.endswith(".toml") else profile_dir() / f"{profile}.toml"
    if path.is_file():
        return path
    if profile.endswith(".toml"):
        siblings = [file.name for file in path.parent.glob("*.toml")]
        raise HestError(
            f"no profile file at {path}{_nearest(path.name, siblings)}",
            f"give the path of a TOML file, or a shipped name: {', '.join(profile_names())}",
            Exit.USAGE,
        )
    raise HestError(
        f"unknown profile '{profile}'{_nearest(profile, profile_names())}",
        f"profiles: {', '.join(profile_names())}; or the path of a TOML file",
        Exit.USAGE,
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise HestError(f"{path} is not valid TOML: {error}", "mend that line", Exit.USAGE) from None


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested tables."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        room = nested
        for parent in parents:
            room = room.setdefault(parent, {})
        room[leaf] = value
    return nested


def _environment() -> dict[str, str]:
    return {
        name[len(_PREFIX) :].lower().replace("__", "."): value
        for name, value in os.environ.items()
        if name.startswith(_PREFIX) and name not in RESERVED_VARIABLES
    }


RESERVED_VARIABLES = frozenset({"HESTCTL_CACHE", "HESTCTL_DEBUG"})
"""Variables that are not settings: where downloads are kept, and tracebacks."""


def _variable(key: str) -> str:
    return _PREFIX + key.upper().replace(".", "__")


def _check_environment() -> None:
    known = set(keys())
    for key in _environment():
        if key not in known:
            raise HestError(
                f"unknown environment variable {_variable(key)}"
                + _nearest(_variable(key), [_variable(name) for name in known]),
                "unset it, or use a key that `hestctl env --settings` lists",
                Exit.USAGE,
            )


def _check_key(key: str, where: str) -> None:
    known = list(keys())
    if key not in known:
        raise HestError(
            f"unknown key '{key}' in {where}{_nearest(key, known)}",
            "`hestctl env --settings` lists every key",
            Exit.USAGE,
        )


def _nearest(word: str, known: list[str]) -> str:
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{match[0]}'?" if match else ""


def _origin(key: str, sources: Mapping[str, Mapping[str, Any]]) -> str:
    return next((label for label, values in sources.items() if key in values), "default")


def _told(error: ValidationError, room: str | None = None, places: Mapping[str, str] | None = None) -> str:
    """What is wrong, once for each key; ``places`` says where a key's value comes from."""
    lines: dict[str, str] = {}
    for problem in error.errors():
        parts = [room, *(part for part in problem["loc"] if isinstance(part, str))]
        key = ".".join(part for part in parts if part)
        text = problem["msg"].removeprefix("Value error, ")
        if not key:
            lines[key] = text
            continue
        near = ""
        if problem["type"] == "literal_error":
            near = _nearest(str(problem["input"]), re.findall(r"'([^']*)'", problem["ctx"]["expected"]))
        place = (places or {}).get(key)
        given = "" if places is not None and place is None else f", not {problem['input']!r}"
        lines.setdefault(key, f"{key}: {text}{given}{near}" + (f" (from {place})" if place else ""))
    return "; ".join(lines.values())
