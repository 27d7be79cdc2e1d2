"""A config dataclass becomes command-line flags: one field, one flag; the comment behind the field is its help.

Choices and bounds stand in the type, and every wrong value gives the same one sentence:

    @dataclass
    class Config(RunConfig):
        rank: Count = 5  # of every adapter
        dropout: BelowOne = 0.0  # share of activations dropped
        prediction: Literal["noise", "x0", "v"] = "v"  # what the network predicts
        sampler: Annotated[str, OneOf(samplers.by_name)] = "ddim"  # of the previews
        widths: tuple[Count, ...] = (500, 120)  # of the hidden layers, given as 500,120, or none for ()
        channels: Annotated[tuple[Count, ...], NotEmpty()] = (32, 64)  # width of each level
        targets: tuple[Literal["attention", "resnet"], ...] = ("attention",)  # layers that get an adapter
        shift: Annotated[float, Between(0.01, 100)] = 4.0  # times as much noise

    config, given = parse(Config, argv, __doc__)   # given: the names of the flags that were given
    set_defaults(config, given, rank=8)            # a recipe's own defaults, for flags that were not given
    check_values(config)                           # `parse`, `set_defaults`, `resumed` and `Run` call it

A script keeps only the rules between its flags: `check(ok, sentence)` of nanodiff.errors.
"""

import argparse
import dataclasses
import errno
import functools
import inspect
import json
import math
import re
import sys
import typing
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from nanodiff.errors import Diverged, UserError, check, nearest

# --- bounds and choices, for Annotated[type, ...] -------------------------------------------------------------------

@dataclass(frozen=True)
class AtLeast:
    least: float

    def allows(self, value):
        return self.least <= value < math.inf

    def __str__(self):
        return f"{self.least} or more"


@dataclass(frozen=True)
class Above:
    limit: float

    def allows(self, value):
        return self.limit < value < math.inf

    def __str__(self):
        return f"a number above {self.limit}"


@dataclass(frozen=True)
class Between:
    """From low to high; `open` names the ends that are left out: "", "low", "high" or "both"."""
    low: float
    high: float
    open: str = ""

    def allows(self, value):
        return (self.low < value if self.open in ("low", "both") else self.low <= value) and (
            value < self.high if self.open in ("high", "both") else value <= self.high)

    def __str__(self):
        return (f"a number from {'above ' if self.open in ('low', 'both') else ''}{self.low} to "
                f"{'below ' if self.open in ('high', 'both') else ''}{self.high}")


@dataclass(frozen=True)
class MultipleOf:
    n: int

    def allows(self, value):
        return value % self.n == 0

    def __str__(self):
        return f"a multiple of {self.n}"

    def nearest(self, value):
        return max(self.n, round(value / self.n) * self.n)


class NotEmpty:
    """For a list with commas that must not be "none"."""

    def allows(self, value):
        return len(value) > 0

    def __str__(self):
        return "one or more with commas between"


class OneOf:
    """One of the keys or items of `names`; for choices that a table has and `Literal` would repeat."""

    def __init__(self, names):
        self.names = tuple(names)

    def allows(self, value):
        return value in self.names

    def __str__(self):
        return (" or " if len(self.names) == 2 else ", ").join(map(str, self.names))


Count = Annotated[int, AtLeast(1)]
CountOrZero = Annotated[int, AtLeast(0)]  # where 0 means none, or the data's own
Positive = Annotated[float, Above(0)]
NotNegative = Annotated[float, AtLeast(0)]
Share = Annotated[float, Between(0, 1)]
BelowOne = Annotated[float, Between(0, 1, open="high")]  # a decay, or a share that is never all


