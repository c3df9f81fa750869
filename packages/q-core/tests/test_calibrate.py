"""From observers to quantizers: streams, batches of every kind, reports."""

import collections
import gc
import io
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from q_core import (
    CalibrationReport,
    DataError,
    MinMaxObserver,
    Observer,
    PerBlock,
    PerChannel,
    PerTensor,
    Quantizer,
    QuantSpec,
    Recipe,
    Rule,
    SpecError,
    StateError,
    UniformGrid,
    calibrate,
    pack,
    swap,
)
from q_core.calibrate import feed

from .networks import (
    OBSERVERS,
    Branching,
    CalledTwice,
    Residual,
    Tied,
    TwoInputs,
    assert_bit_equal,
    everything,
    images,
    recipes,
    trained,
    untouched,
)

# What calibrate computes


def test_a_range_is_that_of_all_batches() -> None:
    model, batches = nn.Linear(3, 2), [torch.randn(4, 3) for _ in range(5)]
    twin, _ = swap(model, everything())
    report = calibrate(twin, batches)
    seen = torch.cat(batches)
    expected = UniformGrid.from_range(QuantSpec.unsigned(8), seen.min().reshape(1, 1), seen.max().reshape(1, 1))
    assert_bit_equal(twin.input_quantizer.grid.state_dict(), expected.state_dict())
    rows = model.weight.detach().amin(1, keepdim=True), model.weight.detach().amax(1, keepdim=True)
    expected = UniformGrid.from_range(QuantSpec.signed(8), *rows)
    assert_bit_equal(twin.weight_quantizer.grid.state_dict(), expected.state_dict())
    assert report == CalibrationReport(batches=5, skipped=(), dead={}, widened=(), reused={})


def test_everything_else_is_float_while_observers_look() -> None:
    """The range of a layer does not depend on how the layers before it are quantized."""
    model, batches = trained(Residual()), images()
    coarse, _ = swap(model, [Rule("fc", *recipes()), Rule(".*", *recipes(1, 1))])
    alone, _ = swap(model, [Rule("fc", *recipes())])
    calibrate(coarse, batches)
    calibrate(alone, batches)
    assert_bit_equal(coarse.fc.state_dict(), alone.fc.state_dict())


def test_no_observer_is_left_and_every_slot_that_was_asked_for_quantizes() -> None:
    twin, report = swap(trained(Residual()), everything())
    calibrate(twin, images())
    assert not any(isinstance(module, Observer) for module in twin.modules())
    assert sum(isinstance(module, Quantizer) for module in twin.modules()) == 2 * len(report.swapped)


def test_calibrating_twice_is_refused() -> None:
    twin, _ = swap(trained(Residual()), everything())
    calibrate(twin, images())
    with (
        untouched(twin),
        pytest.raises(StateError, match=r"holds no observer: call swap\(\) first.*calibrated already"),
    ):
        calibrate(twin, images())


def test_a_float_model_is_refused() -> None:
    with pytest.raises(StateError, match="holds no observer"):
        calibrate(Residual(), images())


@pytest.mark.parametrize("option", ["on_nonfinite", "on_reuse"])
def test_a_misspelt_choice_is_refused(option: str) -> None:
    twin, _ = swap(CalledTwice(), everything())
    # Where the types are checked at run time, that check comes first, with an error of its own.
    with untouched(twin), pytest.raises((SpecError, TypeError), match=f"{option}='Raise'|parameter '{option}'"):
        calibrate(twin, [torch.randn(2, 4)], **{option: "Raise"})


def test_gradients_of_the_user_are_left_alone() -> None:
    twin, _ = swap(trained(Residual()), everything())
    assert torch.is_grad_enabled()
    x = images(1)[0].requires_grad_()
    calibrate(twin, [x])
    assert torch.is_grad_enabled()
    assert x.grad is None
    twin(x).sum().backward()
    assert x.grad is not None
    assert twin.stem.weight.grad is not None


def test_new_quantizers_have_the_mode_of_their_layer() -> None:
    twin, _ = swap(trained(Residual()), everything())
    twin.fc.train()
    calibrate(twin, images())
    modes = {path: module.training for path, module in twin.named_modules() if isinstance(module, Quantizer)}
    assert modes == {path: path.startswith("fc") for path in modes}


# Batches


def test_batches_of_every_usual_kind_are_understood() -> None:
    model = trained(Residual())
    batch = images(1)[0]
    Pair = collections.namedtuple("Pair", "image label")
    expected, _ = swap(model, everything())
    calibrate(expected, [batch])
    for kind in ((batch, torch.zeros(2)), [batch, "label"], [batch], {"x": batch}, Pair(batch, 3)):
        twin, _ = swap(model, everything())
        calibrate(twin, [kind])
        assert_bit_equal(twin.state_dict(), expected.state_dict())


def test_a_mapping_gives_keyword_inputs() -> None:
    twin, _ = swap(trained(TwoInputs()), everything())
    batch = {"mask": torch.randn(2, 2, 6, 6), "image": torch.randn(2, 3, 6, 6)}
    assert calibrate(twin, [batch, batch]).batches == 2


