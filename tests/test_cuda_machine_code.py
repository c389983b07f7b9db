"""What the kernels compile to: the instructions that are meant, and none of those that betray a mistake."""

import itertools
import re

import pytest

import images
import kernel_table
from fastmoe_rs import _native
from fastmoe_rs.gpus import find
from gpus import GPUS, blocks_per_multiprocessor, loop

NEVER = {
    r"LDL|STL": "local memory",
    r"D(FMA|ADD|MUL)": "double precision",
    r"(ATOM|RED)\S*\.F\d": "a sum of floats whose order is left to chance",
}
PRODUCTS = {
    "bf16": {"HMMA.16816.F32.BF16"},
    "f16": {"HMMA.16816.F32"},
    "tf32": {"HMMA.1688.F32.TF32"},
    "f32": set(),
}
# Of all columns of a tile, and of a last one's left half.
BY_WARPGROUPS = {
    "bf16": {"HGMMA.64x256x16.F32.BF16", "HGMMA.64x128x16.F32.BF16"},
    "f16": {"HGMMA.64x256x16.F32", "HGMMA.64x128x16.F32"},
}


@pytest.fixture(scope="module", params=images.CODES)
def kernels(request, cuda_images):
    return images.kernels(request.param)


@pytest.fixture
def tiles(kernels):
    """The grouped products: kernel, what is multiplied, layout."""
    named = [(kernel, re.search(r"_(b?f16|t?f32)_\d+x\d+_(\w+)$", kernel.name)) for kernel in kernels]
    found = [(kernel, *name.groups()) for kernel, name in named if name]
    assert {math for _, math, _ in found} == set(PRODUCTS)
    return found


def by_warpgroups(kernel):
    return "_wgmma_" in kernel.name


def opcodes(code, pattern):
    return {opcode for opcode in code if re.match(pattern, opcode)}


def test_every_family_is_compiled(kernels):
    meant = {family for family in images.families() if not re.match("sm(90|100|120)_", family)}
    assert {kernel.family for kernel in kernels} >= meant


@pytest.mark.parametrize("pattern", NEVER, ids=NEVER.get)
def test_never(kernels, pattern):
    found = {kernel.name: opcodes(kernel.opcodes, pattern) for kernel in kernels}
    assert {name: codes for name, codes in found.items() if codes} == {}


def test_tiles_know_which_memory_they_access(tiles):
    found = {kernel.name: opcodes(kernel.opcodes, r"(LD|ST)(\.|$)") for kernel, *_ in tiles}
    assert {name: codes for name, codes in found.items() if codes} == {}


def test_products_are_those_of_the_name(kernels, tiles):
    meant = {
        kernel.name: (BY_WARPGROUPS if by_warpgroups(kernel) else PRODUCTS)[math] for kernel, math, _ in tiles
    }
    found = {kernel.name: opcodes(kernel.opcodes, "HG?MMA") for kernel in kernels}
    assert found == {name: meant.get(name, set()) for name in found}


def test_slices_are_copied_asynchronously(tiles):
    """16 bytes at a time, past the level-1 cache, in the loop of the products unless a warpgroup of their own
    copies, and then only what may be gathered; `any` takes all sizes."""
    for kernel, math, layout in tiles:
        in_loop = math != "f32" and not by_warpgroups(kernel)
        code = [instruction.opcode for instruction in kernel.main_loop] if in_loop else kernel.opcodes
        copies = opcodes(code, "LDGSTS")
        assert bool(copies) == (layout != "any" and not kernel.name.startswith("gemm_wgmma")), kernel.name
        fetched = "(128|256)" if by_warpgroups(kernel) else "128"
        assert copies == opcodes(copies, rf"LDGSTS\.E\.BYPASS\.LTC{fetched}B\.128$"), kernel.name


