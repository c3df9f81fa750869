"""Run by `test_distributed.py` in two processes: reconstruct alone, then together, and write what came out."""

import datetime
import importlib.util
import pathlib
import sys
from typing import Any

import torch
from torch import Tensor, distributed, nn

from q_aquant import (
    ActivationScales,
    Borders,
    ElementBorder,
    FisherLoss,
    InputPlacement,
    OutputPlacement,
    Plan,
    WeightRounding,
    aquant,
    brecq,
    qdrop,
)
from q_aquant.placement import Placement
from q_aquant.setup import Bits, Options, Setup

ITERATIONS, BATCH, PACE = 8, 8, 30.0
"""With the rates of so few steps, which are a hundred times as large, a unit of these small networks learns nothing."""

QDROP = Plan((WeightRounding(), ActivationScales()), mixing=0.5, drop=0.5, iterations=ITERATIONS, pace=PACE)
BORDERS = (WeightRounding(lr=3e-3, penalty=0.05, beta=(16.0, 2.0)), ActivationScales(), Borders())
AQUANT = Plan(BORDERS, form=ElementBorder(), mixing=0.5, iterations=ITERATIONS, pace=PACE)
# What no alias does: patches that drop their quantization, and a loss that weighs.
DROPPED = Plan(BORDERS, form=ElementBorder(), drop=0.5, loss=FisherLoss(), iterations=ITERATIONS, pace=PACE)
PLANS: dict[str, tuple[Plan, Placement]] = {
    "qdrop": (QDROP, OutputPlacement()),
    "aquant": (AQUANT, InputPlacement()),
    "dropped": (DROPPED, InputPlacement()),
}


def network() -> tuple[nn.Module, Tensor]:
    """The network and the images of the tests, in double precision."""
    # By its file: run as a script, this one is in no package.
    spec = importlib.util.spec_from_file_location("networks", pathlib.Path(__file__).with_name("networks.py"))
    networks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(networks)
    return networks.net().double(), networks.images(28).double()


def learned(name: str, **options: Any) -> dict[str, Tensor]:
    """What a plan makes of the network, everything that learns in double precision."""
    model, images = network()
    plan, placement = PLANS[name]
    setup = Setup.of(model, [images], Bits(3, 3, 8), Options(**{"batch_size": BATCH, "looks": 2, **options}))
    twin, _, _ = setup.quantize(setup.model, placement, weights=True, activations=True)
    twin, logs = setup.learn(twin.double(), plan, "units")
    outcomes = [[log.start, log.error, float(log.best)] for log in logs]
    return {**twin.state_dict(), "outcomes": torch.tensor(outcomes, dtype=torch.float64)}


def made(folder: pathlib.Path) -> dict[str, dict[str, Tensor]]:
    """What the aliases make of the network, as anybody would call them."""
    model, images = network()
    common = {"weight_bits": 3, "activation_bits": 3, "iterations": 4, "batch_size": BATCH, "progress": False}
    return {
        f"alias {method.__name__}": method(model.float(), [images.float()], **common, **options).model.state_dict()
        for method, options in (
            (qdrop, {"journal": folder / "qdrop"}),
            (aquant, {}),
            (brecq, {"activation_iterations": 4}),
        )
    }


def main(rank: int, folder: pathlib.Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # borders are made in it
    found: dict[str, dict[str, Tensor]] = {}
    if rank == 0:
        for name in PLANS:
            found[f"{name} alone"] = learned(name, progress=False)
            found[f"{name} with less"] = learned(name, batch_size=BATCH // 2, progress=False)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    found |= {name: learned(name, progress=False) for name in PLANS}
    torch.set_default_dtype(torch.float32)
    found |= made(folder)
    # Once more, from the journal that both wrote.
    found |= {f"resumed {name}": state for name, state in made(folder).items() if "qdrop" in name}
    distributed.destroy_process_group()
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), pathlib.Path(sys.argv[2]))
