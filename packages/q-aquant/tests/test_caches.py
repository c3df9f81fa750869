"""Caches of activations: what is written is read, within the budget, or the error says why not."""

import copy
import gc
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor, nn

from q_aquant.caches import Cache, InHostMemory, OnDevice, Storage, collect, run_unit
from q_aquant.disk import OnDisk
from q_core.errors import (
    DataError,
    FormatError,
    MatchError,
    QuantizationError,
    RangeError,
    ShapeError,
    SpecError,
    StateError,
)

MIB = 1 << 20
KINDS = ("device", "host", "disk")


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Storage:
    return (
        {"device": OnDevice, "host": InHostMemory}[request.param](MIB)
        if request.param != "disk"
        else OnDisk(tmp_path, MIB)
    )


def filled(storage: Storage, values: Tensor) -> Cache:
    cache = storage.allocate(len(values), tuple(values.shape[1:]), values.dtype)
    cache.write(0, values)
    return cache


@hypothesis.given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.bool]),
    shape=st.lists(st.integers(0, 5), max_size=3),
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    data=st.data(),
)
def test_what_is_written_in_batches_is_read_in_any_order(
    kind: str, dtype: torch.dtype, shape: list[int], sizes: list[int], data: st.DataObject, tmp_path_factory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "law"
    storage = {"device": OnDevice, "host": InHostMemory, "disk": lambda: OnDisk(folder)}[kind]()
    count = sum(sizes)
    values = torch.randint(-9, 9, (count, *shape)).to(dtype)
    with storage.allocate(count, tuple(shape), dtype) as cache:
        assert len(cache) == count
        start = 0
        for size in sizes:
            cache.write(start, values[start : start + size])
            start += size
        indices = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=9) if count else st.just([])))
        found = cache.read(indices.to(torch.int64))
        assert found.dtype == dtype
        torch.testing.assert_close(found, values[indices.to(torch.int64)], rtol=0, atol=0)  # kept, not computed
    assert storage.used == 0
    assert kind != "disk" or not list(folder.iterdir())


def test_samples_can_be_written_again_and_what_was_read_is_a_copy(storage: Storage) -> None:
    values = torch.randn(5, 3)
    with filled(storage, values) as cache:
        rows = torch.tensor([1, 1, 4])
        cache.read(rows).zero_()
        torch.testing.assert_close(cache.read(rows), values[rows], rtol=0, atol=0)  # kept, not computed
        cache.write(3, values[:2])
        torch.testing.assert_close(cache.read(rows)[2], values[1], rtol=0, atol=0)  # kept, not computed


def test_a_strided_batch_with_a_gradient_is_written(storage: Storage) -> None:
    values = torch.randn(3, 4, 5, requires_grad=True).transpose(1, 2)
    with filled(storage, values) as cache:
        found = cache.read(torch.arange(3))
        assert not found.requires_grad
        torch.testing.assert_close(found, values.detach(), rtol=0, atol=0)  # kept, not computed


def test_what_is_written_with_channels_last_is_read_so(storage: Storage) -> None:
    values = torch.randn(5, 3, 4, 2).contiguous(memory_format=torch.channels_last)
    with storage.allocate(5, (3, 4, 2), values.dtype) as cache:
        cache.write(0, values[:2])
        cache.write(2, values[2:].contiguous())  # the first batch decides
        found = cache.read(torch.tensor([4, 0, 3]))
        torch.testing.assert_close(found, values[[4, 0, 3]], rtol=0, atol=0)  # kept, not computed
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert not found.is_contiguous()


def test_axes_of_length_1_may_have_any_stride(storage: Storage) -> None:
    values = torch.randn(5, 4).t()[:1, :1]
    with filled(storage, values) as cache:
        torch.testing.assert_close(cache.read(torch.tensor([0])), values, rtol=0, atol=0)  # kept, not computed


def test_more_than_the_budget_is_refused_with_what_is_needed_and_what_to_do(storage: Storage) -> None:
    with storage.allocate(64, (2, 1024), torch.float32) as cache:
        assert storage.used == cache.nbytes == MIB // 2
        advice = "fewer images" if isinstance(storage, OnDisk) else r"OnDisk\(folder\)"
        said = rf"65 samples of shape \(2048,\) in torch.float32 need 520 KiB; 512 KiB of a budget of 1 MiB .*{advice}"
        with pytest.raises(RangeError, match=said):
            storage.allocate(65, (2048,), torch.float32)
        storage.allocate(64, (2048,), torch.float32).close()
    with pytest.raises(RangeError, match="257 samples"):
        storage.allocate(257, (1024,), torch.float32)
    storage.allocate(256, (1024,), torch.float32).close()
    assert storage.used == 0


def test_a_cache_that_is_forgotten_frees_its_budget(storage: Storage) -> None:
    cache = filled(storage, torch.zeros(4, 4))
    assert storage.used == 64
    del cache
    gc.collect()
    assert storage.used == 0
    if isinstance(storage, OnDisk):
        assert not list(storage.folder.iterdir())


