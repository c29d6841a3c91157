"""Spec: a frozen, keyword-only dataclass of plain values and other specs.

A spec *is* the choice it describes: `attention=MHA(heads=8)` in Python is `attention: {type: mha, heads: 8}` in YAML.
Subclasses become dataclasses by themselves. One that can be chosen among others names its type,

    class Norm(Spec): ...                     # a family
    class RMSNorm(Norm, type="rmsnorm"):      # one kind of it
        eps: UnitInterval = 1e-5

and its values are checked when it is made, so a spec that exists is well-formed. Rules that span fields go into
`check()`. Everything that is wrong is told as a `SpecError` with the dotted path of the field.
"""

import contextlib
import contextvars
import dataclasses
import difflib
import functools
import importlib.metadata
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, dataclass_transform

import yaml

from mosaic_dist.credentials import ADVICE, mask_urls
from mosaic_dist.errors import UserError


class SpecError(UserError):
    """A value that a spec refuses. `path` is its dotted place, `reason` says what is wrong and what would be right."""

    def __init__(self, path: str, reason: str):
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}" if path else reason)

    def under(self, prefix: str) -> "SpecError":
        """The same error seen from the parent that holds the spec at `prefix`."""
        return type(self)(join(prefix, self.path), self.reason)


class UnknownKindError(SpecError):
    """A type name that no class here has: it is misspelt, or the module that defines it was not imported."""


@contextlib.contextmanager
def at(path: str) -> Iterator[None]:
    """Spec errors raised inside are told with their path below `path`."""
    try:
        yield
    except SpecError as error:
        raise error.under(path) from None


@dataclasses.dataclass(frozen=True)
class Range:
    """Closed interval that a number must lie in; for annotations: `Annotated[int, Range(1)]`."""

    low: float = -math.inf
    high: float = math.inf

    def describe(self) -> str:
        """The interval in words."""
        if self.high == math.inf:
            return f"at least {self.low:g}"
        return f"at most {self.high:g}" if self.low == -math.inf else f"between {self.low:g} and {self.high:g}"


