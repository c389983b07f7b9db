"""Holds every instruction of cuda/ptx/device on a GPU against its emulation on the CPU, bit for bit.

python tests/gpu/conformance.py              # needs a GPU, and g++ and nvcc where it is not built
python tests/gpu/conformance.py boxes pairs  # some of its probes, of cuda/tests/probes.cuh; records nothing
python tests/gpu/conformance.py --build      # compiles into out/conformance, to be taken elsewhere
python tests/gpu/conformance.py --state      # whether the sources are those that last passed; never fails
"""

import argparse
import ctypes as c
import datetime
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "out/conformance"
RECORD = Path(__file__).with_suffix(".json")
IN_WORDS, OUT_WORDS = 4096, 8192
PARAMS_BYTES = 320  # two tensor maps of 128 bytes, two pointers, rounded up to 64
ARCHS = ("80", "90a")
PROBES = ["lanes", "conversions", "arithmetic", "approximations", "memory", "copies", "matrices"]
PROBES += ["products_bf16", "products_f16", "products_tf32", "named_barriers"]
HOPPER = ["boxes", "far_boxes", "warpgroup_bf16", "warpgroup_f16", "warpgroup_transposed", "arrivals"]
HOPPER += ["pairs", "stored_matrices"]
PROBES += HOPPER
BLOCKS = {"pairs": 2}  # one elsewhere
# Of the tensor maps: 16-bit [2, 64, 64], in boxes of 64x64.
SIZES, STRIDES, BOX = (64, 64, 2), (128, 8192), (64, 64, 1)
SHOWN = 8  # words of a probe that are printed where they differ
UNWRITTEN = 0xA5  # bytes of the results beforehand
# Floats at the ends of formats: zeros, subnormals, the largest and what rounds beyond them, infinities, NaN.
EDGES = [0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x33000001, 0x387FE000, 0x477FEFFF]
EDGES += [0xC77FF000, 0x7F7F8000, 0xFF7FEFFF, 0x7F7FF000, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001]
EDGES += [0xFF9E4840, 0x7FFFFFFF]
# Twice the documented relative errors of exp2, rcp, tanh and erf: either side may be off by one of them.
APPROXIMATION_ERRORS = (2**-21, 2**-22, 2**-9.987, 2**-21)


