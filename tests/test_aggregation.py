"""How the gradients of many objectives become one."""

import itertools
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from training.aggregation import AGGREGATORS, REGULARISATION, statistics, weigh, weighting
from utils.errors import UserError


def solved(gramian: Tensor) -> Tensor:
    """m times UPGrad's weights (m,), written anew: of every row the v >= e_i with the least v G v. Every set
    of weights that may lie at their bound is tried. Where gradients depend on each other, the regularisation
    decides, beside their squared lengths."""
    count = len(gramian)
    squares = gramian.diagonal().where(gramian.diagonal() > 0, torch.ones(()).double())
    gramian = (gramian + REGULARISATION * (gramian.diagonal() > 0).sum() * squares.diag()).numpy()
    total = np.zeros(count)
    for bound in np.eye(count):
        candidates = []
        for free in itertools.product((False, True), repeat=count):
            free, weights = np.array(free), bound.copy()
            if free.any():
                weights[free] = np.linalg.solve(
                    gramian[np.ix_(free, free)], -gramian[np.ix_(free, ~free)] @ bound[~free]
                )
            if (weights >= bound - 1e-12).all():
                candidates.append(weights)
        total += min(candidates, key=lambda weights: weights @ gramian @ weights)
    return torch.from_numpy(total)


def jacobians() -> dict[str, Tensor]:
    """Random and degenerate ones (m, n), float64."""
    generator = torch.Generator().manual_seed(0)
    found = {
        f"random {m} x {n}": torch.randn(m, n, generator=generator).double()
        for m, n in ((2, 5), (5, 20), (8, 8), (7, 3))
    }
    base = torch.randn(6, 10, generator=generator).double()
    twins, opposed, idle, scaled = base.clone(), base.clone(), base.clone(), base.clone()
    twins[3] = twins[1]
    opposed[3] = -0.5 * opposed[1]
    idle[2] = 0
    scaled[4] *= 1e-4
    alike = torch.ones(4, 3).double()
    return found | {"twins": twins, "opposed": opposed, "idle": idle, "scaled": scaled, "alike": alike}


@pytest.mark.parametrize("name", jacobians())
@pytest.mark.parametrize("length", [1.0, 1e-6])
def test_upgrad_solves_its_quadratic_programme(name, length):
    """Also where the gradients are short: torchjd's own projector takes those for zero."""
    pytest.importorskip("torchjd")
    jacobian = length * jacobians()[name]
    gramian = jacobian @ jacobian.T
    weights, failed = weigh("upgrad", weighting("upgrad"), gramian, seed=0)
    assert not failed and (weights - solved(gramian)).abs().max() < 1e-5 * weights.abs().max()
    update = jacobian.T @ weights
    assert (jacobian @ update >= -1e-5 * jacobian.norm(dim=1) * update.norm()).all()


def test_gradient_descent_raises_an_objective_where_upgrad_raises_none():
    pytest.importorskip("torchjd")
    jacobian = torch.tensor([[4.0, 1.0], [-1.0, 0.5], [-0.5, 0.5]]).double()
    gramian = jacobian @ jacobian.T
    even, weights = torch.ones(3).double(), weigh("upgrad", weighting("upgrad"), gramian, seed=0)[0]
    assert (gramian @ even).min() < -1
    assert (gramian @ weights).min() > -1e-5
    found = statistics(gramian, weights)
    assert found["conflicts"] == pytest.approx(2 / 3) and found["gramian_min"] == pytest.approx(-3.5)
    assert 0 < found["gd_similarity"] < 1


@pytest.mark.parametrize("name", AGGREGATORS)
def test_without_a_conflict_every_method_gives_the_same_update_whatever_the_order(name):
    """Equal objectives: the sum of their gradients. And what is random follows from the seed alone."""
    method = method_or_skip(name)
    gramian = torch.ones(3, 3, dtype=torch.float64) * 2
    weights, failed = weigh(name, method, gramian, seed=1)
    if name not in ("imtlg", "fairgrad", "aligned_mtl"):  # these choose lengths of their own
        assert not failed and weights.sum() == pytest.approx(3, rel=1e-3)
    torch.manual_seed(5)
    uneven = torch.tensor([[2.0, -1.0, 0.3], [-1.0, 1.0, 0.1], [0.3, 0.1, 0.5]])
    first = weigh(name, method, uneven, seed=1)[0]
    torch.manual_seed(6)
    assert torch.equal(first, weigh(name, method, uneven, seed=1)[0])


def method_or_skip(name: str):
    try:
        return weighting(name)
    except UserError as error:
        pytest.skip(str(error))


def test_a_solver_that_fails_leaves_the_mean_and_says_so():
    def raises(gramian: Tensor) -> Tensor:
        raise ValueError("no solution")

    gramian = torch.eye(3)
    for method in (raises, lambda gramian: torch.full((3,), torch.nan)):
        weights, failed = weigh("upgrad", method, gramian, seed=0)
        assert failed and torch.equal(weights, torch.ones(3, dtype=torch.float64))
    # What is not a number is no failure of the solver: its update is skipped.
    assert weigh("upgrad", raises, gramian * torch.nan, seed=0)[1] is False


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(
        UserError,
        match=r"objective.aggregator=mgda needs the package torchjd: pip install -e '.\[jacobian\]'",
    ):
        weighting("mgda")
