"""OUEMA and DEMA after a burn-in are those of the run that begins there; and the floor of β in BEMA."""

from __future__ import annotations

import pytest

from ckavg.averaging.rules import effective_weights
from ckavg.errors import SettingError
from ckavg.schemes import BEMA, DEMA, OUEMA, Scheme, Timeline
from ckavg.schemes.parse import parse_words

STEPS = (0, 400, 800, 1200, 1600, 2000)


@pytest.mark.parametrize(("late", "plain"), [(OUEMA(burn_in=401), OUEMA()), (DEMA(burn_in=401), DEMA())], ids=str)
def test_it_begins_at_the_first_checkpoint_after_it(late: Scheme, plain: Scheme) -> None:
    weights = effective_weights(late.coefficients(Timeline(STEPS)))
    assert weights == (0.0, 0.0, *effective_weights(plain.coefficients(Timeline(STEPS[2:]))))
    assert (late.every_from, plain.every_from) == (401, None)
    assert late.parameters() == plain.parameters() | {"burn_in": 401}


@pytest.mark.parametrize("scheme", [OUEMA(burn_in=3000), DEMA(burn_in=3000)], ids=str)
def test_it_must_end_before_the_run(scheme: Scheme) -> None:
    with pytest.raises(SettingError, match="burn-in is 3000, but the last checkpoint is at step 2000"):
        scheme.coefficients(Timeline(STEPS))


@pytest.mark.parametrize("form", ["paper", "author"])
def test_a_floor_for_beta(form: str) -> None:
    (free, floored) = (word.scheme for word in parse_words([f"bema:form={form},min-beta=0,0.03"]))
    betas = free.coefficients(Timeline(STEPS)).betas[1:]
    assert floored.coefficients(Timeline(STEPS)).betas[1:] == tuple(max(beta or 0, 0.03) for beta in betas)
    assert min(beta or 0 for beta in betas) < 0.03 < max(beta or 0 for beta in betas)
    assert floored.coefficients(Timeline(STEPS)).alphas == free.coefficients(Timeline(STEPS)).alphas


def test_what_was_added_later_is_recorded_where_it_is_stated() -> None:
    assert "min_beta" not in BEMA().parameters()
    assert BEMA(min_beta=0.1).parameters()["min_beta"] == 0.1


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_floor_that_is_none(value: float) -> None:
    with pytest.raises(SettingError, match=r"min[-_]beta"):
        BEMA(min_beta=value)