@pytest.mark.parametrize("batch", [3, "text", (), None], ids=["int", "str", "empty tuple", "None"])
def test_a_batch_of_another_kind_is_refused_and_forward_is_named(batch: Any) -> None:
    twin, _ = swap(trained(Residual()), everything())
    with (
        untouched(twin, writes=True),
        pytest.raises(DataError, match=r"batch of type \w+: a tensor, a mapping, or a list.*pass forward=") as caught,
    ):
        calibrate(twin, [batch])
    assert caught.value.__notes__ == ["while calibrating the model with batch 0"]


def test_forward_decides_how_a_batch_runs() -> None:
    twin, _ = swap(trained(TwoInputs()), everything())
    batch = ([torch.randn(2, 3, 6, 6)], {"deep": torch.randn(2, 2, 6, 6)})
    seen: list[Any] = []

    def forward(network: nn.Module, given: Any) -> Tensor:
        seen.append((network, given))
        return network(given[0][0], mask=given[1]["deep"])

    calibrate(twin, [batch], forward=forward)
    assert seen == [(twin, batch)]


def test_feed_returns_what_the_model_does() -> None:
    model, x = nn.Linear(3, 2), torch.randn(1, 3)
    for batch in (x, [x, 1], {"input": x}):
        assert_bit_equal(feed(model, batch), model(x))


def test_a_generator_that_runs_once_is_enough() -> None:
    model, batches = trained(Residual()), images(4)
    listed, _ = swap(model, everything())
    calibrate(listed, batches)
    once, _ = swap(model, everything())
    assert calibrate(once, (batch for batch in batches)).batches == 4
    assert_bit_equal(once.state_dict(), listed.state_dict())


def test_a_data_loader_with_labels_is_read_once() -> None:
    class Counted(torch.utils.data.Dataset):
        reads = 0

        def __len__(self) -> int:
            return 7

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            Counted.reads += 1
            return torch.full((3, 9, 9), float(index)), index

    twin, _ = swap(trained(Residual()), everything())
    assert calibrate(twin, torch.utils.data.DataLoader(Counted(), batch_size=3)).batches == 3
    assert Counted.reads == 7


def test_a_stream_without_a_length_is_read_to_its_end() -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(torch.randn(4, 3, 9, 9))

    class NoLength:
        def __iter__(self) -> Iterator[Tensor]:
            return iter(images(3))

        def __len__(self) -> int:
            raise NotImplementedError

    for batches, count in ((torch.utils.data.DataLoader(Endless(), batch_size=2), 2), (NoLength(), 3)):
        twin, _ = swap(trained(Residual()), everything())
        assert calibrate(twin, batches).batches == count


# Weights alone


def test_weights_alone_need_no_data() -> None:
    model = trained(Residual())
    twin, _ = swap(model, [Rule(".*", weight=recipes(4)[0])])

    def never() -> Iterator[Tensor]:
        pytest.fail("no activation is quantized, so no batch is needed")
        yield

    assert calibrate(twin, never()).batches == 0
    again, _ = swap(model, [Rule(".*", weight=recipes(4)[0])])
    assert calibrate(again, []).batches == 0
    assert_bit_equal(again.state_dict(), twin.state_dict())
    x = images(1)[0]
    assert_bit_equal(pack(twin)(x), twin(x))


def test_activations_alone_leave_the_weights_float() -> None:
    twin, _ = swap(trained(Residual()), [Rule(".*", input=recipes(8, 4)[1])])
    calibrate(twin, images())
    assert isinstance(twin.stem.weight_quantizer, nn.Identity)
    assert isinstance(twin.stem.input_quantizer, Quantizer)


# Layers that do not run


