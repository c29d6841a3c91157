"""Command lines: `fire` reads the words, this module checks them against a function's signature before it runs.

Fire alone calls the function first and complains about a word that it could not use afterwards. Here an unknown
flag, a missing one or a value of the wrong type is one message, and nothing has run.
"""

import ast
import contextlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import fire
from fire.decorators import SetParseFn
from fire.parser import DefaultParseValue

from mosaic_dist.errors import UserError
from mosaic_dist.spec import SpecError, Word, nearest, parse

CTRL_C_EXIT_CODE = 130
"""As shells have it: 128 + SIGINT."""
HELP_FLAGS = ("--help", "-h")


def run_command(
    function: Callable[..., Any], name: str, words: list[str] | None = None, is_speaker: bool = True
) -> Any:
    """Call `function` with the command line's words; its signature is the list of flags, its docstring the help.

    A `**overrides` parameter takes all flags that are not named in the signature (dotted paths of a spec), each value a
    `Word`; a `*positional` one takes all words that are not flags, as text. Returns the function's result. On a
    `UserError` the message is printed to stderr and the process ends with its exit code, 2; on Ctrl-C with 130. Where
    many processes get the same words, only the one that `is_speaker` prints help and errors.
    """
    words = sys.argv[1:] if words is None else words
    if any(word in HELP_FLAGS for word in words):
        if is_speaker:
            print(help_text(function, name))
        sys.exit(0)
    with one_message(is_speaker):
        positional, flags = parse_words(words)
        arguments, keywords = bind(function, positional, flags, name)
        return function(*arguments, **keywords)


@contextlib.contextmanager
def one_message(is_speaker: bool = True) -> Iterator[None]:
    """End the process with one message, not a traceback, on a UserError and on Ctrl-C."""
    try:
        yield
    except UserError as error:
        fail(error, is_speaker)
    except KeyboardInterrupt:
        if is_speaker:
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(CTRL_C_EXIT_CODE)


def run_subcommand(commands: Mapping[str, str], program: str, words: list[str] | None = None) -> Any:
    """Call one of several commands by its name, the first word; `commands` tells their places, as "module:function".

    Nothing but the command that is called is imported; the list of all is read from their source.
    """
    words = sys.argv[1:] if words is None else words
    if words and words[0] in commands:
        module, _, function = commands[words[0]].partition(":")
        with one_message():
            command = getattr(importlib.import_module(module), function)
        return run_command(command, f"{program} {words[0]}", words[1:])
    if not words or words[0] in HELP_FLAGS:
        width = max(map(len, commands))
        listing = "\n".join(f"  {name:<{width}} {summary(place)}" for name, place in commands.items())
        print(f"usage: {program} COMMAND [FLAGS]\n\n{listing}\n\n`{program} COMMAND --help` tells the flags of one.")
        sys.exit(0 if words else UserError.exit_code)
    fail(UserError(f"no command {words[0]!r}; {nearest(words[0], list(commands))}"))


def fail(error: UserError, is_speaker: bool = True) -> NoReturn:
    """Print the one message and end the process; with MOSAIC_DEBUG set, the traceback too."""
    if os.environ.get("MOSAIC_DEBUG"):
        traceback.print_exception(error)
    if is_speaker:
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def parse_words(words: list[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split words into positional values and flags with `fire`'s rules (`--a 1`, `--a=1`, `--a`, `--noa`).

    A value is a `Word`, whose type only the parameter or the field knows that it is for; a flag without one is a bool.
    """
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @SetParseFn(_value)
    def capture(*positional: Any, **flags: Any) -> None:
        found.append((positional, flags))

    fire.Fire(capture, command=[_mark(word) for word in words])
    return found[0]


MARK = "="
"""In front of each value that is given: fire writes "True" and "False" itself for flags without one."""
FLAG = re.compile(r"--|-[a-zA-Z]")


def _mark(word: str) -> str:
    """A word with the mark before its value; a flag without a value has none."""
    return word.replace("=", "=" + MARK, 1) if FLAG.match(word) else MARK + word


def _value(text: str) -> Word | bool:
    """What fire hands over for a value: a marked word, or its own "True" or "False"."""
    return Word(text.removeprefix(MARK), DefaultParseValue) if text.startswith(MARK) else text == "True"


def bind(
    function: Callable[..., Any], positional: tuple[Any, ...], flags: dict[str, Any], name: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Check words against a signature; returns typed arguments. Raises UserError for a word that does not fit."""
    parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function, include_extras=True)
    named = {key: p for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL}
    takes_rest = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    takes_positional = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    if positional and not takes_positional:
        raise UserError(f"unexpected word {positional[0]!r}: give every value with its flag; see `{name} --help`")
    if not takes_rest:
        for key in flags:
            if key not in named:
                raise UserError(f"unknown flag --{key}; {nearest(key, list(named))} See `{name} --help`")
    for key, parameter in named.items():
        if parameter.default is parameter.empty and key not in flags:
            raise UserError(f"--{key} is needed; see `{name} --help`")
    typed = {}
    for key, value in flags.items():
        try:
            typed[key] = parse(hints[key], value, f"--{key}") if key in named and key in hints else value
        except SpecError as error:
            raise UserError(f"{error}; see `{name} --help`") from None
    return tuple(map(str, positional)), typed


def summary(place: str) -> str:
    """First line of the docstring of the function at "module:function", whose module is read and not imported."""
    module, _, name = place.partition(":")
    package, *rest = module.split(".")
    found = importlib.util.find_spec(package)  # of the module itself it would import the packages around it
    assert found is not None, f"there is no package {package}"
    folder = (found.submodule_search_locations or [""])[0]
    source = Path(folder, *rest).with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return (ast.get_docstring(function) or "").partition("\n")[0]


def help_text(function: Callable[..., Any], name: str) -> str:
    """Usage line, docstring, and each flag with its default."""
    lines = []
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = "needed" if parameter.default is parameter.empty else f"default {parameter.default!r}"
        lines.append(f"  --{key:<20} {default}")
    return f"usage: {name} [FLAGS]\n\n{inspect.getdoc(function) or ''}\n\nflags:\n" + "\n".join(lines)
