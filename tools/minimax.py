"""Derives the polynomials of csrc/cpu/math.inl: `python tools/minimax.py [name ...]` (needs mpmath; a minute for all).

For each function f and weight w, the coefficients c minimise max |w(x) (f(x) - sum_j c_j x^j)| over [a, b], where w
turns the error of the polynomial into the relative error of the function that it serves. Lawson's iteration finds them:
a weighted least-squares fit whose weights are multiplied, again and again, by the error that they left (Lawson 1961;
Rice and Usow, Math. Comp. 22, 1968). The lowest coefficient is then rounded to the working precision, the others are
fitted anew around it, and so on upwards, so that each absorbs the rounding of those below it.
"""

import struct
import sys
from collections.abc import Callable
from typing import NamedTuple

from mpmath import cos, erfc, expm1, log, log1p, lu_solve, matrix, mp, mpf, pi, sqrt, tanh

mp.dps = 70
POINTS = 160
SWEEPS = 10
LN2 = log(2)


class Polynomial(NamedTuple):
    name: str
    f: Callable[[mpf], mpf]
    weight: Callable[[mpf], mpf]
    a: mpf
    b: mpf
    floats: int  # number of coefficients for float
    doubles: int  # number of coefficients for double


def tail(a: mpf) -> mpf:
    """Phi(-a) of the normal law."""
    return erfc(a / sqrt(mpf(2))) / 2


def exponent(a: mpf) -> mpf:
    return (log(tail(a), 2) + 1) / a


def far(power: str) -> Callable[[mpf], mpf]:
    """How much a relative error of Phi(-a) counts: less, the smaller Phi(-a) is."""
    return lambda a: (2 * tail(a)) ** mpf(power)


POLYNOMIALS = [
    # e^r = 1 + r + r^2 c(r), to the relative error of e^r - 1; |r| <= (ln 2) / 2, and a little for rounding.
    Polynomial(
        "exp", lambda r: (expm1(r) - r) / r**2, lambda r: r**2 / abs(expm1(r)), -0.5005 * LN2, 0.5005 * LN2, 6, 10
    ),
    # tanh(x) = x (1 + u c(u)) with u = x^2; x <= 9/16.
    Polynomial(
        "tanh",
        lambda u: (tanh(sqrt(u)) / sqrt(u) - 1) / u,
        lambda u: u * sqrt(u) / tanh(sqrt(u)),
        mpf(2) ** -30,
        mpf(81) / 256,
        5,
        10,
    ),
    # log(1 + f) = f - f^2 / 2 + f^3 c(f); |f| <= 1/3, and a little for rounding.
    Polynomial(
        "log1p",
        lambda f: (log1p(f) - f + f**2 / 2) / f**3,
        lambda f: abs(f**3 / log1p(f)),
        -mpf(1) / 3 - mpf(2) ** -20,
        mpf(1) / 3 + mpf(2) ** -20,
        8,
        18,
    ),
    # 2^r = 1 + r c(r); |r| <= 1/2, and a little for rounding.
    Polynomial("exp2", lambda r: (2**r - 1) / r, lambda r: abs(r) / 2**r, mpf(-0.5005), mpf(0.50051), 5, 11),
    # Phi(-a) = 2^(-1 + a c(a)); the weight is d Phi / dc, relative to Phi, and less in the tail.
    Polynomial("exponent", exponent, lambda a: LN2 * a * far("0.7")(a), mpf(2) ** -30, mpf(13.3), 8, 0),
    Polynomial("exponent", exponent, lambda a: LN2 * a * far("0.9")(a), mpf(2) ** -30, mpf(38), 0, 25),
]


def fit(values: list[mpf], weights: list[mpf], rows: list[list[mpf]]) -> list[mpf]:
    """The coefficients c with the least max_i |weights_i (values_i - rows_i . c)|."""
    basis = matrix([[w * v for v in row] for w, row in zip(weights, rows, strict=True)])
    target = matrix([w * v for w, v in zip(weights, values, strict=True)])
    lawson = [mpf(1)] * len(values)
    best: list[mpf] = []
    least = mpf("inf")
    for _ in range(SWEEPS):
        transposed = matrix([[k * v for k, v in zip(lawson, column, strict=True)] for column in basis.T.tolist()])
        c = lu_solve(transposed * basis, transposed * target)
        errors = [abs(e) for e in target - basis * c]
        if max(errors) < least:
            best, least = list(c), max(errors)
        mean = sum(k * e for k, e in zip(lawson, errors, strict=True)) / len(lawson)
        lawson = [k * e / mean for k, e in zip(lawson, errors, strict=True)]
    return best


def to_float(x: mpf) -> float:
    return float(struct.unpack("f", struct.pack("f", float(x)))[0])


def rounded(p: Polynomial, count: int, to_working: Callable[[mpf], float]) -> tuple[list[float], mpf]:
    """The coefficients in the working precision and the largest weighted error that they leave."""
    middle, half = (p.a + p.b) / 2, (p.b - p.a) / 2
    xs = [middle - half * cos(pi * (i + mpf(1) / 2) / POINTS) for i in range(POINTS)]
    weights = [p.weight(x) for x in xs]
    left = [p.f(x) for x in xs]
    coefficients: list[float] = []
    for lowest in range(count):
        c = fit(left, weights, [[x**j for j in range(lowest, count)] for x in xs])
        coefficients.append(to_working(c[0]))
        left = [v - mpf(coefficients[-1]) * x**lowest for v, x in zip(left, xs, strict=True)]
    return coefficients, max(abs(w * v) for w, v in zip(weights, left, strict=True))


def main(names: list[str]) -> None:
    for p in POLYNOMIALS:
        for kind, digits, count, to_working in (("float", 9, p.floats, to_float), ("double", 17, p.doubles, float)):
            if count and (not names or p.name in names):
                coefficients, error = rounded(p, count, to_working)
                print(f"{p.name}, {kind}: error 2^{float(log(error, 2)):.1f}")
                print("    " + ", ".join(f"{c:.{digits}g}" for c in coefficients), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
