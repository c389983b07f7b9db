"""What the kernels compile to: the instructions that are meant, and none of those that betray a mistake."""

import re

import pytest

import images

NEVER = {
    r"LDL|STL": "local memory",
    r"LD\.|LD$|ST\.|ST$": "an access whose kind of memory the compiler does not know",
    r"D(FMA|ADD|MUL)": "double precision",
}


@pytest.fixture(scope="module", params=images.CODES)
def kernels(request, cuda_images):
    return images.kernels(request.param)


def complaints(kernels, pattern):
    return [
        f"{kernel.name}: {instruction}"
        for kernel in kernels
        for instruction in kernel.function.code
        if re.match(pattern, instruction.opcode)
    ]


def test_every_family_is_compiled(kernels):
    meant = {family for family in images.families() if not re.match("sm(90|100|120)_", family)}
    assert {kernel.family for kernel in kernels} >= meant


@pytest.mark.parametrize("pattern", NEVER, ids=NEVER.get)
def test_never(kernels, pattern):
    assert complaints(kernels, pattern) == []
