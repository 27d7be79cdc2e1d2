"""A dataclass as command-line flags: types, choices, bounds, and the one sentence that names a wrong value."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from nanodiff.errors import UserError, check
from nanodiff.flags import (AtLeast, BelowOne, Between, Count, CountOrZero, MultipleOf, NotEmpty, OneOf, Positive,
                            Share, check_values, entry, parse, resumed, set_defaults)

NUMBERS = "expected whole numbers with commas between, or none"
SAMPLERS = {"ddim": 1, "ddpm": 2, "dpm++2m": 3}


@dataclass
class Small:
    width: int = 3  # of the layer
    share: float = 0.5  # of 100 % of something
    name: str = "plain"  # a word
    loud: bool = False  # whether to shout


@dataclass
class Typed:
    rank: Count = 5  # of every adapter
    lr: Positive = 2e-4  # peak learning rate
    prediction: Literal["noise", "x0", "v"] = "v"  # what the network predicts
    codebook: Literal["gradient", "ema"] = "ema"  # how it learns
    sampler: Annotated[str, OneOf(SAMPLERS)] = "ddim"  # of the previews
    dropout: BelowOne = 0.0  # share of activations dropped
    start: Share = 0.5  # share of the steps
    decay: Annotated[float, Between(0, 1, open="both")] = 0.99  # of the running means
    shift: Annotated[float, Between(0.01, 100)] = 4.0  # times as much noise
    size: Annotated[CountOrZero, MultipleOf(4)] = 0  # side of the pictures
    judged: Annotated[int, AtLeast(6)] = 1000  # samples
    channels: Annotated[tuple[Count, ...], NotEmpty()] = (32, 64)  # width of each level
    widths: tuple[Count, ...] = ()  # of the hidden layers
    betas: tuple[Positive, ...] = (0.25,)  # a run for each
    targets: tuple[Literal["attention", "resnet"], ...] = ("attention",)  # layers with an adapter


def test_flags_follow_the_dataclass_and_remember_what_was_given():
    config, given = parse(Small, ["--width", "7", "--share=0.25", "--loud", "--name", "x"])
    assert (config.width, config.share, config.loud, config.name) == (7, 0.25, True, "x")
    assert given == {"width", "share", "loud", "name"}
    assert parse(Small, ["--no-loud"])[0].loud is False


def refused(cls, words, capsys):
    """The line on stderr for words that `cls` does not take."""
    @entry
    def main(argv):
        parse(cls, argv)
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


@pytest.mark.parametrize("words, expected", [
    (["--widht", "3"], "nearest: --width"),
    (["--width", "three"], '--width is "three"; expected a whole number such as 3'),
    (["--width", "9" * 20], "--width is 99999999999999999999, which 64 bits do not hold"),
    (["--share", "x"], '--share is "x"; expected a number such as 0.5'),
    (["--wid", "3"], "unknown flag --wid"),
    (["stray"], "unknown flag stray"),
    (["--width"], "expected one argument"),
    (["--width=1", "--width=2"], "--width was given twice"),
])
def test_wrong_flags_give_one_sentence_and_exit_code_2(words, expected, capsys):
    assert expected in refused(Small, words, capsys)


@pytest.mark.parametrize("word, expected", [
    ("--rank=0", "error: --rank is 0; expected 1 or more\n"),
    ("--lr=0", "error: --lr is 0.0; expected a number above 0, such as 0.0002\n"),
    ("--lr=inf", "error: --lr is inf; expected a number above 0, such as 0.0002\n"),
    ("--lr=nan", "error: --lr is nan; expected a number above 0, such as 0.0002\n"),
    ("--prediction=nois", 'error: --prediction "nois" is unknown; expected noise, x0, v, nearest: noise\n'),
    ("--codebook=emma", 'error: --codebook "emma" is unknown; expected gradient or ema, nearest: ema\n'),
    ("--sampler=dpm++2", 'error: --sampler "dpm++2" is unknown; expected ddim, ddpm, dpm++2m, nearest: dpm++2m\n'),
    ("--dropout=1", "error: --dropout is 1.0; expected a number from 0 to below 1\n"),
    ("--start=1.01", "error: --start is 1.01; expected a number from 0 to 1, such as 0.5\n"),
    ("--decay=0", "error: --decay is 0.0; expected a number from above 0 to below 1, such as 0.99\n"),
    ("--decay=1", "error: --decay is 1.0; expected a number from above 0 to below 1, such as 0.99\n"),
    ("--shift=inf", "error: --shift is inf; expected a number from 0.01 to 100, such as 4.0\n"),
    ("--size=10", "error: --size is 10; expected a multiple of 4, such as 8\n"),
    ("--size=-4", "error: --size is -4; expected 0 or more\n"),
    ("--judged=5", "error: --judged is 5; expected 6 or more\n"),
    ("--channels=none", "error: --channels is none; expected one or more with commas between, such as 32,64\n"),
    ("--channels=8,0", "error: --channels is 0; expected 1 or more\n"),
    ("--channels=8,x", f'error: --channels is "8,x"; {NUMBERS}, such as 32,64\n'),
    ("--channels=8,", f'error: --channels is "8,"; {NUMBERS}, such as 32,64\n'),
    ("--widths=x", f'error: --widths is "x"; {NUMBERS}\n'),
    ("--betas=1,b", 'error: --betas is "1,b"; expected numbers with commas between, or none, such as 0.25\n'),
    ("--targets=resnt", 'error: --targets "resnt" is unknown; expected attention or resnet, nearest: resnet\n'),
])
def test_a_value_out_of_bounds_is_refused_by_its_type(word, expected, capsys):
    assert refused(Typed, [word], capsys) == expected


def test_values_at_the_bounds_and_lists_with_commas_are_taken():
    words = ["--rank=1", "--dropout=0", "--start=1", "--shift=100", "--size=12", "--judged=6", "--channels=8, 16",
             "--widths=none", "--betas=0.1,2", "--targets=attention,resnet", "--prediction=x0", "--sampler=ddpm"]
    assert parse(Typed, words)[0] == Typed(1, 2e-4, "x0", "ema", "ddpm", 0.0, 1.0, 0.99, 100.0, 12, 6, (8, 16), (),
                                           (0.1, 2.0), ("attention", "resnet"))


def test_defaults_set_later_spare_the_flags_given_and_are_checked_too():
    config, given = parse(Typed, ["--rank=7"])
    set_defaults(config, given, rank=8, size=16)
    assert (config.rank, config.size) == (7, 16)
    with pytest.raises(UserError, match="--size is 18; expected a multiple of 4"):
        set_defaults(config, given, size=18)
    with pytest.raises(UserError, match="--rank is 0; expected 1 or more"):
        check_values(dataclasses.replace(Typed(), rank=0))


def test_help_shows_every_comment_choice_and_default(capsys):
    for cls, lines in ((Small, ["of 100 % of something (default: 0.5)"]),
                       (Typed, ["peak learning rate (default: 0.0002)",
                                "what the network predicts: noise, x0, v (default: v)",
                                "width of each level (default: 32,64)",
                                "of the hidden layers (default: none)"])):
        with pytest.raises(SystemExit) as stop:
            parse(cls, ["--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and all(line in text for line in lines)


@dataclass
class Resumable(Typed):
    resume: str = ""  # folder of a run
    out: str = ""  # folder
    stop: int = 0  # steps


def test_a_resumed_config_has_its_lists_back_and_refuses_what_contradicts_it(tmp_path):
    made = Resumable(rank=3, channels=(8, 16), stop=5, out="somewhere")
    (tmp_path / "config.json").write_text(json.dumps({"script": "small", **dataclasses.asdict(made)}))
    words = [f"--resume={tmp_path}", "--channels=8,16", "--stop=9"]
    config = resumed(*parse(Resumable, words), "small", {"resume", "stop"})
    assert config == Resumable(rank=3, channels=(8, 16), stop=9, resume=str(tmp_path))
    with pytest.raises(UserError, match="--rank 4 contradicts the run in .* made with 3"):
        resumed(*parse(Resumable, [f"--resume={tmp_path}", "--rank=4"]), "small", {"resume"})
    with pytest.raises(UserError, match="made by another script; expected large"):
        resumed(*parse(Resumable, [f"--resume={tmp_path}"]), "large", {"resume"})


def test_check_raises_its_sentence():
    check(True, "never")
    with pytest.raises(UserError, match="said so"):
        check(False, "said so")
