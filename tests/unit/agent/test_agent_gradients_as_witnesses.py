"""What good and bad gradients behind a finite loss say by themselves."""

from __future__ import annotations

import pytest

from gradwatch.nonfinite.birthplace import is_of_backward

# Backward reaches 3 (a bias) and 2 (a matrix), then 1 (a bias) and 0 (a matrix).
ORDER = (3, 2, 1, 0)
MATRICES = {0, 2}


def test_all_bad_below_a_good_matrix_came_up_in_backward() -> None:
    assert is_of_backward({1, 0}, ORDER, ORDER, MATRICES)


@pytest.mark.parametrize(
    ("bad", "of", "matrices"),
    [
        pytest.param({0}, ORDER, MATRICES, id="only a matrix: its input was bad"),
        pytest.param({2, 1, 0}, ORDER, MATRICES, id="the last matrix too: what it was given was bad"),
        pytest.param({3, 2, 1, 0}, ORDER, MATRICES, id="all: the loss's own derivative may be bad"),
        pytest.param({1}, ORDER, MATRICES, id="a bias, and not what is below it"),
        pytest.param({1, 0}, (1, 0), MATRICES, id="the matrix above has no gradient"),
        pytest.param({1, 0}, ORDER, (), id="no matrix can speak for the forward pass"),
        pytest.param((), ORDER, MATRICES, id="nothing is bad"),
    ],
)
def test_anything_else_may_have_been_born_before(
    bad: set[int], of: tuple[int, ...], matrices: set[int]
) -> None:
    assert not is_of_backward(bad, of, ORDER, matrices)
