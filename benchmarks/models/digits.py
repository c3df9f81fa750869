"""A small residual network for images of 8x8 pixels, and the handwritten digits it is trained on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, relu

from q_adder import AdderConv2d, AdderLearningRate, adder_weights
from q_core import QuantAdd
from q_nulsq import parameter_groups, project_after, warmup_cosine

BATCH = 64


class Block(nn.Module):
    """Two 3x3 layers around a shortcut, which is a 1x1 layer where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, conv: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
        # A module, so that the addition can be quantized too.
        self.add = QuantAdd()

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return relu(self.add(y, self.shortcut(x)))


class DigitsResNet(nn.Module):
    """A stem, three stages of one block each, average pooling and a linear layer: 75 thousand weights.

    `conv` makes the layers of the blocks: convolutions, or adder layers with `q_adder.AdderConv2d`.
    """

    def __init__(
        self, widths: tuple[int, int, int] = (16, 32, 64), classes: int = 10, conv: Callable[..., nn.Module] = nn.Conv2d
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.stage1 = Block(widths[0], widths[0], 1, conv)
        self.stage2 = Block(widths[0], widths[1], 2, conv)
        self.stage3 = Block(widths[1], widths[2], 2, conv)
        self.fc = nn.Linear(widths[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(x.mean((2, 3)))


def load(seed: int, held_out: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Split the 1797 digits that scikit-learn brings into training and held-out images, each class alike.

    Returns:
        Images (count, 1, 8, 8) in [0, 1] and labels (count,), for training and held out.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    targets = torch.tensor(labels, dtype=torch.int64)
    indices = list(range(len(targets)))
    train, test = train_test_split(indices, test_size=held_out, stratify=labels, random_state=seed)
    return (images[train], targets[train]), (images[test], targets[test])


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    seed: int,
    say: Callable[[str], None],
    weight_decay: float = 5e-4,
) -> None:
    """Train with shifts by up to one pixel, momentum and a one-cycle learning rate; leave it in evaluation mode.

    Adder layers follow the rule of their own for the length of a gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    if any(isinstance(module, AdderConv2d) for module in model.modules()):
        AdderLearningRate(optimizer, adder_weights(model))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps, pct_start=0.2)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for part in torch.randperm(len(images), generator=generator).split(BATCH):
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            logits = model(_shifted(images[part], *shift))
            loss = cross_entropy(logits, labels[part], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(part)
        if epoch % 5 == 4:
            say(f"epoch {epoch + 1} of {epochs}, loss {total / len(images):.3f}")
    model.eval()


def train_quantized(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> None:
    """Train a model with quantizers, from trained weights, on images shifted in the same way.

    Momentum for weights, AdamW for what quantizers learn, one epoch of warm-up and a cosine.
    """
    generator = torch.Generator().manual_seed(seed)
    weights, norms, steps = parameter_groups(model, lr=0.04, weight_decay=5e-4, step_lr=1e-3)
    optimizers = torch.optim.SGD([weights, norms], momentum=0.9, nesterov=True), torch.optim.AdamW([steps])
    project_after(optimizers[1], model)
    per_epoch = -(-len(images) // BATCH)
    schedules = [warmup_cosine(optimizer, per_epoch, epochs * per_epoch) for optimizer in optimizers]
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(images), generator=generator).split(BATCH):
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            loss = cross_entropy(model(_shifted(images[part], *shift)), labels[part])
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for each in (*optimizers, *schedules):
                each.step()
    model.eval()


def _shifted(images: Tensor, down: int, right: int) -> Tensor:
    padded = pad(images, (1, 1, 1, 1))
    return padded[:, :, 1 - down : 9 - down, 1 - right : 9 - right]
