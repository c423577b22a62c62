"""Muon against the singular value decomposition and against PyTorch's."""

import pytest
import torch

from common.training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(6, 6), (5, 40), (40, 5), (1, 9), (9, 1)])
def test_orthogonalize_keeps_the_singular_vectors_and_sets_the_values_near_one(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    values = u.T @ orthogonalize(matrix, torch.float64) @ v.T
    assert torch.allclose(values, values.diagonal().diag(), rtol=0, atol=1e-9)  # the same vectors
    assert (values.diagonal() > 0.6).all() and (values.diagonal() < 1.3).all()


def test_matrices_of_one_shape_may_go_together():
    matrices = torch.randn(3, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = orthogonalize(matrices, torch.float64)
    for matrix, found in zip(matrices, together, strict=True):
        assert torch.allclose(found, orthogonalize(matrix, torch.float64), rtol=0, atol=1e-12)
    assert torch.allclose(orthogonalize(matrices.mT, torch.float64), together.mT, rtol=0, atol=1e-12)


def test_bfloat16_moves_the_result_by_a_few_percent():
    matrix = torch.randn(96, 864, generator=torch.Generator().manual_seed(0))
    exact, rounded = orthogonalize(matrix), orthogonalize(matrix, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_steps_equal_those_of_pytorch():
    """torch.optim.Muon multiplies in bfloat16, hence the tolerance: 3% of one step after three."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(12, 7, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [Muon([ours], lr=0.1), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0)]
    for _ in range(3):
        before = ours.detach().clone()
        gradient = torch.randn(start.shape, generator=generator)
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
        assert (ours - theirs).norm() < 0.03 * (ours - before).norm()


def test_a_convolution_is_the_matrix_of_its_first_axis_by_the_rest():
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(2, 4, 3, 3, 3, generator=generator)
    kernel = torch.nn.Parameter(start.clone(memory_format=torch.channels_last))
    matrix = torch.nn.Parameter(start.flatten(1).clone())
    kernel.grad, matrix.grad = gradient.clone(), gradient.flatten(1)
    Muon([kernel], lr=0.1).step()
    Muon([matrix], lr=0.1).step()
    assert torch.equal(kernel.detach().flatten(1), matrix.detach())


def test_a_gradient_of_zero_moves_nothing():
    weight = torch.nn.Parameter(torch.ones(3, 3))
    weight.grad = torch.zeros(3, 3)
    Muon([weight], lr=0.1).step()
    assert torch.equal(weight.detach(), torch.ones(3, 3))
