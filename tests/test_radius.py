"The search for the smallest radius, against a list."
import math

import pytest
import torch

from vae_robust.radius import ladder, log_radius, lowest_rung


def test_the_ladder_halves_every_sixteen_rungs():
    r = ladder()
    assert len(r) == 128 and r[0] == .4 and torch.allclose(r[16:], r[:-16]/2)
    assert ladder(1, 1, 3).tolist() == [1, .5, .25]


@pytest.mark.parametrize('n', [1, 2, 8, 128])
def test_every_rung_is_found(n):
    radii = ladder(n=n)
    truth = torch.arange(-1, n)
    smallest = torch.cat([torch.tensor([.5]), radii])
    assert torch.equal(lowest_rung(lambda rows, eps: eps >= smallest[rows], n + 1, radii), truth)


def test_each_image_is_asked_at_its_own_radius_and_not_again_once_it_is_censored():
    asked = []
    def lost(rows, eps):
        asked.append((rows.tolist(), eps.tolist()))
        return rows != 1
    radii = ladder(n=4)
    assert lowest_rung(lost, 3, radii).tolist() == [3, -1, 3]
    assert [rows for rows, _ in asked] == [[0, 1, 2], [0, 2], [0, 2]]
    assert asked[1][1] == [radii[2].item()]*2 and asked[2][1] == [radii[3].item()]*2


def test_nothing_is_lost():
    never = lambda rows, eps: torch.zeros(len(rows), dtype=torch.bool)
    assert lowest_rung(never, 2, ladder()).tolist() == [-1, -1]


def test_the_logarithm_of_a_radius():
    radii = ladder()
    expected = [math.inf, *radii[[0, 127]].double().log().tolist()]
    assert log_radius(torch.tensor([-1, 0, 127]), radii).tolist() == expected
