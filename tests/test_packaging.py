"""What the wheel is: its tag, what it links to, its size, and how it imports, with and without torch."""

import email
import importlib.metadata
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import fastmoe_rs

ROOT = Path(__file__).parents[1]
MEGABYTE = 1_000_000


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel that FASTMOE_WHEEL names, or one built now."""
    if given := os.environ.get("FASTMOE_WHEEL"):
        return Path(given)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "maturin", "build", "--release", "--locked", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def clean_python(unpacked, tmp_path_factory):
    """The interpreter of a fresh environment that has the wheel and NumPy, and nothing else."""
    venv = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    numpy = Path(np.__file__).parent
    for source in [*unpacked.iterdir(), *numpy.parent.glob("numpy"), *numpy.parent.glob("numpy.libs")]:
        (packages / source.name).symlink_to(source)
    return venv / "bin" / "python"


def run(python, code, **environment):
    done = subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def needed_libraries(path):
    """The DT_NEEDED names of a 64-bit little-endian ELF file (System V gABI, chapters 4 and 5)."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, entries = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * entry_size) for i in range(entries)]
    dynamic = next(section for section in sections if section[1] == 6)
    strings = sections[dynamic[6]][4]
    tags = struct.iter_unpack("<qQ", data[dynamic[4] : dynamic[4] + dynamic[5]])
    starts = [strings + value for tag, value in tags if tag == 1]
    return {data[start : data.index(b"\0", start)].decode() for start in starts}


def test_tag(wheel, unpacked):
    assert re.fullmatch(r"fastmoe_rs-\d+\.\d+\.\d+-cp310-abi3-\w+\.whl", wheel.name)
    (description,) = unpacked.glob("*.dist-info/WHEEL")
    tags = email.message_from_string(description.read_text()).get_all("Tag")
    assert all(tag.startswith("cp310-abi3-") for tag in tags)


def test_size(wheel):
    assert wheel.stat().st_size < 12 * MEGABYTE


def test_contents(unpacked):
    package = unpacked / "fastmoe_rs"
    for name in ("__init__.py", "_native.pyi", "py.typed"):
        assert (package / name).is_file(), name
    assert [path.name for path in unpacked.rglob("*.so")] == ["_native.abi3.so"]
    assert [path.name for path in unpacked.glob("*.dist-info/licenses/*")] == ["LICENSE"]
    assert not list(unpacked.rglob("*.pyc"))


def test_metadata(unpacked):
    (path,) = unpacked.glob("*.dist-info/METADATA")
    metadata = email.message_from_string(path.read_text())
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [re.match(r"\w+", line)[0] for line in required] == ["numpy"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.skipif(sys.platform != "linux", reason="ELF is the format of Linux")
def test_links_only_to_the_c_library(unpacked):
    needed = needed_libraries(unpacked / "fastmoe_rs" / "_native.abi3.so")
    assert "libc.so.6" in needed
    basic = re.compile(r"(libc|libm|libdl|librt|libpthread|libgcc_s|ld-linux[\w-]*)\.so\.\d+")
    assert [name for name in needed if not basic.fullmatch(name)] == []


@pytest.mark.skipif(sys.platform != "linux", reason="manylinux is a promise about Linux")
def test_tag_promises_no_more_than_the_symbols_keep(wheel):
    """auditwheel reads which glibc the module's symbols need: not a newer one than the tag says."""
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r'platform\s+tag:\s+"manylinux_(\d+)_(\d+)_', shown)
    assert found, shown
    promised = re.search(r"manylinux_(\d+)_(\d+)_", wheel.name)
    assert promised, wheel.name
    assert tuple(map(int, found.groups())) <= tuple(map(int, promised.groups())), shown