def test_tensors_of_warpgroups_come_and_go_by_tma(kernels):
    """Operands that are not gathered, for one block or for both of a pair; results from the matrices that
    stmatrix has put into shared memory. No other kernel has any of this."""
    meant = {"UTMALDG.3D", "UTMALDG.3D.MULTICAST", "UTMASTG.3D"}
    for kernel in kernels:
        found = opcodes(kernel.opcodes, "UTMALDG|UTMASTG|STSM")
        transposed = re.match("grad_weight_.*_b$", kernel.name)
        stored = {"STSM.16.MT88.4" if transposed else "STSM.16.M88.4"}
        assert found == (meant | stored if by_warpgroups(kernel) else set()), kernel.name


def test_products_of_warpgroups_are_not_waited_for_one_by_one(kernels):
    """Those of a slice are issued together, as the compiler does unless it takes their sums for unsafe."""
    for kernel in filter(by_warpgroups, kernels):
        code = [i.opcode for i in kernel.main_loop if re.match("HGMMA|WARPGROUP", i.opcode)]
        products, wait = len(code) - 2, code.pop()
        assert code == ["WARPGROUP.ARRIVE"] + products * code[-1:], kernel.name
        assert (products, wait) == (4, "WARPGROUP.DEPBAR.LE"), kernel.name
        assert code[-1].startswith("HGMMA.64x256"), kernel.name
        # In the loop of left halves as well. The loops over the steps of a last slice have one product each.
        counts = {opcode: kernel.opcodes[opcode] for opcode in opcodes(kernel.opcodes, "HGMMA")}
        arrivals = kernel.opcodes["WARPGROUP.ARRIVE"]
        assert (set(counts.values()), arrivals) == ({4 + 1}, 2 * len(counts)), kernel.name


def test_fragments_are_read_by_ldmatrix(tiles):
    """All of 16 bits, transposed where they run along M or N; of tf32 those along K; none for warpgroups,
    which multiply from shared memory."""
    plain, transposed = {"LDSM.16.M88.4"}, {"LDSM.16.MT88.4"}
    of_layout = {"nt": plain, "nn": plain | transposed, "a": transposed, "b": transposed, "any": plain}
    for kernel, math, layout in tiles:
        meant = {"f32": set(), "tf32": of_layout[layout] - transposed}.get(math, of_layout[layout])
        if by_warpgroups(kernel):
            meant = set()
        assert opcodes([instruction.opcode for instruction in kernel.main_loop], "LDSM") == meant, kernel.name


def test_main_loops_are_lean(cuda_images):
    """Few other instructions per product on sm_80 in the tiles of large problems; see docs/kernels.md."""
    kernels = [kernel for kernel in images.kernels("80") if re.search("_b?f16_128x(256|128)_", kernel.name)]
    assert len(kernels) == 32
    others = {kernel.name: loop(kernel).others for kernel in kernels}
    assert {name: count for name, count in others.items() if count > 1.25} == {}


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_blocks_of_a_grid_fit_at_once(cuda_images, gpu):
    """They share out the work, and those of a second wave would have the device for themselves; the
    blocks of a plan have so little to do that it does not matter."""
    device = find(gpu.name)
    compiled = {kernel.name: kernel for kernel in images.kernels(gpu.code)}
    too_many = set()
    for math, tokens, odd in itertools.product(("bf16", "f16", "f32", "tf32"), (64, 65536), (0, 1)):
        launches = _native.mlp_launches(
            tokens,
            4096 + odd,
            2048 + odd,
            8,
            2,
            math=math,
            gated=True,
            bias=True,
            train=True,
            capability=device.capability,
            multiprocessors=device.multiprocessors,
            shared_bytes=device.shared_bytes,
        )
        for launch in launches:
            name, blocks = launch["kernel"], launch["blocks"]
            resident = blocks_per_multiprocessor(gpu, compiled[name]) * device.multiprocessors
            if blocks > resident and not name.startswith("plan_"):
                too_many.add(f"{name}: {blocks} of {resident}")
    assert too_many == set()


def test_table_is_current(cuda_images):
    assert kernel_table.PAGE.read_text() == kernel_table.page(), "make kernel-table writes it anew"