def test_closing_twice_frees_once(storage: Storage) -> None:
    cache = filled(storage, torch.zeros(4, 4))
    cache.close()
    cache.close()
    assert cache.closed
    assert storage.used == 0
    for use in (lambda: cache.read(torch.tensor([0])), lambda: cache.write(0, torch.zeros(1, 4))):
        with pytest.raises(StateError, match="the cache is closed"):
            use()


@pytest.mark.parametrize(
    ("error", "said", "use"),
    [
        (StateError, "sample 3 was not written", lambda cache: cache.read(torch.tensor([0, 3]))),
        (RangeError, "index 4 of a cache of 4", lambda cache: cache.read(torch.tensor([0, 4]))),
        (RangeError, "index -1 of a cache of 4", lambda cache: cache.read(torch.tensor([-1]))),
        (RangeError, "samples 2 to 5 written to a cache of 4", lambda cache: cache.write(2, torch.zeros(3, 2))),
        (RangeError, "samples -1 to 0 written", lambda cache: cache.write(-1, torch.zeros(1, 2))),
        (ShapeError, r"samples of shape \(3,\) written to .* \(2,\)", lambda cache: cache.write(0, torch.zeros(1, 3))),
        (
            SpecError,
            "float64 written to a cache of .*float32",
            lambda cache: cache.write(0, torch.zeros(1, 2).double()),
        ),
    ],
)
def test_a_wrong_use_is_refused(
    error: type[QuantizationError], said: str, use: Callable[[Cache], object], storage: Storage
) -> None:
    with storage.allocate(4, (2,), torch.float32) as cache:
        cache.write(0, torch.zeros(3, 2))
        with pytest.raises(error, match=said):
            use(cache)


def test_an_empty_cache_says_that_nothing_was_written(storage: Storage) -> None:
    with storage.allocate(2, (2,), torch.float32) as cache, pytest.raises(StateError, match="sample 1 was not written"):
        cache.read(torch.tensor([1]))


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(SpecError, match="budget=-1"):
        InHostMemory(-1)


def test_memory_that_the_machine_does_not_have_is_an_error() -> None:
    with (
        InHostMemory(1 << 62).allocate(1 << 30, (1 << 28,), torch.float32) as cache,
        pytest.raises(RangeError, match=r"cpu has no room for .* GiB of activations, though the budget allows them"),
    ):
        cache.write(0, torch.zeros(1, 1).expand(1, 1 << 28))


# ------------------------------------------------------------------ files


def only_file(folder: pathlib.Path) -> pathlib.Path:
    (path,) = folder.iterdir()
    return path


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RangeError, match=r"need 1.05e\+06 GiB; .* are free in .*: give another folder"):
        OnDisk(tmp_path, 1 << 62).allocate(1 << 20, (1 << 28,), torch.float32)
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_changed_is_refused_with_the_sample(tmp_path: pathlib.Path) -> None:
    with filled(OnDisk(tmp_path), torch.randn(5, 3)) as cache:
        with only_file(tmp_path).open("r+b") as file:
            file.seek(2 * 16 + 5)  # 3 floats a row, padded to 16 bytes
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        cache.read(torch.tensor([0, 1, 3, 4]))
        with pytest.raises(FormatError, match=r"is damaged at sample 2: .* start again"):
            cache.read(torch.tensor([4, 2]))


def test_a_file_that_was_cut_is_refused_and_does_not_kill_the_process(tmp_path: pathlib.Path) -> None:
    with filled(OnDisk(tmp_path), torch.randn(5000, 3)) as cache:
        os.truncate(only_file(tmp_path), 100)
        with pytest.raises(FormatError, match="holds 100 bytes instead of 80000"):
            cache.read(torch.tensor([4999]))
        with pytest.raises(FormatError, match="holds 100 bytes"):
            cache.write(0, torch.zeros(5000, 3))


def test_a_file_that_is_gone_is_refused(tmp_path: pathlib.Path) -> None:
    with filled(OnDisk(tmp_path), torch.randn(5, 3)) as cache:
        only_file(tmp_path).unlink()
        with pytest.raises(FormatError, match=r"activations-.*\.bin, a file of cached activations, is missing"):
            cache.read(torch.tensor([0]))


