"""The products of squares on one thread, and with AVX2 in place of AVX-512, each against that probe."""

from collections.abc import Sequence

from pyperc import _C
from pyperc.bench.cases import Job, Record, Settings
from pyperc.bench.tables import gemm
from pyperc.bench.text import Table

NAME = "narrow"


def jobs(settings: Settings) -> list[Job]:
    sides = (48,) if settings.smoke else (256, 512, 1024, 2048) if settings.full else (256, 1024)
    found = [gemm.product(NAME, n, n, n, layout, threads=1) for n in sides for layout in gemm.LAYOUTS]
    if "avx2" in _C.isas() and _C.isa() != "avx2":
        found += [gemm.product(NAME, n, n, n, layout, isa="avx2") for n in sides for layout in gemm.LAYOUTS]
    return found


def tables(records: Sequence[Record]) -> list[Table]:
    found = []
    for threads, isa in dict.fromkeys((record["threads"], record["isa"]) for record in records):
        those = [record for record in records if (record["threads"], record["isa"]) == (threads, isa)]
        title = f"Products of squares with {isa} on {threads} thread{'s' * (threads > 1)}: share of that peak"
        found.append(gemm.table(f"{title}, and ratio to torch.mm as it comes", those))
    return found