def test_every_kernel_is_there_for_every_target(unpacked):
    """The images in the wheel itself: each family of cuda/kernels, compiled for all that can run it."""
    if os.environ.get("FASTMOE_CUDA_ARCHS") != "all":
        pytest.skip("the wheel has all images where FASTMOE_CUDA_ARCHS=all built it, as .ci/run does")
    code = """
import json, fastmoe_rs._native
print(json.dumps([(image["family"], image["arch"]) for image in fastmoe_rs._native.images()]))
"""
    images = json.loads(run(sys.executable, code, PYTHONPATH=str(unpacked)))
    own = {"sm90": {"90a"}, "sm100": {"100f"}, "sm120": {"120f"}}
    portable = {"80", "90a", "100f", "120f", "ptx"}
    families = [path.stem for path in (ROOT / "cuda" / "kernels").glob("*.cu")]
    wanted = {(family, arch) for family in families for arch in own.get(family.partition("_")[0], portable)}
    assert {tuple(image) for image in images} == wanted


def test_carries_no_emulator(unpacked, clean_python):
    code = """
import numpy as np, fastmoe_rs
try:
    fastmoe_rs.RoutingPlan.from_ids(np.array([[1, 0]]), 3)
except RuntimeError as error:
    print(error)
"""
    message = "FASTMOE_BACKEND=emulator: this build has no emulator; unset it to use the CPU backend"
    assert run(clean_python, code, FASTMOE_BACKEND="emulator") == message
    module = (unpacked / "fastmoe_rs" / "_native.abi3.so").read_bytes()
    assert b"FASTMOE_BACKEND" in module
    for name in (b"FASTMOE_EMULATOR", b"emulator_launch"):
        assert name not in module


class TestWithoutTorch:
    def test_import(self, clean_python):
        code = "import sys, fastmoe_rs, fastmoe_rs._native as n; print(n.__version__, 'torch' in sys.modules)"
        version, torch_loaded = run(clean_python, code).split()
        assert version == fastmoe_version()
        assert torch_loaded == "False"

    def test_plan_of_numpy_arrays(self, clean_python):
        code = """
import numpy as np, fastmoe_rs
plan = fastmoe_rs.RoutingPlan.from_ids(np.array([[1, 0], [1, 2]]), 3)
print(np.asarray(plan.counts).tolist())
"""
        assert run(clean_python, code) == "[1, 2, 1]"

    @pytest.mark.parametrize("name", ["functional", "nn", "losses", "reference", "accelerate"])
    def test_what_needs_torch_says_so(self, clean_python, name):
        code = f"""
import fastmoe_rs
try:
    fastmoe_rs.{name}
except ImportError as error:
    print(error)
"""
        message = run(clean_python, code)
        assert f"fastmoe_rs.{name} needs torch" in message
        assert "pip install torch" in message

    def test_native_tensors_say_so(self, clean_python):
        code = """
from fastmoe_rs import _native
try:
    _native.empty((1,), "float32")
except ImportError as error:
    print(error)
"""
        assert run(clean_python, code) == "fastmoe_rs needs PyTorch for tensors: pip install torch"


class TestWithTorch:
    def test_the_native_module_does_not_import_it(self, unpacked):
        code = "import sys, fastmoe_rs._native as n; print(n.__file__, 'torch' in sys.modules)"
        file, torch_loaded = run(sys.executable, code, PYTHONPATH=str(unpacked)).split()
        assert Path(file).is_relative_to(unpacked)
        assert torch_loaded == "False"

    def test_import_time(self, unpacked):
        """At most 150 ms beyond torch's own; the best of five, for other work on the machine."""
        code = """
import time, torch
start = time.perf_counter()
import fastmoe_rs
fastmoe_rs.functional, fastmoe_rs.nn, fastmoe_rs.RoutingPlan
print(time.perf_counter() - start)
"""
        seconds = min(float(run(sys.executable, code, PYTHONPATH=str(unpacked))) for _ in range(5))
        assert seconds < 0.150


def fastmoe_version():
    manifest = (ROOT / "Cargo.toml").read_text()
    return re.search(r'^version = "(.+)"', manifest, re.MULTILINE)[1]


def test_version_is_that_of_the_package():
    assert fastmoe_rs.__version__ == importlib.metadata.version("fastmoe_rs") == fastmoe_version()
