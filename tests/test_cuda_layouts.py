"""Fragments, swizzles and descriptors are where NVIDIA's CuTe has them."""

import nvidia


def test_layouts_are_those_of_cute(cuda_tools):
    places = (f"TOOLKIT={nvidia.TOOLKIT}", f"CUTLASS={nvidia.CUTLASS}")
    nvidia.run("make", "-j2", "-C", nvidia.CUDA / "tests", "layouts", *places)
