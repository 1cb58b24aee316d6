"""Parse a command line: --key=value or --key value, config files, other arguments. Print --help from the options.

Options are declared with chronomoe.options.option. A bare --key sets a True/False option to True. A config file is
Python that assigns values to options. Later files win over earlier ones, and the command line wins over files.
"""

from __future__ import annotations

import ast
import difflib
import shutil
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from trainer.errors import UserError, first_line
from trainer.files import read_text

if TYPE_CHECKING:  # importing chronomoe imports torch, which the data preparers do not need
    from chronomoe.options import Option

CONTAINERS = (list, tuple, dict, set)
BOOLS = {"true": True, "false": False, "1": True, "0": False}
ROOT = Path(__file__).parent.parent
CONFIG_FILES = "Config files are Python: assignments to these keys. Later files and --key=value win."


@dataclass
class CommandLine:
    """A parsed command line. Values are checked; options that are not given are absent."""

    options: dict[str, Any] = field(default_factory=dict)  # set by --key=value
    file_options: dict[str, Any] = field(default_factory=dict)  # set by config files
    arguments: list[str] = field(default_factory=list)  # arguments without dashes, unless they are config files

    @property
    def values(self) -> dict[str, Any]:
        """The options that are set; the command line wins over config files."""
        return self.file_options | self.options


def parse(
    arguments: list[str],
    known: Mapping[str, Option],
    *,
    config_files: bool = False,
    positional: bool = False,
    hints: Mapping[str, str] | None = None,
) -> CommandLine:
    """Parse a command line.

    Args:
        arguments: the command line without the name of the program.
        known: options by the name that users write; an alias is a second name for the same Option.
        config_files: arguments without dashes are config files.
        positional: arguments without dashes are returned. If neither is set, they are errors.
        hints: error messages for names that are not options of this program, by name.

    Raises UserError for an unknown option, a wrong type or value, an unexpected argument or an invalid config file.
    """
    line = CommandLine()
    for argument in joined(arguments, known):
        if not argument.startswith("-"):
            if config_files:
                line.file_options |= read_config_file(argument, known, hints)
            elif positional:
                line.arguments.append(argument)
            else:
                raise UserError(f"{argument}: write options as --key=value; --help lists them")
            continue
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise UserError(f"{argument}: write options as --key=value")
        option = known.get(name) or unknown(name, argument, known, hints)
        if not equals and option.kind is not bool:
            raise UserError(f"{argument} needs a value: write --{name}=VALUE, where VALUE is {option.expected()}")
        value = parse_value(option, text) if equals else True
        line.options[option.name] = _check(replace(option, name=f"--{name}"), value)
    return line


def joined(arguments: list[str], known: Mapping[str, Option]) -> list[str]:
    """The command line with `--key value` as `--key=value`. A True/False option takes only true, false, 1 or 0."""
    found: list[str] = []
    for argument in arguments:
        option = known.get(found[-1].removeprefix("--")) if found and found[-1].startswith("--") else None
        if option is None or argument.startswith("--") or (option.kind is bool and argument.lower() not in BOOLS):
            found.append(argument)
        else:
            found[-1] += f"={argument}"
    return found


def asks_for_help(arguments: list[str]) -> bool:
    return "--help" in arguments or "-h" in arguments


def help_text(usage: str, known: Mapping[str, Option]) -> str:
    """The text of --help: `usage`, then each option with its default, meaning and choices."""
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [usage.rstrip()]
    for option in known.values():
        meaning, choices = option.metadata["help"], option.metadata["choices"] or ()
        listed = f" ({option.expected()})" if any(c and repr(c) not in meaning for c in choices) else ""
        if option.metadata["group"] or len(lines) == 1:
            lines += ["", option.metadata["group"] or "Options"]
        lines.append(f"  --{option.name}={option.default}")
        indent = " " * 6
        text = textwrap.fill(meaning + listed, width, initial_indent=indent, subsequent_indent=indent)
        lines.append(text)
    return "\n".join(lines)


