"""The data sets: values, splits, and every way in which a file can be wrong."""

import builtins
import gzip
import hashlib
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import CODES, idx_bytes, write_mnist

from pyperc import datasets


@pytest.fixture
def folder(tmp_path):
    write_mnist(tmp_path)
    return tmp_path


def test_digits_are_1797_images_in_two_parts():
    data = datasets.digits()
    assert data.x_train.shape == (1437, 64)
    assert data.x_test.shape == (360, 64)
    assert (data.x_train.dtype, data.y_train.dtype, data.features, data.classes) == (torch.float32, torch.int64, 64, 10)
    assert data.x_train.min() == 0
    assert data.x_train.max() == 1


def test_digits_split_is_stratified():
    data = datasets.digits()
    train, test = torch.bincount(data.y_train, minlength=10), torch.bincount(data.y_test, minlength=10)
    assert ((train + test) * 0.2 - test).abs().max() < 1


def test_digits_split_depends_on_the_seed_alone():
    first, again, other = datasets.digits(seed=3), datasets.digits(seed=3), datasets.digits(seed=4)
    assert torch.equal(first.x_train, again.x_train)
    assert torch.equal(first.y_test, again.y_test)
    assert not torch.equal(first.x_train, other.x_train)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, float("nan")])
def test_digits_refuses_a_fraction_outside_0_and_1(fraction):
    with pytest.raises(ValueError, match=r"test_fraction must be between 0 and 1, got "):
        datasets.digits(test_fraction=fraction)


def test_digits_without_scikit_learn_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"scikit-learn.*pyperc\[demo\]"):
        datasets.digits()


def test_samples_change_their_dtype_and_labels_do_not():
    data = datasets.digits().to(torch.float64)
    assert {data.x_train.dtype, data.x_test.dtype} == {torch.float64}
    assert {data.y_train.dtype, data.y_test.dtype} == {torch.int64}


def test_standardised_pixels_have_the_moments_of_the_training_part():
    data = datasets.digits()
    mean, std = data.moments
    standardised = data.standardised()
    torch.testing.assert_close(standardised.x_train * std + mean, data.x_train, rtol=0, atol=1e-6)
    torch.testing.assert_close(standardised.x_test * std + mean, data.x_test, rtol=0, atol=1e-6)
    assert standardised.moments == pytest.approx((0, 1), abs=1e-6)


def test_constant_pixels_are_not_divided_by_zero():
    data = datasets.Dataset(torch.ones(3, 2), torch.zeros(3).long(), torch.ones(1, 2), torch.zeros(1).long(), 1)
    assert data.moments == (1.0, 1.0)
    assert torch.equal(data.standardised().x_train, torch.zeros(3, 2))


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzipped"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 3, 4, 1)], ids=str)
@pytest.mark.parametrize("dtype", CODES)
def test_idx_files_come_back_by_value(tmp_path, dtype, shape, pack):
    array = (np.random.default_rng(0).standard_normal(shape) * 50).astype(dtype)
    path = tmp_path / "file"
    path.write_bytes(pack(idx_bytes(np.asarray(array))))
    read = datasets.read_idx(path)
    assert str(read.dtype) == f"torch.{dtype}"
    assert read.shape == shape
    assert np.array_equal(read.numpy(), array)


WHOLE = idx_bytes(np.arange(6, dtype=np.int16).reshape(2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", r"must begin with two zero bytes, a type and a rank, got b''", id="empty"),
        pytest.param(b"\0\0\x08", r"must begin with two zero bytes", id="three bytes"),
        pytest.param(b"\x89PNG\r\n\x1a\n", r"must begin with two zero bytes.*PNG", id="a picture"),
        pytest.param(b"\0\0\x07\x01", r"type of an IDX file must be one of 0x08.*got 0x07", id="unknown type"),
        pytest.param(WHOLE[:9], r"expected 12 bytes of header for 2 dimensions, got 9", id="truncated header"),
        pytest.param(WHOLE[:-1], r"expected 24 bytes for the shape \[2, 3\], got 23: truncated", id="truncated"),
        pytest.param(WHOLE + b"\0", r"expected 24 bytes .* got 25: with trailing bytes", id="trailing bytes"),
        pytest.param(
            b"\0\0\x08\x02" + b"\xff" * 8, r"expected 18446744065119617037 bytes .* truncated", id="vast sizes"
        ),
        pytest.param(gzip.compress(WHOLE)[:-9], r"expected a whole gzip file, got a damaged one", id="truncated gzip"),
        pytest.param(b"\x1f\x8b" + WHOLE, r"expected a whole gzip file, got a damaged one", id="no gzip"),
        pytest.param(
            gzip.compress(WHOLE, mtime=0)[:10] + b"\xff" * 20, r"expected a whole gzip file", id="damaged gzip stream"
        ),
    ],
)
def test_a_damaged_idx_file_is_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)^{re.escape(str(path))}: .*{message}"):
        datasets.read_idx(path)