def digest(paths: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def device_half() -> str:
    return digest((ROOT / "cuda/ptx/device").glob("*.cuh"))


def all_sources() -> str:
    patterns = ("ptx/**/*.*h", "emulator/*.*", "tests/probes.*", "tests/harness.*", "tests/Makefile")
    return digest(path for pattern in patterns for path in (ROOT / "cuda").glob(pattern))


def is_built() -> bool:
    stamp = BUILT / "sources"
    return stamp.exists() and stamp.read_text() == all_sources()


def state() -> str:
    record = json.loads(RECORD.read_text())
    if record["device_half"] is None:
        return "cuda/ptx/device: not yet run on a GPU"
    moved = "" if record["device_half"] == device_half() else "; the sources have moved on since"
    return f"cuda/ptx/device: passed on {record['gpu']} on {record['date']}{moved}"


def nvcc() -> Path | None:
    """The compiler of FASTMOE_NVCC_ROOT, of `make toolchain`, or of this machine."""
    roots = [os.environ.get("FASTMOE_NVCC_ROOT"), ROOT / ".venv/cuda/nvidia/cu13", "/usr/local/cuda"]
    found = (Path(root) / "bin/nvcc" for root in roots if root)
    on_path = shutil.which("nvcc")
    return next((path for path in found if path.exists()), on_path and Path(on_path))


def build() -> None:
    BUILT.mkdir(parents=True, exist_ok=True)
    tests = ROOT / "cuda/tests"
    subprocess.run(["make", "--silent", "-C", tests, f"OUT={BUILT}", BUILT / "libprobes.so"], check=True)
    compiler = nvcc()
    if compiler is None:
        raise SystemExit("conformance needs nvcc: make toolchain, or FASTMOE_NVCC_ROOT")
    for arch in ARCHS:
        image = BUILT / f"probes.{arch}.cubin"
        command: list[str | Path] = [
            compiler,
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            "-cubin",
            "-std=c++20",
            "-O3",
            "-x",
            "cu",
            f"-I{ROOT / 'cuda'}",
        ]
        subprocess.run([*command, tests / "probes.cuh", "-o", image], check=True)
    (BUILT / "sources").write_text(all_sources())


def launch_params(maps: bytes, source: int, target: int) -> bytes:
    return (maps + struct.pack("<QQ", source, target)).ljust(PARAMS_BYTES, b"\0")


def words_of_seed(seed: int) -> bytes:
    """A quarter of them are EDGES."""
    draw = random.Random(seed)
    words = (draw.choice(EDGES) if draw.random() < 0.25 else draw.getrandbits(32) for _ in range(IN_WORDS))
    return struct.pack(f"<{IN_WORDS}I", *words)


class Emulator:
    def __init__(self) -> None:
        self.library = c.CDLL(str(BUILT / "libprobes.so"))
        for name in ("emulator_launch", "emulator_tensor_map"):
            getattr(self.library, name).restype = c.c_char_p
        self.library.emulator_set_schedule(0, 0, c.c_uint64(0), 1, 1)

    def run(self, probe: str, words: bytes) -> bytes:
        size = 4 * (IN_WORDS + OUT_WORDS)
        memory = c.create_string_buffer(size + 1024)
        source = (c.addressof(memory) + 1023) // 1024 * 1024
        target = source + 4 * IN_WORDS
        c.memmove(source, words, len(words))
        c.memset(target, UNWRITTEN, 4 * OUT_WORDS)
        maps = c.create_string_buffer(256 + 64)
        at = (c.addressof(maps) + 63) // 64 * 64
        for i, base in enumerate((source, target)):
            error = self.library.emulator_tensor_map(
                c.c_void_p(at + 128 * i),
                c.c_void_p(base),
                2,
                *map(c.c_uint64, (*SIZES, *STRIDES)),
                *BOX[:2],
                1,
            )
            if error:
                raise RuntimeError(error.decode())
        params = launch_params(c.string_at(at, 256), source, target)
        error = self.library.emulator_launch(
            f"probe_{probe}".encode(), c.c_int64(BLOCKS.get(probe, 1)), params, c.c_size_t(len(params))
        )
        if error:
            raise RuntimeError(error.decode())
        return c.string_at(target, 4 * OUT_WORDS)

    def threads(self, probe: str) -> int:
        threads, shared, params = c.c_uint32(), c.c_uint32(), c.c_size_t()
        name = f"probe_{probe}".encode()
        self.library.emulator_kernel(name, c.byref(threads), c.byref(shared), c.byref(params))
        return threads.value


class CudaError(RuntimeError):
    pass


class Gpu:
    def __init__(self) -> None:
        self.cuda = c.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        device, context, self.module = c.c_int(), c.c_void_p(), c.c_void_p()
        self.call("cuDeviceGet", c.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", c.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        name, major, minor = c.create_string_buffer(100), c.c_int(), c.c_int()
        self.call("cuDeviceGetName", name, 100, device)
        self.call("cuDeviceGetAttribute", c.byref(major), 75, device)  # compute capability, as in cuda.h
        self.call("cuDeviceGetAttribute", c.byref(minor), 76, device)
        self.name = name.value.decode()
        self.hopper = (major.value, minor.value) == (9, 0)
        if major.value != 8 and not self.hopper:
            raise SystemExit(f"{self.name}: conformance is compiled for compute capabilities 8.x and 9.0")
        image = BUILT / f"probes.{'90a' if self.hopper else '80'}.cubin"
        self.call("cuModuleLoad", c.byref(self.module), str(image).encode())
        self.memory = c.c_uint64()
        self.call("cuMemAlloc_v2", c.byref(self.memory), c.c_size_t(4 * (IN_WORDS + OUT_WORDS)))

    def call(self, name: str, *arguments: object) -> None:
        status = getattr(self.cuda, name)(*arguments)
        if status:
            raise CudaError(f"{name}: CUDA error {status}")

    def tensor_map(self, base: int) -> bytes:
        storage = c.create_string_buffer(128 + 64)
        at = (c.addressof(storage) + 63) // 64 * 64
        sizes, strides = (c.c_uint64 * 3)(*SIZES), (c.c_uint64 * 2)(*STRIDES)
        box, steps = (c.c_uint32 * 3)(*BOX), (c.c_uint32 * 3)(1, 1, 1)
        # 16-bit elements (1), rank 3, no interleaving, 128-byte swizzle (3), no L2 promotion, zeros outside.
        rest = (1, 3, c.c_void_p(base), sizes, strides, box, steps, 0, 3, 0, 0)
        self.call("cuTensorMapEncodeTiled", c.c_void_p(at), *rest)
        return c.string_at(at, 128)

    def run(self, probe: str, words: bytes) -> bytes:
        source = self.memory.value
        target = source + 4 * IN_WORDS
        function, threads, shared = c.c_void_p(), (c.c_uint32 * 2)(), c.c_uint64()
        self.call("cuModuleGetFunction", c.byref(function), self.module, f"probe_{probe}".encode())
        self.call(
            "cuModuleGetGlobal_v2", c.byref(shared), None, self.module, f"probe_{probe}_launch".encode()
        )
        self.call("cuMemcpyDtoH_v2", threads, shared, c.c_size_t(8))
        self.call("cuMemcpyHtoD_v2", c.c_uint64(source), words, c.c_size_t(len(words)))
        self.call("cuMemsetD8_v2", c.c_uint64(target), c.c_ubyte(UNWRITTEN), c.c_size_t(4 * OUT_WORDS))
        maps = self.tensor_map(source) + self.tensor_map(target) if self.hopper else bytes(256)
        params = c.create_string_buffer(launch_params(maps, source, target), PARAMS_BYTES)
        pointers = (c.c_void_p * 1)(c.addressof(params))
        shape = (BLOCKS.get(probe, 1), 1, 1, threads[0], 1, 1, threads[1])
        self.call("cuLaunchKernel", function, *shape, None, pointers, None)
        self.call("cuCtxSynchronize")
        out = c.create_string_buffer(4 * OUT_WORDS)
        self.call("cuMemcpyDtoH_v2", out, c.c_uint64(target), c.c_size_t(4 * OUT_WORDS))
        return out.raw


def differences(probe: str, emulated: bytes, device: bytes) -> list[int]:
    """Indices of the words that differ."""
    kind = "f" if probe == "approximations" else "I"
    ours, theirs = (struct.unpack(f"<{OUT_WORDS}{kind}", words) for words in (emulated, device))
    pairs = enumerate(zip(ours, theirs, strict=True))
    if kind == "f":
        errors = [bound for bound in APPROXIMATION_ERRORS for _ in range(128)]
        return [
            i for (i, (a, b)), bound in zip(pairs, errors, strict=False) if not abs(a - b) <= abs(a) * bound
        ]
    return [i for i, (a, b) in pairs if a != b]


def described(index: int, threads: int, words: bytes, emulated: bytes, device: bytes) -> str:
    """A word that differs, and what its thread has read where a probe goes by threads."""

    def word(of: bytes, at: int) -> str:
        return f"{int.from_bytes(of[4 * at : 4 * at + 4], 'little'):08x}"

    result, thread = divmod(index, threads)
    inputs = " ".join(word(words, thread + i * threads) for i in range(3))
    values = f"{word(emulated, index)} emulated, {word(device, index)} on the GPU"
    return f"  word {index}, result {result} of thread {thread}: {values}; from {inputs}"


def wrong_words(probe: str, inputs: list[bytes], emulator: Emulator, gpu: Gpu) -> list[str]:
    wrong = []
    for words in inputs:
        emulated, device = emulator.run(probe, words), gpu.run(probe, words)
        found = differences(probe, emulated, device)
        wrong += [described(i, emulator.threads(probe), words, emulated, device) for i in found]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("probes", nargs="*", metavar="PROBE", help="all without")
    parser.add_argument("--build", action="store_true", help="compile only")
    parser.add_argument("--state", action="store_true", help="say what the record says")
    parser.add_argument("--seeds", type=int, default=50)
    options = parser.parse_args()
    if unknown := set(options.probes) - set(PROBES):
        parser.error(f"no such probe: {', '.join(sorted(unknown))}; there are {', '.join(PROBES)}")
    if options.state:
        print(state())
        return 0
    if not is_built():
        build()
    emulator = Emulator()
    if options.build:
        for probe in PROBES:
            emulator.run(probe, words_of_seed(0))
        print(f"{BUILT}: {len(PROBES)} probes built, and run on the CPU")
        return 0
    gpu = Gpu()
    failed = []
    inputs = [*map(words_of_seed, range(options.seeds))]
    probes = options.probes or PROBES
    for i, probe in enumerate(probes):
        if probe in HOPPER and not gpu.hopper:
            print(f"skipped {probe}: {gpu.name} lacks these instructions")
            continue
        try:
            wrong = wrong_words(probe, inputs, emulator, gpu)
        except CudaError as error:
            print(f"failed {probe}: {error}", flush=True)
            if rest := probes[i + 1 :]:  # nothing runs in this process's context any more
                subprocess.run([sys.executable, __file__, f"--seeds={options.seeds}", *rest], check=False)
            return 1
        print(f"{'differs' if wrong else 'equal'} {probe}" + (f": {len(wrong)} words" if wrong else ""))
        print("".join(f"{line}\n" for line in wrong[:SHOWN]), end="", flush=True)
        failed += [probe] * bool(wrong)
    if not failed and gpu.hopper and not options.probes:
        record = {"device_half": device_half(), "date": datetime.date.today().isoformat(), "gpu": gpu.name}
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
