"""Fragments, swizzles and descriptors are where NVIDIA's CuTe has them."""

import toolkit


def test_layouts_are_those_of_cute(cuda_tools):
    places = (f"TOOLKIT={toolkit.TOOLKIT}", f"CUTLASS={toolkit.CUTLASS}")
    toolkit.run("make", "-j2", "-C", toolkit.CUDA / "tests", "layouts", *places)