def test_mnist_reads_plain_and_gzipped_files(folder):
    data = datasets.mnist(folder)
    assert (data.x_train.shape, data.x_test.shape, data.features, data.classes) == ((200, 12), (50, 12), 12, 10)
    assert data.x_train.dtype == torch.float32
    assert data.x_train.max() == 1
    assert torch.equal(data.x_train.argmax(1), data.y_train)
    assert torch.equal(data.x_test.argmax(1), data.y_test)


def test_mnist_names_every_missing_file(folder):
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    (folder / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError) as error:
        datasets.mnist(folder)
    for part in (str(folder), "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", ".gz"):
        assert part in str(error.value)
    assert "train-images-idx3-ubyte" not in str(error.value)


def array_of(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (
            "t10k-images-idx3-ubyte",
            array_of(50),
            r"unsigned bytes of shape \[n, rows, columns\] \(magic 2051\), got uint8",
        ),
        (
            "t10k-images-idx3-ubyte",
            array_of(50, 4, 3, dtype=np.int32),
            r"\(magic 2051\), got int32 of shape \[50, 4, 3\]",
        ),
        (
            "t10k-labels-idx1-ubyte",
            array_of(50, 1, 1),
            r"unsigned bytes of shape \[n\] \(magic 2049\), got uint8 of shape",
        ),
        ("t10k-labels-idx1-ubyte", array_of(49), r"expected 50 labels, one for each image of t10k-images.*, got 49"),
        ("t10k-labels-idx1-ubyte", array_of(50) + np.uint8(10), r"labels must be 0 to 9, got 10"),
        ("t10k-labels-idx1-ubyte", array_of(0), r"expected at least one element, got the shape \[0\]"),
        ("t10k-images-idx3-ubyte", array_of(50, 4, 4), r"images must have 12 pixels as in train-images.*, got 16"),
    ],
    ids=["images of rank 1", "int32", "labels of rank 3", "labels too few", "label 10", "no labels", "other pixels"],
)
def test_mnist_refuses_files_that_do_not_fit(folder, name, array, message):
    (folder / name).write_bytes(idx_bytes(array))
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        datasets.mnist(folder)


def test_load_takes_the_names_of_the_command_line(folder):
    assert datasets.load("digits").features == 64
    assert datasets.load(f"mnist:{folder}").features == 12


@pytest.mark.parametrize("spec", ["", "mnist", "mnist:", "digits:here", "cifar"])
def test_load_refuses_other_names(spec):
    with pytest.raises(ValueError, match=f"the data must be digits or mnist:DIR, got {spec!r}"):
        datasets.load(spec)


SHA256 = {
    "x_train": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "y_train": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "x_test": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "y_test": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def test_the_real_mnist_is_read_to_the_byte():
    here = Path(__file__).parent.parent
    folder = Path(os.environ.get("PYPERC_MNIST", here.parent / "shared" / "data" / "mnist"))
    if not folder.is_dir():
        pytest.skip(f"no MNIST in {folder}; PYPERC_MNIST names another folder")
    data = datasets.mnist(folder)
    for name, expected in SHA256.items():
        tensor = getattr(data, name)
        array = (tensor * 255).round().to(torch.uint8) if name.startswith("x") else tensor.to(torch.uint8)
        shape = (len(array), 28, 28) if name.startswith("x") else (len(array),)
        assert hashlib.sha256(idx_bytes(array.numpy().reshape(shape))).hexdigest() == expected
