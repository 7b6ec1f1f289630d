"""How measured values grow, by worked examples."""

import math

import pytest

from expandr_jax.errors import UserError
from expandr_jax.planning.growth import fit_growth

SCALES = (0.003, 0.01, 0.03)


def test_a_constant_with_noise_is_constant_and_the_slope_that_noise_hides_is_the_error():
    found = fit_growth(SCALES, (500.0, 508.0, 504.0), by_chance=10)
    assert found.kind == "constant"
    # 4 either way over 0.027, from 0.03 on to 1.
    assert found.error == pytest.approx(4 * (1 + 2 * 0.97 / 0.027))
    assert found.at_full_scale == 508 + found.error


def test_a_constant_without_noise_has_no_error():
    found = fit_growth(SCALES, (7, 7, 7))
    assert (found.kind, found.at_full_scale, found.error) == ("constant", 7, 0)


def test_nothing_at_all_stays_nothing():
    assert fit_growth(SCALES, (0, 0, 0), by_chance=5).at_full_scale == 0


def test_a_line_above_a_start():
    found = fit_growth(SCALES, [1000 + 50_000 * s for s in SCALES])
    assert found.kind == "linear"
    assert found.at_full_scale == pytest.approx(51_000)
    assert found.error == pytest.approx(0, abs=1e-6)


def test_what_a_line_misses_is_added():
    exact = [1000 + 50_000 * s for s in SCALES]
    found = fit_growth(SCALES, [exact[0], exact[1] + 60, exact[2]])
    assert found.kind == "linear"
    assert found.at_full_scale > 51_000
    assert found.at_full_scale - found.error == pytest.approx(51_000, rel=0.05)


def test_n_log_n_counts_as_linear():
    items = 10**7
    found = fit_growth(SCALES, [s * items * math.log(s * items) for s in SCALES])
    assert found.kind == "linear"
    # It is steeper later on.
    full = items * math.log(items)
    assert 0.8 * full < found.at_full_scale < full


@pytest.mark.parametrize("power", [1.5, 2, 3])
@pytest.mark.parametrize("start", [0, 5])
def test_powers_are_worse(power, start):
    assert fit_growth(SCALES, [start + (100 * s) ** power for s in SCALES]).kind == "worse"


def test_a_square_is_carried_on_as_one():
    found = fit_growth(SCALES, [3 + 9e4 * s * s for s in SCALES])
    assert found.at_full_scale == pytest.approx(90_003)


def test_a_square_within_noise_is_not_made_out_of_noise():
    assert fit_growth(SCALES, (100.0, 101.0, 109.0), by_chance=10).kind == "constant"
    assert fit_growth(SCALES, (100.0, 109.0, 160.0), by_chance=10).kind == "linear"


def test_what_flattens_is_carried_on_as_a_line():
    found = fit_growth(SCALES, [100 * math.sqrt(s) for s in SCALES])
    assert found.kind == "linear"
    assert found.at_full_scale > 100


def test_what_falls_is_not_carried_below_what_it_was():
    found = fit_growth(SCALES, (90.0, 60.0, 30.0))
    assert found.kind == "constant"
    assert found.at_full_scale >= 90


def test_more_scales_and_some_above_one():
    found = fit_growth((0.5, 1, 2, 4), (15, 20, 30, 50))
    assert found.kind == "linear"
    assert found.at_full_scale == pytest.approx(20)


@pytest.mark.parametrize("scales", [(0.1, 0.2), (0.1, 0.1, 0.2), (0.2, 0.1, 0.3), (0, 0.1, 0.2)])
def test_scales_that_say_nothing(scales):
    with pytest.raises(UserError, match="rising"):
        fit_growth(scales, [1.0] * len(scales))
