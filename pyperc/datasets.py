"""Labelled images to train on: scikit-learn's embedded digits, and MNIST from its IDX files."""

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Dataset", "digits", "load", "mnist", "read_idx"]


class Dataset(NamedTuple):
    """Samples to train and to test on, with their labels."""

    x_train: Tensor
    """float32 [n, features], each pixel in [0, 1]"""
    y_train: Tensor
    """int64 [n], each label in 0 ... classes - 1"""
    x_test: Tensor
    """float32 [m, features], as x_train"""
    y_test: Tensor
    """int64 [m], as y_train"""
    classes: int
    """how many there are"""

    @property
    def features(self) -> int:
        """The width of a sample."""
        return self.x_train.shape[1]

    def to(self, dtype: torch.dtype) -> "Dataset":
        """The same data with the samples in another dtype; the labels stay int64."""
        return self._replace(x_train=self.x_train.to(dtype), x_test=self.x_test.to(dtype))

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of all training pixels together; 1 for the deviation where they are constant."""
        std, mean = torch.std_mean(self.x_train.double(), correction=0)
        return float(mean), float(std) or 1.0

    def standardised(self) -> "Dataset":
        """(x - mean) / std with the `moments` of the training pixels, for both parts: training takes fewer epochs.

        Example:
            >>> data = digits().standardised()
            >>> mean, std = data.moments
            >>> abs(mean) < 1e-6, round(std, 6)
            (True, 1.0)
        """
        mean, std = self.moments
        return self._replace(x_train=(self.x_train - mean) / std, x_test=(self.x_test - mean) / std)


def digits(seed: int = 0, test_fraction: float = 0.2) -> Dataset:
    """Scikit-learn's embedded handwritten digits: 1797 images of 8 x 8 pixels, ten classes.

    The pixels, 0 to 16 in the source, are divided by 16. The split is stratified, so that every class has the same
    share of both parts, and it is the same for the same `seed`.

    Args:
        seed: of the shuffle before the split, in [0, 2**32).
        test_fraction: the part that is kept for testing, in (0, 1).

    Raises:
        ImportError: scikit-learn, which holds them, is not installed.
        ValueError: `test_fraction` is not between 0 and 1, or leaves one part with fewer samples than classes.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.

    Example:
        >>> data = digits()
        >>> data.x_train.shape, data.x_test.shape, data.classes
        (torch.Size([1437, 64]), torch.Size([360, 64]), 10)
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"digits: test_fraction must be between 0 and 1, got {test_fraction}")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("digits needs scikit-learn: pip install scikit-learn, or the extra pyperc[demo]") from error
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=test_fraction, random_state=seed, stratify=y)
    x_train, x_test, y_train, y_test = (torch.from_numpy(part) for part in parts)
    return Dataset(x_train.float(), y_train.long(), x_test.float(), y_test.long(), 10)


IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path) -> Tensor:
    """Reads one IDX file, plain or gzipped (recognised by its content, not by its name).

    An IDX file is two zero bytes, a byte for the type of the elements, a byte for the number of dimensions, the sizes
    as big-endian 32-bit integers, and then the elements, big-endian, the last index fastest.

    Returns:
        A tensor of that shape: uint8, int8, int16, int32, float32 or float64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the content is no IDX file: its magic number, its type, or its length is wrong.

    Source: Y. LeCun, C. Cortes and C. Burges, The MNIST database of handwritten digits, "File formats".

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "labels"
        >>> _ = path.write_bytes(bytes([0, 0, 0x08, 1, 0, 0, 0, 3, 7, 2, 1]))
        >>> read_idx(path)
        tensor([7, 2, 1], dtype=torch.uint8)
    """
    content = Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file, got a damaged one ({error})") from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(f"{path}: an IDX file must begin with two zero bytes, a type and a rank, got {content[:4]!r}")
    if content[2] not in IDX_TYPES:
        known = ", ".join(f"0x{code:02x}" for code in IDX_TYPES)
        raise ValueError(f"{path}: the type of an IDX file must be one of {known}, got 0x{content[2]:02x}")
    dtype = np.dtype(IDX_TYPES[content[2]])
    begin = 4 + 4 * content[3]
    if len(content) < begin:
        raise ValueError(
            f"{path}: expected {begin} bytes of header for {content[3]} dimensions, got {len(content)} bytes"
        )
    shape = [int(size) for size in np.frombuffer(content, ">u4", content[3], 4)]
    expected = begin + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        what = "truncated" if len(content) < expected else "with trailing bytes"
        raise ValueError(f"{path}: expected {expected} bytes for the shape {shape}, got {len(content)}: {what}")
    elements = np.frombuffer(content, dtype, offset=begin).astype(dtype.newbyteorder("="))
    return torch.from_numpy(elements).reshape(shape)


MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def mnist(directory: str | Path) -> Dataset:
    """Reads MNIST, or any data set in its format such as Fashion-MNIST, from its four IDX files, plain or gzipped.

    The pixels, 0 to 255 in the files, are divided by 255; an image becomes one row of features.

    Args:
        directory: holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte` and
            `t10k-labels-idx1-ubyte`, each as it is or with `.gz` at its end.

    Raises:
        FileNotFoundError: a file is missing; the message names all that are.
        ValueError: a file is damaged or truncated, holds something else, or does not fit the others.

    Source: Y. LeCun, C. Cortes and C. Burges, The MNIST database of handwritten digits, 1998.

    Example:
        >>> mnist("/nowhere")
        Traceback (most recent call last):
        FileNotFoundError: mnist: looked in /nowhere for train-images-idx3-ubyte, ...
    """
    folder = Path(directory).expanduser()
    found = {name: next(filter(Path.is_file, (folder / name, folder / f"{name}.gz")), None) for name in MNIST_FILES}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise FileNotFoundError(f"mnist: looked in {folder} for {', '.join(missing)}, plain or .gz, and found none")
    x_train, y_train, x_test, y_test = (path for path in found.values() if path is not None)
    train, test = _labelled_images(x_train, y_train), _labelled_images(x_test, y_test)
    if train[0].shape[1] != test[0].shape[1]:
        raise ValueError(
            f"{x_test}: images must have {train[0].shape[1]} pixels as in {x_train.name}, got {test[0].shape[1]}"
        )
    return Dataset(*train, *test, classes=10)


def _labelled_images(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    """Pixels [n, rows * columns] in [0, 1] and labels [n] in 0 ... 9 of two IDX files."""
    x, y = read_idx(images), read_idx(labels)
    for path, tensor, rank, shape in ((images, x, 3, "[n, rows, columns]"), (labels, y, 1, "[n]")):
        if tensor.dtype != torch.uint8 or tensor.ndim != rank:
            raise ValueError(
                f"{path}: expected unsigned bytes of shape {shape} (magic {0x0800 + rank}), "
                f"got {str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
            )
        if tensor.numel() == 0:
            raise ValueError(f"{path}: expected at least one element, got the shape {list(tensor.shape)}")
    if len(x) != len(y):
        raise ValueError(f"{labels}: expected {len(x)} labels, one for each image of {images.name}, got {len(y)}")
    if y.max() > 9:
        raise ValueError(f"{labels}: labels must be 0 to 9, got {int(y.max())}")
    return x.flatten(1).float().div_(255), y.long()


def load(spec: str) -> Dataset:
    """The data set that a command line names: `digits`, or `mnist:DIR` for the IDX files in the folder DIR.

    Raises:
        ValueError: the name is neither, or what lies in the folder is damaged.
        FileNotFoundError: the folder lacks a file.
        ImportError: scikit-learn, which holds the digits, is not installed.

    Example:
        >>> load("digits").features
        64
    """
    name, _, directory = spec.partition(":")
    if spec == "digits":
        return digits()
    if name == "mnist" and directory:
        return mnist(directory)
    raise ValueError(f"the data must be digits or mnist:DIR, got {spec!r}")
