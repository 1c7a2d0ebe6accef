"""No code of an instruction set can stand in for another's: what the linker may merge lies apart.

An inline function or template that is compiled for AVX-512 and not in that set's own namespace is a
weak symbol; the linker keeps any one copy, and machines without AVX-512 would crash in it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fusedrnn
from fusedrnn import _C

ROOT = Path(fusedrnn.__file__).resolve().parents[1]
# Of the sources, those that need another machine too; without sources, of this one.
ISAS = {path.stem.removeprefix("kernels_") for path in ROOT.glob("csrc/cpu/kernels_*.cpp")}
ISAS = ISAS or set(fusedrnn.cpu_isas())
NM = shutil.which("nm")
pytestmark = pytest.mark.skipif(NM is None, reason="nm is not installed (binutils)")

# `address type name`; V, v, W, w, u are weak or unique: one copy is kept of many.
WEAK = re.compile(r"^\s*[0-9a-f]*\s+([VvWwu])\s+(.*)$")


def symbols(path: Path) -> str:
    command = [NM, "-C", "--defined-only", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def weak_outside(listing: str, isa: str) -> list[str]:
    """Weak symbols that are not of namespace fusedrnn::<isa>."""
    found = [match[2] for match in map(WEAK.match, listing.splitlines()) if match]
    # A template's name may begin with its return type: the namespace of what it is counts.
    own = re.compile(
        rf"(^|[\s*&])(fusedrnn::{isa}::|(guard variable|vtable|typeinfo).*fusedrnn::{isa}::)"
    )
    return [name for name in found if not own.search(name.split("(")[0])]


def kernel_objects() -> list[Path]:
    """The extension's object files, if this checkout has been built in place."""
    return sorted((ROOT / "build").glob("temp.*/**/kernels_*.o"))


@pytest.mark.parametrize("isa", sorted(ISAS - {"baseline"}))
def test_kernel_objects_keep_to_their_namespace(isa: str) -> None:
    objects = [path for path in kernel_objects() if path.stem == f"kernels_{isa}"]
    if not objects:
        pytest.skip("no object files: fusedrnn was not built in place")
    for path in objects:
        listing = symbols(path)
        assert f"fusedrnn::{isa}::" in listing, "not the kernels at all"
        assert weak_outside(listing, isa) == []


def test_every_instruction_set_is_in_the_library() -> None:
    listing = symbols(Path(_C.__file__))
    if len(listing.splitlines()) < 10:
        pytest.skip("the extension was stripped")
    for isa in fusedrnn.cpu_isas():
        assert f"fusedrnn::{isa}::" in listing


def test_the_library_shares_no_kernel_code() -> None:
    """In the library, where hidden symbols are local ones, all kernels lie in their sets."""
    kernels = re.compile(
        r"\b(lstm|gru)_(state|output|gates|backward)|\w+Chunk\b|ChunkGradients|StateGradients|"
        r"ForwardProducts|reduced_exp|sigmoid|multiply|transpose|pack_by|dot_rows|across_panel|"
        r"sum_weight_rows|write_row|\bmap<"
    )
    listing = symbols(Path(_C.__file__)).splitlines()
    if len(listing) < 10:
        pytest.skip("the extension was stripped")
    found = set()
    for line in listing:
        name = line.split(maxsplit=2)[-1]
        if "fusedrnn::" not in name or not kernels.search(name.split("(")[0]):
            continue
        if "at::Tensor" in name:  # the CUDA half's driver
            continue
        isa = re.search(rf"fusedrnn::({'|'.join(ISAS)})::", name)
        assert isa is not None, name
        found.add(isa[1])
    assert found.issuperset(fusedrnn.cpu_isas())


# At the start of a line: not nested, not a specialisation, not a declaration.
TYPE = re.compile(
    r"^(?:struct|class|enum class) (?:alignas\(\w+\) )?(\w+)(?: final)?(?: :[^;{]*)? \{", re.M
)


def types_defined_twice(sources: dict[str, str]) -> dict[str, list[str]]:
    """Types of the same name in several headers, by where they stand."""
    found: dict[str, list[str]] = {}
    for name, text in sources.items():
        for match in TYPE.finditer(text):
            found.setdefault(match[1], []).append(name)
    return {name: where for name, where in found.items() if len(where) > 1}


def test_no_two_headers_define_a_type_of_the_same_name() -> None:
    """The linker would keep one of their inline functions, for both: CPU and CUDA half are linked
    into one library."""
    paths = [path for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".cuh")]
    if not paths:
        pytest.skip("installed without its sources")
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    assert types_defined_twice(sources) == {}


def test_the_checks_can_fail() -> None:
    a = "struct Rows {\n};\nclass Walk : public Base {\n};\nstruct Later;\n"
    b = "template <class T>\nstruct Rows {\n};\nclass Walk final {\n};\nstruct Later {\n};\n"
    assert types_defined_twice({"a": a, "b": b}) == {"Rows": ["a", "b"], "Walk": ["a", "b"]}
    listing = "\n".join(
        [
            "0000000000000000 W fusedrnn::share(long, int, int)",
            "0000000000000000 W void fusedrnn::avx2::map<float>(float const*, float*, long)",
            "0000000000000000 W std::vector<long>::push_back(long const&)",
            "0000000000000000 t fusedrnn::anything(int)",
        ]
    )
    assert weak_outside(listing, "avx2") == [
        "fusedrnn::share(long, int, int)",
        "std::vector<long>::push_back(long const&)",
    ]


def test_no_flag_that_changes_the_process() -> None:
    """Linking with -ffast-math turns on flush-to-zero in whatever process loads the library."""
    setup = ROOT / "setup.py"
    if not setup.exists():
        pytest.skip("installed without its sources")
    code = "\n".join(line.split("#")[0] for line in setup.read_text().splitlines())
    for flag in ("-ffast-math", "-Ofast", "-march=native"):
        assert flag not in code
    assert "set_fast_math" not in symbols(Path(_C.__file__))