def test_files_of_a_killed_process_are_removed_and_those_of_a_living_one_kept(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("fcntl", reason="files are told apart by locks of POSIX")
    code = (
        "import sys, torch; from q_aquant.disk import OnDisk; "
        "cache = OnDisk(sys.argv[1]).allocate(3, (2,), torch.float32); print('ready', flush=True); sys.stdin.read()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        theirs = only_file(tmp_path)
        mine = filled(OnDisk(tmp_path), torch.zeros(2, 2))
        assert theirs.exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert theirs.exists()
    OnDisk(tmp_path)
    assert not theirs.exists()
    mine.read(torch.tensor([0]))
    mine.close()


# ------------------------------------------------------------------ running models


class Net(nn.Module):
    """A network with an activation in place, and a handler that takes every fault for its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
        self.tail = nn.Conv2d(4, 2, 1)
        self.idle = nn.Linear(1, 1)
        self.ends = 0

    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.block(self.norm(self.stem(x)))
        except Exception:  # what ends a pass must not end here
            y = x[:, :1].expand(-1, 4, -1, -1)
        self.ends += 1
        return self.tail(y)


def net() -> Net:
    model = Net()
    model(torch.randn(8, 3, 7, 7))  # statistics of the batch norm that tell evaluation from training
    model.ends = 0
    model.block.eval()
    return model


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_collecting_keeps_what_a_module_is_given_in_evaluation_mode(storage: Storage, batch_size: int) -> None:
    model, images = net(), torch.randn(7, 3, 7, 7)
    modes = [module.training for module in model.modules()]
    with collect(model, images, "block", storage, batch_size=batch_size) as cache:
        assert model.ends == 0  # what comes after the module does not run
        with torch.no_grad():
            expected = copy.deepcopy(nn.Sequential(model.stem, model.norm)).eval()(images)
        # The same sums of 27 products of size 1, perhaps in another order for another batch: some ulp.
        torch.testing.assert_close(cache.read(torch.arange(7)), expected, rtol=1e-5, atol=1e-5)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_input_of_the_model_itself_can_be_collected(storage: Storage) -> None:
    images = torch.randn(3, 3, 7, 7)
    with collect(net(), images, "", storage) as cache:
        torch.testing.assert_close(cache.read(torch.arange(3)), images, rtol=0, atol=0)  # kept, not computed


def test_running_a_unit_on_what_was_collected_is_collecting_what_follows(storage: Storage) -> None:
    model, images = net(), torch.randn(7, 3, 7, 7)
    with (
        collect(model, images, "block", storage, batch_size=4) as inputs,
        run_unit(model.block, inputs, storage, batch_size=4) as outputs,
        collect(model, images, "tail", storage, batch_size=4) as expected,
    ):
        rows = torch.arange(7)
        # The same operators on the same values in the same batches.
        torch.testing.assert_close(outputs.read(rows), expected.read(rows), rtol=0, atol=0)
        assert inputs.read(rows).min() < 0  # the activation in place wrote into a copy


@pytest.mark.parametrize(
    ("error", "said", "path", "count"),
    [
        (MatchError, "module 'blok' is not in a Net", "blok", 2),
        (StateError, "module 'idle' did not run", "idle", 2),
        (DataError, "there is no image", "block", 0),
    ],
)
def test_what_cannot_be_collected_is_refused(
    error: type[QuantizationError], said: str, path: str, count: int, storage: Storage
) -> None:
    with pytest.raises(error, match=said):
        collect(net(), torch.randn(count, 3, 7, 7), path, storage)
    assert storage.used == 0


class Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, x


class Passes(nn.Module):
    def __init__(self, *extra: Tensor) -> None:
        super().__init__()
        self.pair, self.extra = Pair(), extra

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x.flatten(0, 1), *self.extra)[0]


def test_only_one_tensor_with_an_image_a_row_can_be_collected(storage: Storage) -> None:
    images = torch.randn(2, 3)
    with pytest.raises(ShapeError, match=r"module 'pair' is called with \(Tensor, Tensor\): allowed is one tensor"):
        collect(Passes(images), images, "pair", storage)
    with pytest.raises(ShapeError, match=r"module 'pair' takes a value of shape \(6,\) for 2 images"):
        collect(Passes(), images, "pair", storage)
    with filled(storage, images) as inputs, pytest.raises(ShapeError, match="a Pair returns a value of type tuple"):
        run_unit(Pair(), inputs, storage)
    assert storage.used == 0


def test_a_fault_in_the_middle_gives_the_budget_back(storage: Storage) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 2:
                raise ValueError("a fault of the model's own")
            return x

    with filled(storage, torch.randn(4, 3)) as inputs:
        with pytest.raises(ValueError, match="of the model's own") as caught:
            run_unit(Fails(), inputs, storage, batch_size=2)
        assert storage.used == inputs.nbytes  # although the traceback keeps the cache alive
        del caught


def test_a_batch_of_no_image_is_refused(storage: Storage) -> None:
    with pytest.raises(SpecError, match="batch_size=0"):
        collect(net(), torch.randn(2, 3, 7, 7), "block", storage, batch_size=0)


def test_a_budget_that_is_too_small_for_a_unit_is_refused_and_leaves_nothing(storage: Storage) -> None:
    with pytest.raises(RangeError, match="400 samples"):
        collect(net(), torch.randn(400, 3, 20, 20), "block", storage)
    assert storage.used == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_activations_of_a_gpu_come_back_to_it(storage: Storage) -> None:
    values = torch.randn(50, 7, device="cuda")
    with filled(storage, values) as cache:
        for rows in (torch.tensor([3, 49, 3]), torch.tensor([0, 7], device="cuda")):
            found = cache.read(rows)
            assert found.device == values.device
            torch.testing.assert_close(found, values[rows.to(values.device)], rtol=0, atol=0)  # kept, not computed
