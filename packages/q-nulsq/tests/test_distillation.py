"""The loss that learns from labels and a teacher."""

import pytest
import torch
from torch.nn import functional as F

from q_core import RangeError
from q_nulsq.distillation import distillation_loss


def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher = (torch.randn(6, 5, dtype=torch.float64) * 3 for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(0, 5, (6,))


def test_the_loss_is_the_formula() -> None:
    student, teacher, labels = logits()
    p, q = (each.div(2.5).softmax(1) for each in (teacher, student))
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    expected = 0.3 * F.cross_entropy(student, labels) + 0.7 * 2.5**2 * divergence
    found = distillation_loss(student, teacher, labels, temperature=2.5, share=0.7)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)  # sums of a few float64 numbers


def test_shares_of_none_and_all_are_the_single_losses() -> None:
    student, teacher, labels = logits()
    torch.testing.assert_close(
        distillation_loss(student, teacher, labels, share=0.0), F.cross_entropy(student, labels), rtol=1e-15, atol=0
    )
    # A student that has learned everything: 0, up to the rounding of logarithms.
    found = distillation_loss(teacher, teacher, labels, share=1.0)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-14)


def test_a_hot_loss_has_the_gradient_of_matching_logits() -> None:
    student, teacher, labels = logits()
    (found,) = torch.autograd.grad(distillation_loss(student, teacher, labels, temperature=1e4, share=1.0), student)
    centred = [each - each.mean(1, keepdim=True) for each in (student.detach(), teacher)]
    expected = (centred[0] - centred[1]) / (5 * 6)  # Hinton et al. 2015, eq. 4: (z - v) / N, over a batch of 6
    # The next order in 1/T: logits of up to 10, over 1e4.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_the_teacher_does_not_learn() -> None:
    student, teacher, labels = logits()
    teacher.requires_grad_()
    distillation_loss(student, teacher, labels).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"temperature": -1.0}, {"share": 1.1}, {"share": -0.1}, {"temperature": float("nan")}],
)
def test_impossible_choices_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RangeError, match="the temperature must be positive, the share from 0 to 1"):
        distillation_loss(*logits(), **options)