class _Flag:
    """One field of a config dataclass: its name, type, bounds, default and comment."""

    def __init__(self, field, hint, comment):
        self.name, self.default, self.comment = field.name, field.default, comment
        self.kind, self.bounds = _split(hint)
        self.item = None  # the type of the items of a list with commas
        if typing.get_origin(self.kind) is tuple:
            self.item, self.item_bounds = _split(typing.get_args(self.kind)[0])
            self.kind = tuple

    def check(self, value):
        """Raises UserError when a value, or an item of a list, is out of bounds."""
        self._check(value, self.bounds)
        for item in value if self.item else ():
            self._check(item, self.item_bounds)

    def _check(self, value, bounds):
        for bound in bounds:
            if isinstance(bound, OneOf):
                check(bound.allows(value), f'--{self.name} "{value}" is unknown; expected {bound}'
                      + nearest(value, bound.names))
            elif not bound.allows(value):
                hint = bound.nearest(value) if isinstance(bound, MultipleOf) else self.default and self.usual
                such_as = f", such as {hint}" if hint and not isinstance(bound, AtLeast) else ""
                raise UserError(f"--{self.name} is {'none' if value == () else value}; expected {bound}{such_as}")

    def read(self, text):
        """The value that a word of the command line stands for, checked."""
        if self.item:
            words = [] if text in ("", "none") else [word.strip() for word in text.split(",")]
            value = tuple(self._one(word, self.item, text) for word in words)
        else:
            value = tuple(text) if self.kind is tuple else self._one(text, self.kind, text)
        self.check(value)
        return value

    def _one(self, word, kind, text):
        if kind not in (int, float):
            return word
        try:
            number = kind(word)
        except ValueError:
            wanted = {int: "whole number", float: "number"}[kind]
            wanted = f"{wanted}s with commas between, or none" if self.item else f"a {wanted}"
            such_as = f"{',' if self.item else ''} such as {self.usual}" if self.default != () else ""
            raise UserError(f'--{self.name} is "{text}"; expected {wanted}{such_as}') from None
        check(kind is float or abs(number) < 2**63, f"--{self.name} is {word}, which 64 bits do not hold; expected a "
              f"whole number such as {self.usual}")
        return number

    @property
    def usual(self):
        """The default as one would type it."""
        return (",".join(map(str, self.default)) if self.item else str(self.default)) or "none"

    def add_to(self, parser):
        """Declares the flag: --name VALUE, --name / --no-name, or the words that belong to no flag."""
        usual = f"(default: {self.usual})"
        bounds = self.item_bounds if self.item else self.bounds
        choices = [bound for bound in bounds if isinstance(bound, OneOf)]
        text = f"{self.comment}: {choices[0]} {usual}" if choices else f"{self.comment} {usual}"
        options = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if self.kind is tuple and not self.item:
            parser.add_argument(self.name, nargs="*", metavar=self.name.upper(), **options | {"help": self.comment})
        elif self.kind is bool:
            parser.add_argument(f"--{self.name}", action=argparse.BooleanOptionalAction, **options)
        else:
            metavar = f"{self.item.__name__.upper()},..." if self.item else self.kind.__name__.upper()
            parser.add_argument(f"--{self.name}", action=_Once, metavar=metavar, **options)


def _split(hint):
    """(type, bounds) of Annotated[type, *bounds], of Literal[*choices] or of a plain type."""
    if typing.get_origin(hint) is Annotated:
        return typing.get_args(hint)[0], list(hint.__metadata__)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return type(choices[0]), [OneOf(choices)]
    return hint, []


def _flags(cls):
    """{name: _Flag} of a dataclass."""
    hints, comment = typing.get_type_hints(cls, include_extras=True), comments(cls)
    return {field.name: _Flag(field, hints[field.name], comment.get(field.name, ""))
            for field in dataclasses.fields(cls)}


def check_values(config):
    """Raises UserError unless every value of a config dataclass is within the bounds of its type."""
    for name, flag in _flags(type(config)).items():
        flag.check(getattr(config, name))


def set_defaults(config, given, **values):
    """Sets fields of `config` that are not among the names `given`, and checks them: the defaults of a data set or of
    a recipe."""
    for name, value in values.items():
        if name not in given:
            setattr(config, name, value)
    check_values(config)


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
    """A flag that is refused the second time, where argparse would forget its first value."""

    def __call__(self, parser, namespace, value, flag=None):
        check(not hasattr(namespace, self.dest), f"{flag} was given twice; expected once (several files go into one, "
              "with commas between them, where the flag takes several)")
        setattr(namespace, self.dest, value)


def parse(cls, argv=None, description=""):
    """(config, given): dataclass `cls` from command-line words (default: this process's); the names of the flags given.

    int, float, str and bool fields become --field VALUE, or --field / --no-field; a field tuple[int, ...] or the like
    takes a list with commas; a field `tuple` takes the words that belong to no flag. An unknown flag, a value of the
    wrong type or out of bounds raises UserError with the nearest right thing. `--help` prints comments and defaults.
    """
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    flags = _flags(cls)
    for flag in flags.values():
        flag.add_to(parser)
    known, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        word = unknown[0].split("=")[0]
        raise UserError(f"unknown flag {word}; expected one of those that --help lists"
                        + nearest(word, [f"--{name}" for name in flags]))
    values = {name: flags[name].read(value) for name, value in vars(known).items()}
    return cls(**values), set(values)


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
    saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    for name in sorted(given - may_change):
        check(getattr(config, name) == saved[name], f"--{name} {getattr(config, name)} contradicts the run in "
              f"{config.resume}, which was made with {saved[name]}; leave the flag out or start a new run")
    changed = {name: getattr(config, name) for name in given & may_change}
    config = type(config)(**{**saved, "stop": 0, **changed, "resume": config.resume, "out": ""})
    check_values(config)
    return config


def check_folder(flag, path):
    """Raises UserError when a flag's folder, which may not exist yet, cannot be made because a file is in its way."""
    place = next(place for place in (Path(path), *Path(path).parents) if place.exists())
    check(place.is_dir(), f"{flag} {path} is not possible, since {place} is a file; expected a folder")


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
