"""Learn from a float teacher and from the labels at once."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from q_core.errors import RangeError


def distillation_loss(
    student: Float[Tensor, "n classes"],
    teacher: Float[Tensor, "n classes"],
    labels: Int64[Tensor, " n"],
    *,
    temperature: float = 4.0,
    share: float = 0.5,
) -> Float[Tensor, ""]:
    r"""Return cross entropy with the labels plus divergence from a teacher, in given shares.

    $$ L = (1 - \lambda)\,\mathrm{CE}(z, y) + \lambda\, T^2\, \mathrm{KL}\left( \mathrm{softmax}(z'/T) \,\|\,
       \mathrm{softmax}(z/T) \right) $$

    with $z$ the logits of the student and $z'$ those of the teacher, averaged over the batch. $T^2$ keeps the size of
    the gradient, which shrinks with the square of the temperature.

    Args:
        student: Logits of the network that learns.
        teacher: Logits of the teacher. They get no gradient.
        labels: Classes.
        temperature: T, positive; a larger one shows more of how the teacher ranks what it rejects.
        share: The weight of the teacher, from 0 (labels alone) to 1.

    Raises:
        RangeError: A temperature that is not positive, or a share outside 0 to 1.

    Source:
        Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
    """
    if not temperature > 0 or not 0 <= share <= 1:
        raise RangeError(
            f"temperature={temperature}, share={share}: the temperature must be positive, the share from 0 to 1"
        )
    goal = F.log_softmax(teacher.detach() / temperature, dim=1)
    divergence = F.kl_div(F.log_softmax(student / temperature, dim=1), goal, reduction="batchmean", log_target=True)
    return torch.lerp(F.cross_entropy(student, labels), temperature**2 * divergence, share)
