"""A config dataclass becomes command-line flags: one field, one flag; the comment behind the field is its help."""

import argparse
import dataclasses
import errno
import functools
import inspect
import json
import re
import sys
import warnings
from pathlib import Path

from nanodiff.errors import Diverged, UserError, check, nearest


def whole_numbers(flag, text):
    """The numbers of "500,120" as (500, 120), and of "none" as (); UserError unless all are whole and at least 1."""
    try:
        numbers = () if text == "none" else tuple(int(number) for number in text.split(","))
    except ValueError:
        numbers = (0,)
    check(min(numbers, default=1) >= 1, f'{flag} "{text}" must be whole numbers of at least 1 with commas between, '
          "such as 128,64, or none")
    return numbers


def check_folder(flag, path):
    """Raises UserError when a flag's folder, which may not exist yet, cannot be made because a file is in its way."""
    place = next(place for place in (Path(path), *Path(path).parents) if place.exists())
    check(place.is_dir(), f"{flag} {path} is not possible, since {place} is a file; expected a folder")


def comments(cls):
    """{field: the comment behind it}, read from the source of a dataclass and of those it extends."""
    found = {}
    for one in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(one).splitlines():
            if match := re.match(r"\s+(\w+): .*?  # (.*)", line):
                found[match[1]] = match[2].strip()
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


class _Once(argparse.Action):
    """A flag that is refused the second time, where argparse would drop what the first said."""

    def __call__(self, parser, namespace, value, flag=None):
        check(not hasattr(namespace, self.dest), f"{flag} was given twice; expected once (several files go into one, "
              "with commas between them, where the flag takes several)")
        setattr(namespace, self.dest, value)


def parse(cls, argv=None, description=""):
    """(config, given): dataclass `cls` from command-line words (default: this process's); the names of the flags given.

    int, float, str and bool fields become --field VALUE, or --field / --no-field; a tuple field takes the words that
    belong to no flag. An unknown flag or a value of the wrong type raises UserError with the nearest right thing.
    `--help` prints comments and defaults.
    """
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    text = comments(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, field in fields.items():
        kind = type(field.default)
        help = f"{text.get(name, '')} (default: {field.default if field.default != '' else 'none'})".replace("%", "%%")
        if kind is tuple:
            parser.add_argument(name, nargs="*", default=argparse.SUPPRESS, metavar=name.upper(), help=text.get(name, ""))
        elif kind is bool:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                                help=help)
        else:
            parser.add_argument(f"--{name}", action=_Once, default=argparse.SUPPRESS, metavar=kind.__name__.upper(),
                                help=help)
    known, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UserError(f"unknown flag {flag}; expected one of those that --help lists"
                        + nearest(flag, [f"--{name}" for name in fields]))
    values = {name: _value(fields[name], value) for name, value in vars(known).items()}
    return cls(**values), set(values)


def _value(field, text):
    """A flag's text as its field's type."""
    kind = type(field.default)
    if kind is bool or kind is str:
        return text
    if kind is tuple:
        return tuple(text)
    try:
        number = int(text) if kind is int else float(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UserError(f'--{field.name} is "{text}"; expected {wanted} such as {field.default}') from None
    check(kind is float or abs(number) < 2**63, f"--{field.name} is {text}, which 64 bits do not hold; expected a whole "
          f"number such as {field.default}")
    return number


def resumed(config, given, script, may_change):
    """The config of the run that `config.resume` names, with the flags that were given and may change from `config`.

    Raises UserError when the folder is no run of `script`, or when a given flag contradicts what the run was made with.
    """
    path = Path(config.resume) / "config.json"
    check(path.is_file(), f"--resume {config.resume} is no run folder (it holds no config.json); expected a folder "
          f"that this script made, such as runs/{script}-001")
    saved = json.loads(path.read_text())
    check(saved.pop("script", None) == script,
          f"--resume {config.resume} was made by another script; expected {script}")
    names = {field.name for field in dataclasses.fields(config)}
    check(set(saved) == names, f"{path} does not hold this version's flags "
          f"({', '.join(sorted(set(saved) ^ names))} differ); expected a run of the same version")
    for name in sorted(given - may_change):
        check(getattr(config, name) == saved[name], f"--{name} {getattr(config, name)} contradicts the run in "
              f"{config.resume}, which was made with {saved[name]}; leave the flag out or start a new run")
    kept = {name: getattr(config, name) for name in given & may_change}
    return type(config)(**{**saved, "stop": 0, **kept, "resume": config.resume, "out": ""})


def entry(main):
    """Wraps `main(argv=None)`: wrong input or a full disk ends in one sentence and exit code 2, divergence in code 1.
    A warning is one line."""
    @functools.wraps(main)
    def wrapped(argv=None):
        usual, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"warning: {message}\n"
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
                raise
            print(f"error: {error}; expected a place that can be written, with space left", file=sys.stderr)
            raise SystemExit(2) from None
        except Diverged as error:
            print(f"error: {error}; nothing of it was saved", file=sys.stderr)
            raise SystemExit(1) from None
        finally:
            warnings.formatwarning = usual
    return wrapped
