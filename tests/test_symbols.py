"""No function outside of an instruction set's own namespace uses its instructions, and its files share no symbol.

A weak symbol (an inline function, a template of std) in an object compiled for AVX-512 may be the copy that the linker
keeps for everyone, and an older processor then dies of it. Disassembly shows both, for whatever flags the build used.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyperc import _C

VECTOR_ISAS = [isa for isa in _C.isas_built() if isa != "scalar"]
LIBRARY = Path(_C.__file__)
BUILD = LIBRARY.parent.parent / "build"

# Registers of 256 and 512 bits, and opmasks.
WIDE_REGISTER = re.compile(r"%[yz]mm\d|%k[0-7]\b")
# VEX and EVEX encodings of narrow registers: v... mnemonics, and the three-operand integer ones of BMI1 and BMI2.
VEX_MNEMONIC = re.compile(
    r"v(?!er[rw]\b|m(?:call|launch|resume|x|read|write|clear|ptr|save|load|run|mcall|func))[a-z0-9]+$"
)
BMI_MNEMONIC = re.compile(r"(?:andn|bextr|blsi|blsmsk|blsr|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx)[lq]?$")
FUNCTION = re.compile(r"^[0-9a-f]+ <(?P<name>[^>]+)>:$")
INSTRUCTION = re.compile(r"^ +[0-9a-f]+:\t(?P<text>.+)$")
PREFIXES = {"lock", "rep", "repz", "repnz", "notrack", "bnd", "data16", "cs", "ds"}


def needs(*tools: str) -> None:
    for tool in tools:
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed (binutils, a compiler)")


def run(*command: str | Path) -> str:
    return subprocess.run(
        [str(c) for c in command], check=True, capture_output=True, text=True, errors="replace"
    ).stdout


def owner(symbol: str) -> str | None:
    """The instruction set in whose namespace pyperc::<isa> this mangled name lies, lambdas included."""
    found = re.match(r"_ZZ*N[KVrR]*6pyperc(\d+)([a-z]\w*)", symbol)
    if found is None:
        return None
    name = found[2][: int(found[1])]
    return name if name in VECTOR_ISAS else None


def vector_instructions(binary: Path) -> Iterator[tuple[str, str]]:
    """(function, instruction) for everything that baseline x86-64 does not have."""
    function = "?"
    for line in run("objdump", "-d", "--no-show-raw-insn", binary).splitlines():
        if header := FUNCTION.match(line):
            function = header["name"]
        elif instruction := INSTRUCTION.match(line):
            words = instruction["text"].split("#")[0].split()
            while words and words[0] in PREFIXES:
                words = words[1:]
            if not words:
                continue
            operands = " ".join(words[1:])
            if WIDE_REGISTER.search(operands) or VEX_MNEMONIC.match(words[0]) or BMI_MNEMONIC.match(words[0]):
                yield function, instruction["text"]


def strays(binary: Path) -> list[str]:
    return [f"{function}: {text}" for function, text in vector_instructions(binary) if owner(function) is None]


def symbols(binary: Path) -> list[tuple[str, str]]:
    """(type, mangled name) of each symbol that is defined."""
    rows = [line.split() for line in run("nm", "--defined-only", binary).splitlines()]
    return [(row[-2], row[-1]) for row in rows if len(row) >= 2]


def shared(binary: Path) -> list[str]:
    """Symbols that the linker may merge with those of other files."""
    return [f"{kind} {name}" for kind, name in symbols(binary) if kind in "WwVvu"]


def objects(isa: str) -> list[Path]:
    return sorted(BUILD.rglob(f"{isa}*.o"))


@pytest.fixture(autouse=True)
def x86() -> None:
    needs("objdump", "nm")
    if "x86-64" not in run("objdump", "-f", LIBRARY):
        pytest.skip("only x86-64 has these instruction sets")


def test_the_library_is_not_stripped() -> None:
    """Without local symbols the disassembly would belong to nobody, and the next test could not say whose it is."""
    owners = {owner(name) for _, name in symbols(LIBRARY)}
    assert owners >= set(VECTOR_ISAS)


def test_only_the_instruction_sets_own_functions_use_them() -> None:
    found = strays(LIBRARY)
    assert not found, "\n".join([f"{len(found)} vector instructions outside of pyperc::<isa>", *found[:20]])


@pytest.mark.parametrize("isa", VECTOR_ISAS)
def test_each_instruction_set_is_used(isa: str) -> None:
    register = {"avx2": "%ymm", "avx512": "%zmm", "avx512_bf16": "%zmm"}[isa]
    own = [text for function, text in vector_instructions(LIBRARY) if owner(function) == isa]
    assert sum(register in text for text in own) > 100
    assert any("vfmadd" in text for text in own)
    if isa == "avx2":
        assert not any("%zmm" in text for text in own)
    assert any("vdpbf16ps" in text for text in own) == (isa == "avx512_bf16")


def test_no_symbol_of_an_instruction_set_can_be_merged() -> None:
    mergeable = [symbol for symbol in shared(LIBRARY) if owner(symbol.split()[1])]
    assert not mergeable


@pytest.mark.parametrize("isa", VECTOR_ISAS)
def test_its_object_files_hold_no_weak_symbol(isa: str) -> None:
    if not objects(isa):
        pytest.skip(f"no object file of {isa} under build/")
    for path in objects(isa):
        assert not shared(path), f"{path.name}: {shared(path)}"


# The checks themselves


def compiled(folder: Path, source: str, *flags: str) -> Path:
    needs("g++")
    (folder / "probe.cpp").write_text(source)
    run("g++", "-O2", "-std=c++17", "-fPIC", *flags, "-c", folder / "probe.cpp", "-o", folder / "probe.o")
    return folder / "probe.o"


LOOP = "{ for (int i = 0; i < 1024; ++i) x[i] = x[i] * 2 + y[i]; }"


def test_the_check_finds_vectors_in_the_wrong_namespace(tmp_path: Path) -> None:
    source = f"namespace pyperc {{ void scale(float* x, const float* y) {LOOP} }}"
    assert strays(compiled(tmp_path, source, "-O3", "-mavx2"))
    assert any("%ymm" in stray for stray in strays(tmp_path / "probe.o"))
    assert not strays(compiled(tmp_path, source, "-O3"))


def test_the_check_finds_narrow_vex_and_bmi(tmp_path: Path) -> None:
    scalar = "namespace pyperc { float sum(float a, float b) { return a + b; } }"
    assert any("vaddss" in stray for stray in strays(compiled(tmp_path, scalar, "-mavx")))
    assert not strays(compiled(tmp_path, scalar))
    shift = "unsigned long shift(unsigned long a, unsigned long b) { return a << b; }"
    assert any("shlx" in stray for stray in strays(compiled(tmp_path, shift, "-mbmi2")))


def test_the_check_allows_the_namespaces_of_instruction_sets(tmp_path: Path) -> None:
    for isa in VECTOR_ISAS:
        source = f"namespace pyperc::{isa} {{ void scale(float* x, const float* y) {LOOP} }}"
        path = compiled(tmp_path, source, "-O3", "-mavx2")
        assert not strays(path)
        assert list(vector_instructions(path))


def test_the_check_finds_weak_symbols(tmp_path: Path) -> None:
    source = """
        #include <vector>
        namespace pyperc::avx2 { inline int twice(int x) { return x + x; } auto* keep = &twice; }
        void grow(std::vector<int>& v) { v.push_back(1); }
    """
    found = shared(compiled(tmp_path, source, "-mavx2", "-O0"))
    assert any("push_back" in symbol for symbol in found)
    assert any(owner(symbol.split()[1]) == "avx2" for symbol in found)


@pytest.mark.parametrize(
    ("symbol", "expected"),
    [
        ("_ZN6pyperc4avx24gemmEv", "avx2"),
        ("_ZN6pyperc4avx2L4gemmEv.constprop.0", "avx2"),
        ("_ZN6pyperc6avx51212_GLOBAL__N_14gemmEv.cold", "avx512"),
        ("_ZZN6pyperc6avx5124gemmEvENKUlvE_clEv", "avx512"),
        ("_ZN6pyperc11avx512_bf164gemmEv", "avx512_bf16"),
        ("_ZNK6pyperc4avx26Vector3sumEv", "avx2"),
        ("_ZN6pyperc4gemmIN4avx2EEEvv", None),
        ("_ZN6pyperc5avx224gemmEv", None),
        ("_ZN6pyperc4gemmEv", None),
        ("_ZNSt6vectorIN6pyperc4avx21VEE9push_backEv", None),
        ("main", None),
    ],
)
def test_owners_of_mangled_names(symbol: str, expected: str | None) -> None:
    assert owner(symbol) == expected
