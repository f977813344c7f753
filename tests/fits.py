"""What the tests of `pyperc.fit` train, and on what."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyperc
from pyperc.fit import fit

QUIET = functools.partial(fit, progress=False)


def some_data(dtype: torch.dtype = torch.float64, count: int = 50) -> tuple[Tensor, Tensor]:
    """Points of three classes."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (count,), generator=generator)
    return torch.randn(count, 5, generator=generator, dtype=dtype) + 2 * F.one_hot(y, 5), y


def network(dtype: torch.dtype = torch.float64, dropout: float = 0.0, out: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), nn.Tanh(), *([nn.Dropout(dropout)] if dropout else []), nn.Linear(8, out)]
    return pyperc.fuse(nn.Sequential(*layers)).to(dtype)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(model: nn.Module, other: nn.Module, rtol: float = 0.0) -> None:
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}")
