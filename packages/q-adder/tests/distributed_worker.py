"""Run by `test_distributed.py` in two processes: train alone, then together, and write what came out."""

import datetime
import pathlib
import sys

import torch
from torch import Tensor, distributed, nn

from q_adder import AdderConv2d, AdderLearningRate, adder_weights

STEPS = 3


def network() -> nn.Module:
    torch.manual_seed(1)
    # A batch norm would see another batch on each rank.
    middle = AdderConv2d(4, 5, 3, stride=2), nn.GroupNorm(1, 5, affine=False), nn.ReLU()
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), *middle, AdderConv2d(5, 2, 3)).double()


def trained(images: Tensor, *, parallel: bool, accumulate: int = 1, rule: bool = True) -> list[Tensor]:
    """Weights after some steps on the mean of the loss over images."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if rule:
        AdderLearningRate(optimizer, adder_weights(model))
    replica = nn.parallel.DistributedDataParallel(model) if parallel else model
    for _ in range(STEPS):
        optimizer.zero_grad()
        for part in images.chunk(accumulate):
            (replica(part).square().mean() / accumulate).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def main(rank: int, folder: pathlib.Path) -> None:
    torch.set_num_threads(1)
    images = torch.randn(8, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    result = {"alone": trained(images, parallel=False), "without": trained(images, parallel=False, rule=False)}
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=30),
    )
    mine = images[rank::2]
    result["together"] = trained(mine, parallel=True)
    result["accumulated"] = trained(mine, parallel=True, accumulate=2)
    distributed.destroy_process_group()
    torch.save(result, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), pathlib.Path(sys.argv[2]))