def option_name(argument: str) -> str:
    """The name in --name or --name=value; empty for an argument without dashes."""
    return argument.removeprefix("--").partition("=")[0] if argument.startswith("--") else ""


def check(option: Option, value: Any, where: str) -> Any:
    """The value in the option's type. Raises UserError, which names `where`, for a wrong type or value."""
    return _check(option, value, f"{where}: ")


def _check(option: Option, value: Any, prefix: str = "") -> Any:
    try:
        return option.check(value)
    except ValueError as e:
        raise UserError(f"{prefix}{e}") from None


def parse_value(option: Option, text: str) -> Any:
    """The value of --key=text, not checked: a string for a string option, else a Python literal."""
    if option.kind is str:
        return None if option.optional and text == "None" else text
    if option.kind is bool and text.lower() in BOOLS:
        return BOOLS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def read_config_file(path: str, known: Mapping[str, Option], hints: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The options that a config file sets, checked. The file is executed.

    Names that start with _ are ignored, and helpers such as functions, unless they are containers with a name that is
    similar to that of an option.

    Raises UserError if the file cannot be read or executed, or sets an unknown option or a wrong value.
    """
    try:
        source = read_text_file(path, "config file").removeprefix("\ufeff")
    except UserError as e:
        raise UserError(f"{e}{_nearest_config(path)}") from None
    namespace: dict[str, Any] = {"__file__": path, "__name__": "__config__"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, in addition to its error
            code = compile(source, path, "exec")
        exec(code, namespace)
    except SyntaxError as e:
        raise UserError(f"{e.filename or path}, line {e.lineno or '?'}: {e.msg}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # also SystemExit, GeneratorExit and those of libraries
        line = e.__traceback__.tb_next.tb_lineno if e.__traceback__ and e.__traceback__.tb_next else "?"
        raise UserError(f"{path}, line {line}: {type(e).__name__}: {first_line(e)}") from None
    values = {}
    for name, value in namespace.items():
        value = value.item() if isinstance(value, np.generic) else value
        is_plain = value is None or isinstance(value, (bool, int, float, str))
        is_helper = name not in known and not is_plain  # an import, a function, a list
        if name.startswith("_") or (is_helper and not (isinstance(value, CONTAINERS) and _similar(name, known))):
            continue
        option = known.get(name) or unknown(name, path, known, hints)
        values[option.name] = check(replace(option, name=name), value, path)
    return values


def read_text_file(path: str, kind: str) -> str:
    """The text of a file that the user named, `kind` in the message. Raises UserError if it cannot be read."""
    try:
        return read_text(Path(path), may_be_pipe=True)
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text" if isinstance(e, UnicodeError) else e
        raise UserError(f"cannot read the {kind} {path}: {reason}") from None


def unknown(name: str, where: str, known: Mapping[str, Option], hints: Mapping[str, str] | None = None) -> NoReturn:
    """Raise UserError for a name that is not an option; `where` is the argument or the config file that sets it."""
    if hints and name in hints:
        raise UserError(f"{where}: {hints[name]}")
    similar = _similar(name, known)
    hint = f"did you mean {similar}?" if similar else "--help lists them"
    raise UserError(f"{where}: there is no setting {name!r}; {hint}")


def _similar(name: str, known: Mapping[str, Option]) -> str | None:
    """The known name that is most similar, if any is."""
    # also compare with the part after a prefix: 'eta' with 'chrono_eta'
    whole = {option.name: option.name for option in known.values()} | {n: n for n in known}
    after_prefix = {n.partition("_")[2]: n for n in known if "_" in n}
    near = difflib.get_close_matches(name, candidates := after_prefix | whole, n=1)
    return candidates[near[0]] if near else None


def _nearest_config(path: str) -> str:
    files = [str(p.relative_to(ROOT)) for p in (ROOT / "config").rglob("*.py") if p.name != "__init__.py"]
    near = difflib.get_close_matches(path, files, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
