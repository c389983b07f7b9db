"""Only cuda/ptx touches the machine: the kernels could not run on the emulator otherwise."""

import re

import pytest

import toolkit

SHIPPED = [path for folder in ("kernels", "tile") for path in sorted((toolkit.CUDA / folder).glob("*.cu*"))]
KERNELS = [*SHIPPED, *sorted((toolkit.CUDA / "tests").glob("*.cuh"))]
# Inline assembly, CUDA's built-in names, and all that compilers reserve: __syncthreads, __shfl_sync ...
BARE = re.compile(
    r"\basm\b|\bextern\b|\b(?:thread|block)Idx\b|\b(?:block|grid)Dim\b|\bwarpSize\b|\batomic[A-Z]\w*"
    r"|\b__(?!VA_ARGS__|CUDA_ARCH__)\w+"
)
STANDARD = {"type_traits", "limits", "utility"}


def code(text):
    """The text without comments and strings."""
    return re.sub(r'//[^\n]*|/\*.*?\*/|"[^"\n]*"', "", text, flags=re.DOTALL)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_go_through_the_instruction_layer(path):
    assert BARE.findall(code(path.read_text())) == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_kernels_include_nothing_of_cuda(path):
    includes = re.findall(r"#include ([<\"])([^>\"]+)", path.read_text())
    assert {name for kind, name in includes if kind == "<"} <= STANDARD
    ours = {name for kind, name in includes if kind == '"'}
    assert all(name == "ptx/ptx.cuh" or name.startswith(("tile/", "kernels/")) for name in ours), ours


@pytest.mark.parametrize(
    "line",
    [
        "__syncthreads();",
        "i = threadIdx.x;",
        'asm("nop;");',
        "atomicAdd(p, 1);",
        "__ldg(p);",
        "extern int s[];",
    ],
)
def test_bare_code_is_found(line):
    assert BARE.search(code(line))


def test_words_in_comments_and_strings_are_not():
    assert not BARE.search(code('int x = 1;  // __syncthreads\nauto name = "asm"; /* atomicAdd\n */'))
