"""The script that trains by the published recipe: its schedule, its crops, and that an interruption leaves no trace."""

import argparse
import csv
import json
import math

import pytest
import torch

adder_train = pytest.importorskip(
    "accuracy.adder_train", reason="the training script is not beside this copy of the tests"
)


def images(count, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return pixels, torch.randint(0, 10, (count,), generator=generator)


def options(folder, *words):
    return adder_train.parse(["--data", "nowhere", "--out", str(folder), "--epochs", "3", *words])


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(adder_train, "BATCH", 6)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(folder, until=None, words=()):
    run = adder_train.Run(options(folder, *words), adder_train.Place())
    run.load()
    run.train(images(14), images(4, seed=1), until=until)
    return run


@pytest.mark.parametrize("words", [(), ("--anneal", "2"), ("--twin",)])
def test_an_interrupted_run_ends_bit_for_bit_where_one_that_was_not_ends(tmp_path, words):
    whole = trained(tmp_path / "whole", words=words)
    trained(tmp_path / "parts", until=1, words=words)
    torch.rand(5)  # what happens in between must not matter
    parts = trained(tmp_path / "parts", words=words)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], tensor), name
    losses = [[row["train_loss"] for row in run.history] for run in (whole, parts)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_the_log_has_one_line_for_each_epoch_after_a_resumption(tmp_path):
    trained(tmp_path, until=2)
    trained(tmp_path)
    with open(tmp_path / "log.csv", encoding="utf-8") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]


def test_the_published_learning_rates_leave_out_both_ends_of_the_cosine(tmp_path):
    run = adder_train.Run(adder_train.parse(["--data", "nowhere", "--out", str(tmp_path)]), adder_train.Place())
    run.optimizer.step()  # torch warns of a schedule that moves before any step
    rates = []
    for _ in range(adder_train.EPOCHS):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.schedule.step()
    expected = [0.05 * (1 + math.cos(math.pi * epoch / 400)) for epoch in range(1, 400)]
    # A product of two factors in another order: 2 units in the last place of 0.1.
    torch.testing.assert_close(rates, expected, rtol=0, atol=3e-17)


def test_a_run_with_another_recipe_is_refused(tmp_path):
    trained(tmp_path, until=1)
    other = adder_train.Run(options(tmp_path, "--seed", "1"), adder_train.Place())
    with pytest.raises(SystemExit, match="'seed': 1"):
        other.load()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(tmp_path):
    run = trained(tmp_path, until=1)
    with torch.no_grad():
        run.model.fc.weight.fill_(math.nan)
    with pytest.raises(SystemExit, match="the loss of epoch 2 is nan"):
        run.train(images(14), images(4, seed=1))
    assert len(trained(tmp_path).history) == 3


def test_half_precision_needs_cuda(tmp_path):
    with pytest.raises(SystemExit, match="--amp is for CUDA"):
        adder_train.Run(options(tmp_path, "--amp"), adder_train.Place())


def test_a_crop_in_the_middle_leaves_the_image_alone():
    pixels, _ = images(5, side=7)
    randoms = torch.full((2, 5), adder_train.PADDING), torch.zeros(5, dtype=torch.bool)
    assert torch.equal(adder_train.augment(pixels, randoms), pixels)
    mirrored = randoms[0], torch.tensor([True, False, True, True, False])
    expected = torch.where(mirrored[1][:, None, None, None], pixels.flip(3), pixels)
    assert torch.equal(adder_train.augment(pixels, mirrored), expected)


def test_a_crop_moves_every_image_by_its_own_offset():
    pixels, _ = images(40, side=9)
    generator = torch.Generator().manual_seed(2)
    offsets = torch.randint(0, 2 * adder_train.PADDING + 1, (2, 40), generator=generator)
    mirrored = torch.rand(40, generator=generator) < 0.5
    cropped = adder_train.augment(pixels, (offsets, mirrored))
    for image, (top, left), flip, found in zip(pixels, offsets.T.tolist(), mirrored.tolist(), cropped, strict=True):
        edge = adder_train.PADDING
        padded = torch.zeros(3, 9 + 2 * edge, 9 + 2 * edge, dtype=torch.uint8)
        padded[:, edge : edge + 9, edge : edge + 9] = image
        expected = padded[:, top : top + 9, left : left + 9]
        assert torch.equal(found, expected.flip(2) if flip else expected)


def test_the_report_writes_weights_and_a_row(tmp_path):
    run = trained(tmp_path)
    run.report(images(8, seed=2))
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert row["network"] == "cifar10-adder-resnet20"
    assert row["samples"] == 8
    assert row["settings"]["epoch"] == 3
    assert "--epochs 3" in row["command"]
    from q_adder.models import load_published_resnet20

    loaded = load_published_resnet20(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in run.model.state_dict().items())


def test_all_training_images_are_asked_for_and_none_of_the_test_images(tmp_path, monkeypatch):
    """The held-out part comes from the training images, and is the same whatever the seed."""
    numpy = pytest.importorskip("numpy")
    asked = []

    def load(folder, name):
        asked.append(name)
        start = 1000 * len(asked)
        values = numpy.arange(start, start + 4, dtype=numpy.int64)
        return numpy.zeros((4, 8, 8, 3), numpy.uint8), values

    monkeypatch.setitem(__import__("sys").modules, "images", argparse.Namespace(load=load))
    found = [adder_train.read(options(tmp_path, "--validation", "6", "--seed", str(seed))) for seed in (0, 1)]
    assert asked[:6] == [f"cifar10-train-{part}" for part in range(1, 6)] + ["cifar10-test"]
    (_, train), (_, held_out), (_, test) = found[0]
    assert len(train) == 14
    assert len(held_out) == 6
    assert sorted([*train.tolist(), *held_out.tolist()]) == [1000 * part + i for part in range(1, 6) for i in range(4)]
    assert test.tolist() == [6000 + i for i in range(4)]
    assert torch.equal(found[1][1][1] - 6000, held_out)