def test_a_layer_that_never_ran_is_named() -> None:
    class Idle(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.ModuleList([nn.Linear(2, 2)])

    twin, _ = swap(trained(Idle()), everything())
    with (
        untouched(twin, writes=True),
        pytest.raises(StateError, match=r"1 layers saw no data \(unused\.0\).*rule without"),
    ):
        calibrate(twin, images())
    twin, _ = swap(trained(Idle()), [Rule(r"unused\..*"), *everything()])  # the way out that the message names
    calibrate(twin, images())


def test_a_layer_may_run_in_some_batches_only() -> None:
    twin, _ = swap(Branching(), everything())
    calibrate(twin, [torch.rand(2, 4), -torch.rand(2, 4), torch.rand(2, 4)])


def test_a_layer_hidden_from_the_tree_of_modules_is_found_out() -> None:
    """A plain list is no ModuleList: what runs is the float layer, and the layer with slots sees nothing."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.layers = [self.linear]

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    twin, _ = swap(Hidden(), everything())
    with pytest.raises(StateError, match=r"1 layers saw no data \(linear\)"):
        calibrate(twin, [torch.randn(2, 3)])


# Errors say where


def test_an_error_of_an_observer_names_the_layer_and_the_batch() -> None:
    per_channel = Recipe(QuantSpec.unsigned(8, granularity=PerChannel(1)))
    twin, _ = swap(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), [Rule("1", input=per_channel)])
    batches = [torch.randn(2, 3), torch.randn(2, 2, 3)]
    with untouched(twin, writes=True), pytest.raises(ValueError, match="does not tile a tensor of shape") as caught:
        calibrate(twin, batches)
    assert caught.value.__notes__ == ["while calibrating 1 with batch 1"]


def test_a_model_that_is_not_deterministic_still_gets_an_error_that_names_the_batch() -> None:
    class Flaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.runs = nn.Linear(3, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            return self.linear(x / 0 if self.runs == 2 else x)

    twin, _ = swap(Flaky(), everything())
    with pytest.raises(DataError, match="batch 1 held non-finite values, but not when it ran again"):
        calibrate(twin, [torch.ones(1, 3)] * 3)


# Memory


class Watched:
    """An iterator of batches that counts, when asked for the next, how many of its batches are still alive."""

    def __init__(self, count: int) -> None:
        self.left, self.references, self.alive = count, [], []

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        self.alive.append(sum(reference() is not None for reference in self.references))
        if not self.left:
            raise StopIteration
        self.left -= 1
        batch = torch.randn(2, 3, 9, 9)
        self.references.append(weakref.ref(batch))
        return batch


@pytest.mark.parametrize("options", [{}, {"on_nonfinite": "skip"}, {"progress": False}])
def test_a_batch_is_gone_before_the_next_one_is_fetched(options: dict[str, Any]) -> None:
    twin, _ = swap(trained(Residual()), everything())
    batches = Watched(6)
    calibrate(twin, batches, **options)
    assert batches.alive == [0] * 7


@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
def test_the_statistics_have_a_fixed_size(observer: Callable[..., Observer]) -> None:
    twin, _ = swap(trained(Residual()), everything(observer=observer))

    def size() -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in twin.state_dict().items()}

    before = size()
    with torch.no_grad():
        for batch in images(3):
            twin.eval()(batch * 10 ** torch.randint(-3, 4, ()))
            assert size() == before


def collected(batch: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    """Yield a batch again and again, without the reference cycles that hooks leave until Python collects them."""
    for _ in range(count):
        gc.collect()
        yield batch


def test_python_memory_does_not_grow_with_the_number_of_batches() -> None:
    peaks = []
    batch = images(1)[0]
    calibrate(swap(trained(Residual()), everything())[0], [batch])  # fill the caches of torch and of Python first
    for count in (5, 30):
        twin, _ = swap(trained(Residual()), everything())
        gc.collect()
        tracemalloc.start()
        calibrate(twin, collected(batch, count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Anything kept of a batch, 200 bytes only, would add 5000.
    assert peaks[1] < peaks[0] + 5000


# The progress bar


def test_the_progress_bar_is_silent_where_the_output_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    for progress in (True, False):
        twin, _ = swap(trained(Residual()), everything())
        calibrate(twin, images(), progress=progress)
    assert capfd.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_bar_counts_batches_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for progress, batches, shown in (
        (True, images(3), "3/3"),
        (True, (batch for batch in images(3)), "3batch"),  # no length to show
        (False, images(3), ""),
    ):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        twin, _ = swap(trained(Residual()), everything())
        calibrate(twin, batches, progress=progress)
        written = terminal.getvalue()
        assert shown in written
        assert bool(written) == progress


# The integer bias


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock((2, 1))])
def test_only_the_scales_that_must_be_widened_are(granularity: Any) -> None:
    weight = Recipe(QuantSpec.signed(8, granularity=granularity), observer=MinMaxObserver)
    plain, widened = (swap(nn.Linear(2, 4), [Rule("", weight, recipes()[1])])[0] for _ in range(2))
    widened.weight = plain.weight
    plain.bias.data.zero_()
    widened.bias.data.copy_(torch.tensor([0, 0, 0, 1e12]))
    x = torch.rand(3, 2)
    assert calibrate(plain, [x]).widened == ()
    assert calibrate(widened, [x]).widened == ("weight_quantizer",)
    before, after = (layer.weight_quantizer.grid.scale for layer in (plain, widened))
    last = after[-1:]
    assert (last > before[-1:]).all()
    assert_bit_equal(after[:-1], before[:-1])
    unit = last.double() * widened.input_quantizer.grid.scale.double()
    # The smallest scale that keeps the bias at half of 32 bits, rounded to float32 twice.
    torch.testing.assert_close(1e12 / unit, torch.full_like(unit, 2.0**30), rtol=2**-22, atol=0)


def test_a_bias_without_a_quantized_input_has_no_unit_to_fit() -> None:
    layer = nn.Linear(2, 4)
    layer.bias.data.fill_(1e30)
    twin, _ = swap(layer, [Rule("", weight=recipes()[0])])
    assert calibrate(twin, []).widened == ()


def test_a_tied_weight_is_listed_as_dead_for_each_layer() -> None:
    model = Tied()
    model.encoder.weight.data[2] = 0
    twin, _ = swap(model, everything())
    dead = calibrate(twin, [torch.randn(4, 6)]).dead
    assert dead == {"encoder.weight_quantizer": (2,), "decoder.weight_quantizer": (2,)}
