"""Swin transformers of torchvision whose attention can be quantized.

torchvision's attention hands the weights of its two projections to a function and never calls them, so nothing that
takes their place has an effect: `q_nulsq` and `q_core.swap` report both as float. `with_called_projections` puts an
attention in its place that computes the same from the same tensors, and calls them.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from q_core.swap import replace_modules

APART = -100.0
"""Added to the score of two places that are neighbours only because the picture was rolled, as Swin was published."""


class WindowAttention(nn.Module):
    """Attention between the places of a window, of windows that may be shifted.

    Has the parameters and buffers of torchvision's `ShiftedWindowAttention`, under the same names.

    Args:
        source: The attention to take them from.

    Source:
        Liu et al. 2021 (Swin), arXiv:2103.14030, section 3.2.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.window, self.shift, self.heads = tuple(source.window_size), tuple(source.shift_size), source.num_heads
        self.attention_dropout, self.dropout = source.attention_dropout, source.dropout
        self.qkv, self.proj = source.qkv, source.proj
        self.relative_position_bias_table = source.relative_position_bias_table
        self.register_buffer("relative_position_index", source.relative_position_index)
        self.train(source.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each place [b, h, w, c] collects from its window, in the same shape."""
        height, width = x.shape[1:3]
        # Whole windows only; where a single one is as large as the picture, there is nothing to shift.
        below, beside = (-size % window for size, window in zip((height, width), self.window, strict=True))
        x = F.pad(x, (0, 0, 0, beside, 0, below))
        sizes = tuple(x.shape[1:3])
        shift = tuple(
            by if size > window else 0 for by, size, window in zip(self.shift, sizes, self.window, strict=True)
        )
        windows = self.cut(x.roll((-shift[0], -shift[1]), (1, 2)))
        query, key, value = self.qkv(windows).unflatten(-1, (3, self.heads, -1)).movedim((-3, -2), (0, -3))
        scores = (query * query.shape[-1] ** -0.5) @ key.mT + self.bias()
        if any(shift):
            scores = scores + self.apart(sizes, shift, x)[:, None]
        shares = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        out = self.proj((shares @ value).transpose(-3, -2).flatten(-2))
        out = F.dropout(out, self.dropout, self.training)
        return self.join(out, sizes).roll(shift, (1, 2))[:, :height, :width].contiguous()

    def cut(self, x: Tensor) -> Tensor:
        """Cut a picture [b, h, w, c] into windows [b, windows, places, c]."""
        rows, columns = self.window
        parts = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
        return parts.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def join(self, windows: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Undo `cut` for a picture of this height and width."""
        rows, columns = self.window
        parts = windows.unflatten(2, (rows, columns)).unflatten(1, (sizes[0] // rows, sizes[1] // columns))
        return parts.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def bias(self) -> Tensor:
        """Return what the place of one sees added to the score of the other [heads, places, places]."""
        places = self.window[0] * self.window[1]
        return (
            self.relative_position_bias_table[self.relative_position_index].unflatten(0, (places, places)).movedim(2, 0)
        )

    def apart(self, sizes: tuple[int, ...], shift: tuple[int, ...], like: Tensor) -> Tensor:
        """Return the mask [windows, places, places] between parts of the picture that rolling has put together."""
        bands = []
        for size, window, by in zip(sizes, self.window, shift, strict=True):
            place = torch.arange(size, device=like.device)
            bands.append((place >= size - window).long() + (place >= size - by) if by else torch.zeros_like(place))
        part = (bands[0][:, None] * 3 + bands[1])[None, :, :, None]
        parts = self.cut(part)[0, :, :, 0]
        return torch.where(parts[:, :, None] == parts[:, None, :], 0.0, APART).to(like)


def with_called_projections(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which the attention of torchvision's Swin calls its projections.

    Its outputs are the same up to rounding, its `state_dict` has the same keys. The attention of Swin V2, which has no
    scores but cosines, stays as it is.
    """
    from torchvision.models.swin_transformer import ShiftedWindowAttention

    twin = copy.deepcopy(model)
    found = [module for module in twin.modules() if type(module) is ShiftedWindowAttention]
    return replace_modules(twin, {id(module): WindowAttention(module) for module in found})