Positive = Annotated[int, Range(1)]
NonNegative = Annotated[int, Range(0)]
UnitInterval = Annotated[float, Range(0.0, 1.0)]
PositiveFloat = Annotated[float, Range(1e-30)]
NonNegativeFloat = Annotated[float, Range(0.0)]


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Spec:
    """Base of all specs. See the module's text."""

    type_name: ClassVar[str | None] = None

    def __init_subclass__(cls, *, type: str | None = None, **rest: Any):
        super().__init_subclass__(**rest)
        cls.type_name = type
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for name, annotation in fields(type(self)).items():
            value = parse(annotation, getattr(self, name), name)
            _refuse_credentials(value, name)
            object.__setattr__(self, name, value)
        if not (_keeps_unknown.get() and holds_unknown(self)):
            self.validate()

    def validate(self) -> None:
        """Refuse values that do not go together: raise `SpecError(field, reason)`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, lists and dicts, with every field written out and every kind named."""
        named = {} if self.type_name is None else {"type": self.type_name}
        return named | {name: _plain(getattr(self, name)) for name in fields(type(self))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises `SpecError` with the path of the first thing that is wrong."""
        return typing.cast(Self, parse(cls, data, ""))

    def to_yaml(self) -> str:
        """`to_dict` as YAML, with repeated list items folded into `{repeat: n, of: [...]}`."""
        return yaml.safe_dump(_fold(self.to_dict()), sort_keys=False, width=120)

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """The inverse of `to_yaml`. Raises `SpecError`, also for text that is not YAML."""
        try:
            data = yaml.load(text, Loader=_YamlLoader)
        except yaml.YAMLError as error:
            raise SpecError("", f"not valid YAML: {' '.join(str(error).split())}") from None
        return cls.from_dict(data)


S = TypeVar("S", bound=Spec)


class UnknownPart(Spec):
    """A part of a kind that is not known here, as it was written. It can be compared with others, and not be built."""

    kind: str
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Nothing is known that could be checked."""

    def to_dict(self) -> dict[str, Any]:
        """What was written."""
        return {"type": self.kind, **self.settings}


_keeps_unknown = contextvars.ContextVar("keeps_unknown", default=False)


@contextlib.contextmanager
def unknown_parts_kept() -> Iterator[None]:
    """Specs read inside hold an `UnknownPart` for each part of an unknown kind; what holds one is not checked."""
    token = _keeps_unknown.set(True)
    try:
        yield
    finally:
        _keeps_unknown.reset(token)


@contextlib.contextmanager
def recipe_asked_for(file: Callable[[], str] = lambda: "FILE") -> Iterator[None]:
    """An unknown kind inside is an error that asks for the recipe which defines it, by the name that `file` finds."""
    try:
        yield
    except UnknownKindError as error:
        raise UserError(f"{error}; if it is a part of your own, add --recipe {file()}") from None


_FIELDS: dict[type[Spec], dict[str, Any]] = {}


def fields(cls: type[Spec]) -> dict[str, Any]:
    """Field names and resolved annotations (with `Annotated` bounds) of a spec class, in order."""
    if cls not in _FIELDS:
        hints = typing.get_type_hints(cls, include_extras=True)
        _FIELDS[cls] = {field.name: hints[field.name] for field in dataclasses.fields(typing.cast(Any, cls))}
    return _FIELDS[cls]


def kinds(family: type[Spec]) -> dict[str, type[Spec]]:
    """All kinds of a family by type name; the family itself is one when it names a type."""
    found = {} if family.type_name is None else {family.type_name: family}
    for child in family.__subclasses__():
        found |= kinds(child)
    return found


PARTS_GROUP = "mosaic_dist.parts"
"""Entry points of installed packages: modules that define kinds."""


@functools.cache
def load_installed_parts() -> None:
    """Import the modules that installed packages name as entry points, which makes their kinds known."""
    for entry in importlib.metadata.entry_points(group=PARTS_GROUP):
        try:
            entry.load()
        except Exception as error:
            raise UserError(
                f"the entry point {entry.name} = {entry.value} of {PARTS_GROUP} cannot be imported "
                f"({type(error).__name__}: {error}); update or uninstall the package that names it"
            ) from error


def parts(spec: Spec) -> Iterator[Spec]:
    """A spec and all specs in it."""
    yield spec
    for name in fields(type(spec)):
        value = getattr(spec, name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Spec):
                yield from parts(part)


def holds_unknown(spec: Spec) -> bool:
    """Whether a part is of an unknown kind, so that the spec can be compared and not be built."""
    return any(isinstance(part, UnknownPart) for part in parts(spec))


def own_parts(spec: Spec) -> dict[str, str]:
    """Kinds in a spec that neither this package nor an installed one brings, with the files that define them."""
    packages = {entry.module.partition(".")[0] for entry in importlib.metadata.entry_points(group=PARTS_GROUP)}
    packages.add(__name__.partition(".")[0])
    found = {}
    for cls in {type(part) for part in parts(spec)}:
        if cls.type_name is not None and cls.__module__.partition(".")[0] not in packages:
            module = sys.modules.get(cls.__module__)
            found[cls.type_name] = str(getattr(module, "__file__", cls.__module__))  # a notebook has no file
    return found


def nearest(name: str, known: Sequence[str]) -> str:
    """The ending of an error about an unknown name: the closest known one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known)) or 'none'}"


def join(prefix: str, path: str) -> str:
    """Put a path below a prefix: `a` + `b` = `a.b`, `a` + `[0].b` = `a[0].b`."""
    return prefix + path if not prefix or not path or path.startswith("[") else f"{prefix}.{path}"


def _refuse_credentials(value: Any, path: str) -> None:
    """Raise SpecError for a credential: specs are written to run folders, trackers and reports as they are."""
    if isinstance(value, str) and mask_urls(value) != value:
        raise SpecError(path, f"{mask_urls(value)!r} has credentials in a URL, which would be written down; {ADVICE}")
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            _refuse_credentials(item, f"{path}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_credentials(item, join(path, key))


# --- plain values -> typed values ---------------------------------------------------------------------------------


class Word(str):
    """A word of the command line: text as it stands where text is expected, else what `read` makes of it."""

    read: Callable[[str], Any]

    def __new__(cls, text: str, read: Callable[[str], Any]) -> Self:
        """`read` gives the value that the text is written for, or the text itself."""
        word = super().__new__(cls, text)
        word.read = read
        return word

    def meant_for(self, annotation: Any) -> Any:
        """The plain value where `annotation` is expected; `None` means no value wherever there may be none."""
        arms, text = list(_arms(annotation)), str(self)
        if str not in arms:
            return self.read(text)
        return None if text == "None" and types.NoneType in arms else text


def _arms(annotation: Any) -> Iterator[Any]:
    """The types that an annotation allows, without bounds."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        yield from _arms(arguments[0])
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _arms(argument)
    else:
        yield annotation


def parse(annotation: Any, value: Any, path: str) -> Any:
    """Check a value against an annotation and return it in its typed form; `SpecError` at `path` if it does not fit.

    Understands bool, int, float, str, None, `Literal`, `Annotated[..., Range]`, unions, `tuple[X, ...]`,
    `dict[str, X]` and specs (an instance, a dict, or the bare type name of a kind). A `Word` stands for what it means
    here.
    """
    if isinstance(value, Word):
        value = value.meant_for(annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _parse_bounded(arguments[0], arguments[1:], value, path)
    if origin in (Union, types.UnionType):
        return _parse_union(arguments, value, path)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise SpecError(path, f"{value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise SpecError(path, f"expected a list, got {_show(value)}")
        return tuple(parse(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(_unfold(value, path)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise SpecError(path, f"expected a mapping, got {_show(value)}")
        return {str(key): parse(arguments[1], item, join(path, str(key))) for key, item in value.items()}
    if annotation is None or annotation is types.NoneType:
        if value is not None:
            raise SpecError(path, f"expected nothing (null), got {_show(value)}")
        return None
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return _parse_spec(annotation, value, path)
    return _parse_scalar(annotation, value, path)


def _parse_scalar(annotation: type, value: Any, path: str) -> Any:
    if annotation is bool and value in ("true", "false"):  # as YAML has it; the command line knows Python's words
        return value == "true"
    if annotation is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
        raise SpecError(path, f"expected {annotation.__name__}, got {_show(value)}")
    return value


def _parse_bounded(annotation: Any, bounds: tuple[Any, ...], value: Any, path: str) -> Any:
    value = parse(annotation, value, path)
    for bound in bounds:
        if isinstance(bound, Range) and not bound.low <= value <= bound.high:  # also refuses NaN
            raise SpecError(path, f"{value!r} must be {bound.describe()}")
    return value


def _parse_union(arms: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and types.NoneType in arms:
        return None
    errors = []
    for arm in arms:
        if arm is not types.NoneType:
            try:
                return parse(arm, value, path)
            except SpecError as error:
                errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise SpecError(path, "; or ".join(error.reason for error in errors))


def _parse_spec(family: type[Spec], value: Any, path: str) -> Spec:
    if isinstance(value, family | UnknownPart):
        return value
    if isinstance(value, str) and kinds(family):
        value = {"type": value}
    if not isinstance(value, Mapping):
        raise SpecError(path, f"expected {_name(family)}, got {_show(value)}")
    try:
        cls = kind_of(family, value, path)
    except UnknownKindError:
        if not _keeps_unknown.get():
            raise
        return UnknownPart(kind=value["type"], settings={key: item for key, item in value.items() if key != "type"})
    given = {str(key): item for key, item in value.items() if not (key == "type" and cls.type_name)}
    known = fields(cls)
    for key in given:
        if key not in known:
            raise SpecError(
                join(path, key), f"{_name(cls)} has no such field ({given[key]!r}); {nearest(key, list(known))}"
            )
    for field in dataclasses.fields(typing.cast(Any, cls)):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in given:
            raise SpecError(join(path, field.name), f"{_name(cls)} needs a value here")
    typed = {key: parse(known[key], item, join(path, key)) for key, item in given.items()}
    with at(path):
        return cls(**typed)


def kind_of(family: type[Spec], data: Mapping[str, Any], path: str) -> type[Spec]:
    """The class that a dict describes: the kind it names, or the family itself where there is no choice."""
    options = kinds(family)
    if not options:
        return family
    name = data.get("type", family.type_name)
    if name is None:
        raise SpecError(join(path, "type"), f"name a kind of {_name(family)}: {', '.join(sorted(options))}")
    if name not in options:
        load_installed_parts()
        options = kinds(family)
    if name not in options:
        raise UnknownKindError(
            join(path, "type"), f"no kind {name!r} of {_name(family)}; {nearest(str(name), list(options))}"
        )
    return options[name]


def _name(cls: type[Spec]) -> str:
    return cls.type_name or cls.__name__


def _show(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


# --- YAML ---------------------------------------------------------------------------------------------------------


class _YamlLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.1 wants 1.0e-3) and refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; raise where a key stands twice, which YAML would settle in silence."""
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice in this mapping", node.start_mark)
        return mapping


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)

LONGEST_PATTERN = 8


def _fold(value: Any) -> Any:
    """Replace each run of a repeated pattern of mappings in a list by `{repeat: n, of: pattern}`."""
    if isinstance(value, dict):
        return {key: _fold(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    items, folded, at = [_fold(item) for item in value], [], 0
    while at < len(items):
        best = (1, 1)  # (items covered, pattern length)
        for length in range(1, LONGEST_PATTERN + 1):
            times = 1
            while items[at : at + length] == items[at + times * length : at + (times + 1) * length] != []:
                times += 1
            if times > 1 and times * length > best[0] and isinstance(items[at], dict):
                best = (times * length, length)
        covered, length = best
        folded.append(items[at] if covered == 1 else {"repeat": covered // length, "of": items[at : at + length]})
        at += covered
    return folded


def _unfold(items: Sequence[Any], path: str) -> Iterator[Any]:
    """Write `{repeat: n, of: [...]}` items out."""
    for i, item in enumerate(items):
        if isinstance(item, Mapping) and "repeat" in item:
            if set(item) != {"repeat", "of"} or not isinstance(item["of"], list):
                raise SpecError(f"{path}[{i}]", f"write repeats as {{repeat: n, of: [...]}}, got keys {sorted(item)}")
            times = parse(Positive, item["repeat"], f"{path}[{i}].repeat")
            for _ in range(times):
                yield from _unfold(item["of"], path)
        else:
            yield item


# --- overrides by dotted path -------------------------------------------------------------------------------------


def override(spec: S, changes: Mapping[str, Any]) -> S:
    """Return the spec with fields replaced by dotted path: `{"model.layers.ffn.top_k": 1, "model.norm": "layernorm"}`.

    A path through a list means all of its items that have the field, `layers[0].` or `layers.0.` only that one. The
    bare name of another kind swaps the type and keeps the fields that both kinds have. All changes are made before
    anything is checked, so fields that depend on each other can change together.
    """
    data = spec.to_dict()
    for path, value in changes.items():
        steps = re.findall(r"[^.\[\]]+", path)
        if not steps:
            raise SpecError(path, "empty path")
        data = _replace(type(spec), data, steps, value, "")
    return type(spec).from_dict(data)


def _replace(annotation: Any, data: Any, steps: list[str], value: Any, path: str) -> Any:
    if not steps:
        return _swap_kind(annotation, data, value, path)
    if isinstance(data, list):
        return _replace_in_list(annotation, data, steps, value, path)
    cls = _spec_class(annotation, data)
    if cls is None:
        raise SpecError(join(path, steps[0]), f"{path} is {_show(data)} and has no fields")
    data = data or {}  # a part that is only just begun
    known = fields(cls)
    if steps[0] not in known:
        raise SpecError(join(path, steps[0]), f"{_name(cls)} has no such field; {nearest(steps[0], list(known))}")
    old = data.get(steps[0])  # a kind that was only just named has none of its own fields yet
    new = _replace(known[steps[0]], old, steps[1:], value, join(path, steps[0]))
    return data | {steps[0]: new}


def _replace_in_list(annotation: Any, data: list[Any], steps: list[str], value: Any, path: str) -> list[Any]:
    item = typing.get_args(_drop_none(annotation))[0]
    if steps[0].lstrip("-").isdigit():
        index = int(steps[0])
        if not -len(data) <= index < len(data):
            raise SpecError(f"{path}[{index}]", f"there are {len(data)} items, 0 to {len(data) - 1}")
        index %= len(data)
        return [
            _replace(item, old, steps[1:], value, f"{path}[{i}]") if i == index else old for i, old in enumerate(data)
        ]
    changed, errors = [], []
    for i, old in enumerate(data):
        try:
            changed.append(_replace(item, old, steps, value, f"{path}[{i}]"))
        except SpecError as error:
            changed.append(old)
            errors.append(error)
    if len(errors) == len(data):
        helpful = [error for error in errors if "did you mean" in error.reason]
        raise (helpful or errors or [SpecError(path, "the list is empty")])[0]
    return changed


def _swap_kind(annotation: Any, old: Any, value: Any, path: str) -> Any:
    """A bare kind name keeps the fields that the old and the new kind share; anything else replaces the old value."""
    if isinstance(value, Word):
        value = value.meant_for(annotation)
    family = _spec_class(annotation, None)
    if family is None or not isinstance(value, str) or not isinstance(old, dict):
        return _plain(value)
    new = kind_of(family, {"type": value}, path)
    return {"type": value} | {name: old[name] for name in fields(new) if name in old}


def _drop_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        arms = [arm for arm in typing.get_args(annotation) if arm is not types.NoneType]
        return arms[0] if len(arms) == 1 else annotation
    return annotation


def _spec_class(annotation: Any, data: Any) -> type[Spec] | None:
    """The spec class behind an annotation (and, where `data` names a kind, that kind), or None."""
    annotation = _drop_none(annotation)
    if not (isinstance(annotation, type) and issubclass(annotation, Spec)):
        return None
    return kind_of(annotation, data, "") if isinstance(data, dict) else annotation if data is None else None


def leaves(spec: Spec, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain field as (dotted path, value); equal list items are told once, without an index."""
    for name in fields(type(spec)):
        value, path = getattr(spec, name), join(prefix, name)
        if isinstance(value, Spec):
            if value.type_name:
                yield path, value.type_name
            yield from leaves(value, path)
        elif isinstance(value, tuple) and value and isinstance(value[0], Spec):
            same = all(item == value[0] for item in value)
            for i, item in enumerate(value[:1] if same else value):
                yield from leaves(item, path if same else f"{path}[{i}]")
        else:
            yield path, value
