"""Writes IDX files, and small data sets in MNIST's format, for the tests."""

import gzip
import struct
from pathlib import Path

import numpy as np

CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}


def idx_bytes(array: np.ndarray) -> bytes:
    """The content of an IDX file that holds the array."""
    header = bytes([0, 0, CODES[array.dtype.name], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist(folder: Path, train: int = 200, test: int = 50, rows: int = 4, columns: int = 3) -> None:
    """Random images whose class is told by their brightest pixel; the training files are gzipped, the others plain."""
    generator = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        images = generator.integers(0, 100, (count, rows * columns), dtype=np.uint8)
        images[np.arange(count), labels] = 255
        pack, suffix = (gzip.compress, ".gz") if prefix == "train" else (bytes, "")
        pixels = idx_bytes(images.reshape(count, rows, columns))
        (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(pixels))
        (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(labels)))
