"""Schemes from the words of a command line."""

from __future__ import annotations

import math

import pytest

from ckavg.errors import SettingError
from ckavg.schemes import BEMA, DEMA, EMA, OUEMA, PEMA, Last, Mean, MomentumEMA, Scheme
from ckavg.schemes.parse import parse_words


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mean", "last"], [Mean(), Last()]),
        (["pema:gamma=0.05,0.1,0.15"], [PEMA(gamma=0.05), PEMA(gamma=0.1), PEMA(gamma=0.15)]),
        (["bema:eta=0.1,0.2", "dema"], [BEMA(eta=0.1), BEMA(eta=0.2), DEMA()]),
        (["bema:eta=0.1,inf,kappa=0.4,0.5"], [
            BEMA(eta=0.1, kappa=0.4), BEMA(eta=0.1), BEMA(eta=math.inf, kappa=0.4), BEMA(eta=math.inf),
        ]),
        (["bema:burn-in=100,form=author"], [BEMA(burn_in=100, form="author")]),
        (["ema", "ema:momentum=0.9,0.99", "ema:momentum=0.9,momentum-per=update"], [
            EMA(), MomentumEMA(momentum=0.9), MomentumEMA(momentum=0.99),
            MomentumEMA(momentum=0.9, momentum_per="update"),
        ]),
        (["mean:decay=linear,minus-sqrt", "mean:decay=none"], [
            Mean(decay="linear"), Mean(decay="minus-sqrt"), Mean(),
        ]),
        (["pema:scope=tensor,global", "ouema:eta=.3"], [PEMA(scope="tensor"), PEMA(), OUEMA(eta=0.3)]),
    ],
)  # fmt: skip
def test_words_to_schemes(words: list[str], expected: list[Scheme]) -> None:
    assert [word.scheme for word in parse_words(words)] == expected


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("swa", "'swa': there is no scheme 'swa'. There are pema, bema, ema"),
        (
            "pema:alpha=1",
            "'alpha'. It has clock, gamma, pairing, scope; checkpoints are chosen with every, last, from-",
        ),
        ("mean:gamma=1", "mean has no parameter 'gamma'. It has decay;"),
        ("mean:decay=sqrt", "decay is 'sqrt'; it must be one of none, linear, cosine, minus-sqrt."),
        ("last:gamma=1", "last has no parameter 'gamma'. It has none;"),
        ("ema:gamma=0.1,momentum=0.9", "ema: gamma cannot be used with momentum."),
        ("pema:gamma=high", "gamma is 'high'; it must be a number"),
        ("bema:burn-in=1.5", "burn-in is '1.5'; it must be a whole number"),
        ("pema:0.1", "'0.1' is not a parameter with a value"),
        ("pema:gamma=", "'gamma=' is not a parameter with a value"),
        ("pema:gamma=0.1,,0.2", "'' is not a parameter with a value"),
        ("pema:gamma=-1", "it must be 0 or more"),
        ("pema:scope=half", "it must be global or tensor"),
        ("pema:gamma=0.1,0.10", "pema-gamma0.1 is requested twice"),
        ("mean:last=5,05", "mean-last5 is requested twice"),
        ("mean:last=0", "'mean:last=0': last is 0; it must be 1 or more."),
        ("pema:every=50,0", "every is 0; it must be 1 or more."),
        ("last:from-step=x", "from-step is 'x'; it must be a whole number"),
    ],
)
def test_what_does_not_parse_is_explained(word: str, told: str) -> None:
    with pytest.raises(SettingError) as caught:
        parse_words([word])
    assert told in str(caught.value)


def test_words_choose_checkpoints() -> None:
    words = parse_words(["pema:gamma=0.1,0.2,every=50,100", "last:to-step=300", "mean:from_step=-1,last=5"])
    told = [(word.text, word.scheme, word.selection) for word in words]
    assert told == [
        ("pema:gamma=0.1,every=50", PEMA(gamma=0.1), {"every": 50}),
        ("pema:gamma=0.1,every=100", PEMA(gamma=0.1), {"every": 100}),
        ("pema:gamma=0.2,every=50", PEMA(gamma=0.2), {"every": 50}),
        ("pema:gamma=0.2,every=100", PEMA(gamma=0.2), {"every": 100}),
        ("last:to-step=300", Last(), {"to_step": 300}),
        ("mean:from-step=-1,last=5", Mean(), {"last": 5, "from_step": -1}),
    ]
