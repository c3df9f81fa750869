"""The loop of `benchmarks/accuracy/qat.py` on images and a network made up here; a script of the trainer's tests.

trainer.py killed FOLDER                 begin runs, each in a process that is killed when one of its steps begins
trainer.py rank FOLDER RANK PORT         train alone (rank 0 only), then together with another process
"""

import dataclasses
import importlib.util
import os
import pathlib
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ROOT = pathlib.Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "benchmarks" / "accuracy" / "qat.py"
STEPS, SAVED, BATCH, BITS = 10, 3, 12, 2
MOMENTS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
PLAIN, LOWERED, DISTILLED = "nuLSQ-WA", "nuLSQ-A from one bit more, top folded", "LSQ, distilled"
KILLED = {
    "before the first snapshot": (PLAIN, 2),
    "after two snapshots": (PLAIN, 7),
    # One bit more is trained first, and its steps are merged before step 5 begins.
    "before the merge": (LOWERED, 4),
    "at the merge": (LOWERED, 5),
    "after the merge and a snapshot": (LOWERED, 8),
    "with a teacher": (DISTILLED, 4),
}
"""Which run is killed, and at which step."""


def script() -> Any:
    """The module of the trainer, by its file."""
    if "qat" not in sys.modules:
        sys.path[:0] = [str(SCRIPT.parent)]
        spec = importlib.util.spec_from_file_location("qat", SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["qat"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["qat"]


class Network(nn.Module):
    """A small network with a linear bottleneck, so that some inputs are signed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 4, 3, stride=4, padding=1, bias=False), nn.BatchNorm2d(4)
        self.inner, self.bn2 = nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(5)
        self.linear = nn.Conv2d(5, 6, 1)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.inner(self.bn1(self.stem(x)).relu()))
        return self.fc(self.linear(x).relu().mean((2, 3)))


def network() -> nn.Module:
    """With batch norms that have seen data."""
    torch.manual_seed(3)
    model = Network()
    for _ in range(3):
        model(torch.randn(16, 3, 32, 32))
    return model.eval()


def pictures(count: int = 60) -> tuple[Tensor, Tensor]:
    """Images of noise that is brighter for higher classes."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 10, (count,), generator=generator)
    noise = torch.randint(0, 130, (count, 32, 32, 3), generator=generator)
    return (noise + 12 * labels.reshape(-1, 1, 1, 1)).to(torch.uint8), labels


def settings(variant: str, **changes: Any) -> Any:
    plain = {"network": "made-up", "variant": variant, "bits": BITS, "seed": 1, "steps": STEPS, "batch": BATCH}
    rates = {"lr": 0.05, "step_lr": 2e-3, "weight_decay": 1e-4, "warmup": 2}
    return script().Settings(**(plain | rates | {"frozen_norms": False, "precision": "float32"} | changes))


def variant_of(name: str) -> Any:
    return next(variant for variant in script().VARIANTS if variant.name == name)


def run(name: str, out: pathlib.Path | None = None, images: Callable[..., Any] | None = None, **changes: Any) -> Any:
    """A run that has not begun."""
    qat = script()
    chosen, variant = settings(name, **changes), variant_of(name)
    made = (images or qat.Images)(chosen, *pictures(), MOMENTS)
    return qat.Run(chosen, variant, made, network(), qat.Ranks(), out=out, saved=SAVED)


def kill_each(folder: pathlib.Path) -> list[int]:
    """Begin every run of `KILLED` in a process of its own, and return the signals that ended them."""
    script()  # imported once for all of them
    ended = []
    for case, (name, step) in KILLED.items():
        process = os.fork()
        if not process:
            try:
                begin(folder / case, name, step)
            finally:
                os._exit(0)
        ended.append(os.WTERMSIG(os.waitpid(process, 0)[1]))
    return ended


def begin(folder: pathlib.Path, name: str, step: int) -> None:
    """Train until the step, and be killed then."""

    class Deadly(script().Images):
        def batch(self, now: int) -> tuple[Tensor, Tensor]:
            if now == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().batch(now)

    run(name, folder, Deadly).train()


def double_run(name: str, **changes: Any) -> Any:
    """A run in float64, in which no sum can move a value to another level."""
    qat = script()

    class Doubles(qat.Images):
        def batch(self, step: int) -> tuple[Tensor, Tensor]:
            x, y = super().batch(step)
            return x.double(), y

        def calibration(self) -> list[Tensor]:
            return [batch.double() for batch in super().calibration()]

    def widened(method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        made = method(*arguments, **options)
        made.model.double()
        return made

    chosen = settings(name, frozen_norms=True, **changes)
    variant = variant_of(name)
    variant = dataclasses.replace(variant, method=partial(widened, variant.method))
    images = Doubles(chosen, *pictures(), MOMENTS)
    return qat.Run(chosen, variant, images, network().double(), qat.Ranks(), saved=SAVED)


def outcome(trained: Any) -> dict[str, Tensor]:
    """Everything a run ends with, by name."""
    found = {f"model.{name}": tensor for name, tensor in trained.model.state_dict().items()}
    for index, optimizer in enumerate(trained.optimizers):
        for place, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer{index}.{place}.{name}": torch.as_tensor(value) for name, value in state.items()}
    found["losses"] = torch.tensor(trained.losses, dtype=torch.float64)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def rank(folder: pathlib.Path, number: int, port: int) -> None:
    found: dict[str, dict[str, Tensor]] = {}

    def train(label: str, names: tuple[str, ...] = ("LSQ", PLAIN, LOWERED), **changes: Any) -> None:
        for name in names:
            trained = double_run(name, **changes)
            trained.train()
            found[f"{name} {label}"] = outcome(trained)

    if number == 0:
        train("alone")
        train("of half the images", batch=BATCH // 2)
    place = {"RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in place.items()}
    qat = script()
    ranks = qat.Ranks()
    train("together")
    # With norms that see a share each, in float32 and with a log and snapshots, as the script does it.
    out = folder / "out"
    first = run(PLAIN, out)
    first.train()
    found["plain"] = outcome(first)
    torch.distributed.barrier()
    again = run(PLAIN, out)
    again.train()
    found["again"] = outcome(again)
    errors = []
    for broken in ("batch", "share"):
        try:
            if broken == "batch":
                run(PLAIN, batch=BATCH - 1)
            else:
                spoiled(number).train()
        except SystemExit as error:
            errors.append(str(error))
    ranks.close()
    torch.save({"found": found, "errors": errors}, folder / f"{number}.pt")


def spoiled(number: int) -> Any:
    """A run in which the images of one rank, at one step, are no numbers."""

    class Spoiled(script().Images):
        def batch(self, step: int) -> tuple[Tensor, Tensor]:
            x, y = super().batch(step)
            if step == 2:
                x[0] = torch.nan  # of the share of rank 0
            return x, y

    return run(PLAIN, images=Spoiled)


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, where, *rest = sys.argv[1:]
    if task == "killed":
        signals = kill_each(pathlib.Path(where))
        sys.exit(signals != [signal.SIGKILL] * len(KILLED))
    else:
        rank(pathlib.Path(where), int(rest[0]), int(rest[1]))
