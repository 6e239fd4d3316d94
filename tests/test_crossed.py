"""The bootstrap over seeds and images, the corrected p-values and the words, on numbers with
known answers."""
import numpy as np
import pytest
from scipy.stats import ttest_ind

from vae_robust.crossed import class_medians, crossed_bootstrap, holm, in_words
from vae_robust.crossed import median_differences, pair_weights, rate_differences, spread
from vae_robust.crossed import two_sided, weighted_median, widening
from vae_robust.statistics import interval


def arms(rng, n=(6, 5), m=60, sigma=(.1, .4, .2), shift=0.):
    image = rng.normal(0, sigma[1], m)
    found = [rng.normal(0, sigma[0], (k, 1)) + image + rng.normal(0, sigma[2], (k, m)) for k in n]
    return [(np.ones_like(y), y + s) for y, s in zip(found, (shift, 0))]


CLASSES = np.repeat(np.arange(4), 15)


def test_rates_are_differences_over_what_both_keep_by_a_double_loop():
    rng = np.random.default_rng(0)
    a, b = ((rng.random((k, 60)) < .7, rng.random((k, 60)) < .4) for k in (3, 2))
    w = rng.random((5, 60))
    found = rate_differences(a, b, CLASSES)(w)
    for n, i, j in np.ndindex(5, 3, 2):
        both = a[0][i] & b[0][j]
        parts = [both & (CLASSES == c) for c in range(4)]
        each = [(w[n, p]*(a[1][i, p].astype(int) - b[1][j, p])).sum()/w[n, p].sum() for p in parts]
        assert np.isclose(found[n, i, j], np.mean(each))


def test_a_class_that_nobody_keeps_is_left_out():
    kept = np.array([[1, 1, 0, 0]], bool)
    lost, none = np.array([[1, 0, 1, 1]], bool), np.zeros((1, 4), bool)
    assert rate_differences((kept, lost), (kept, none), [0, 0, 1, 1])(np.ones((1, 4))).item() == .5


def test_a_weighted_median_is_the_median_of_repeated_values():
    rng = np.random.default_rng(1)
    for _ in range(50):
        values, times = rng.normal(size=8), rng.integers(0, 4, 8)
        times[0] += 1
        expected = np.median(np.repeat(values, times))
        assert np.isclose(weighted_median(values, times[None].astype(float)).item(), expected)


def test_medians_leave_out_what_is_not_kept_and_count_censored_as_infinite():
    values = np.array([[1., 2, np.inf, 7, 8, 9]])
    classes = np.array([0, 0, 0, 1, 1, 1])
    one, all_ = np.ones((1, 6)), np.ones((1, 6))
    assert class_medians(values, [[1, 1, 1, 0, 0, 0]], classes, one).item() == 2
    assert class_medians(values, [[0, 1, 1, 0, 0, 0]], classes, one).item() == np.inf
    assert class_medians(values, all_, classes, one).item() == 7.5
    found = median_differences((all_, values), (all_, values + 1), classes)(one)
    assert found.tolist() == [[[-1]]]


def test_pairs_of_one_source_are_drawn_together_and_classes_keep_their_size():
    images, classes = [5, 5, 6, 7, 7, 8], [0, 0, 0, 1, 1, 1]
    w = pair_weights(images, classes, 400, np.random.default_rng(0))
    assert (w[:, 0] == w[:, 1]).all() and (w[:, 3] == w[:, 4]).all()
    assert np.allclose(w[:, [0, 2]].sum(1), 1) and np.allclose(w[:, [3, 5]].sum(1), 1)
    assert len(np.unique(w[:, 0])) > 1 and not np.array_equal(w[:, 0], w[:, 3])


def test_the_bootstrap_finds_the_standard_error_of_the_variance_components():
    exact = np.sqrt((.1**2 + .2**2/60)*(1/6 + 1/5))
    found = [crossed_bootstrap(rate_differences(*arms(np.random.default_rng(s)), CLASSES),
                               np.arange(60),
                               CLASSES, 300, s).draws.std()/widening(9) for s in range(60)]
    assert abs(np.sqrt(np.mean(np.square(found)))/exact - 1) < .15


def test_images_are_the_same_for_both_arms():
    "What an image does to both arms must not move the estimate."
    quiet, loud = (arms(np.random.default_rng(3), sigma=(.1, s, 0)) for s in (0, 9))
    of = lambda a: crossed_bootstrap(rate_differences(*a, CLASSES), np.arange(60), CLASSES, 500)
    assert np.isclose(*(np.ptp(interval(of(a).draws)) for a in (quiet, loud)))


def test_with_one_image_for_all_it_is_a_bootstrap_of_seeds_that_agrees_with_students_test():
    rng = np.random.default_rng(4)
    a, b = rng.normal(0, 1, (10, 1)), rng.normal(.3, 1, (10, 1))
    ones = np.ones((10, 1))
    found = crossed_bootstrap(rate_differences((ones, a), (ones, b), [0]), [0], [0], 20_000)
    assert np.isclose(found.factor, widening(18))
    low, high = ttest_ind(a, b).confidence_interval(.95)
    assert np.isclose(found.estimate, a.mean() - b.mean())
    assert np.allclose(interval(found.draws), [low.item(), high.item()], atol=.1)


def test_the_same_seed_gives_the_same_draws_in_parts_of_any_size():
    a = arms(np.random.default_rng(5), shift=.2)
    of = lambda **k: crossed_bootstrap(rate_differences(*a, CLASSES), np.arange(60), CLASSES, 50,
                                       **k)
    assert np.allclose(of(part=7).draws, of().draws)
    assert not np.allclose(of(seed=1).draws, of().draws)


def test_the_noise_is_counted_once():
    assert np.isclose(spread(1 + 4, 2 + 4, 1 + 2 + 12)**2, 7/15)
    assert spread(5, 1, 20) == spread(1, 5, 20) == np.sqrt(5/20)
    assert spread(0., 0., 0.) == 1


def test_two_sided_p():
    assert two_sided(np.array([1.]*99)) == .02
    assert two_sided(np.array([1., -1.])) == 1
    assert two_sided(-np.arange(-10, 90.)) == two_sided(np.arange(-10, 90.))


def test_holm_by_hand():
    assert np.allclose(holm([.01, .04, .03, .005]), [.03, .06, .06, .02])
    assert np.allclose(holm([.04, .011]), [.04, .022])
    assert holm([.9, .8]).tolist() == [1, 1]


@pytest.mark.parametrize('numbers, word', [
    ((8, .01, 4, 12), 'differs'), ((-8, .01, -12, -4), 'differs'), ((4.9, .01, 2, 5.9), 'the same'),
    ((4.9, .01, 2, 7), 'undecided'), ((8, .05, 1, 15), 'undecided'), ((0, 1, -6, 6), 'the same'),
    ((0, 1, -6.1, 5), 'undecided'), ((np.inf, .001, 1, 2), 'undecided'),
    ((8, np.nan, 4, 12), 'undecided')])
def test_words(numbers, word):
    assert in_words(*numbers, matters=5, band=6) == word
