//! A device with its kernels loaded, and launches into a stream of it.

use crate::driver::{Access, Device, Driver, Kernel, MapSpec, Region, Stream, TensorMap};
use crate::libcuda::Libcuda;
use crate::{Result, emulator};
use arrayvec::ArrayString;
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError};

/// The CUDA version that made the images, as drivers count: `1000 * major + 10 * minor`.
const IMAGES_NEED: i32 = 13_000;

/// A device and its kernels.
pub struct Gpu {
    driver: &'static dyn Driver,
    index: i32,
    /// What it is.
    pub device: Device,
    kernels: HashMap<&'static str, Kernel>,
}

/// The driver of this process: NVIDIA's, or the emulator. Opened at the first call; a failure is tried again.
pub fn driver() -> Result<&'static dyn Driver> {
    static DRIVER: OnceLock<Box<dyn Driver>> = OnceLock::new();
    if DRIVER.get().is_none() {
        let driver: Box<dyn Driver> =
            if emulating() { emulator::open()? } else { Box::new(Libcuda::open(IMAGES_NEED)?) };
        let _ = DRIVER.set(driver);
    }
    Ok(DRIVER.get().expect("set above").as_ref())
}

/// Whether `FASTMOE_BACKEND=emulator` sends CPU tensors to an emulated device, and which everybody asks for.
pub fn emulating() -> bool {
    static EMULATING: LazyLock<bool> = LazyLock::new(|| is_set("FASTMOE_BACKEND", "emulator"));
    *EMULATING
}

/// Whether `FASTMOE_CHECK=1` asks for indices to be checked, at the price of waiting for the device.
pub fn checks() -> bool {
    static CHECKS: LazyLock<bool> = LazyLock::new(|| is_set("FASTMOE_CHECK", "1"));
    *CHECKS
}

fn is_set(variable: &str, value: &str) -> bool {
    std::env::var(variable).is_ok_and(|set| set == value)
}

impl Gpu {
    /// The device of this ordinal; its kernels are loaded at the first call. A failure is tried again.
    pub fn get(index: i32) -> Result<&'static Self> {
        static GPUS: Mutex<Vec<&'static Gpu>> = Mutex::new(Vec::new());
        let mut gpus = GPUS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = gpus.iter().find(|gpu| gpu.index == index) {
            return Ok(gpu);
        }
        gpus.push(Box::leak(Box::new(Self::load(driver()?, index)?)));
        Ok(gpus[gpus.len() - 1])
    }

    /// A device of a driver, with its kernels loaded.
    pub fn load(driver: &'static dyn Driver, index: i32) -> Result<Self> {
        Ok(Self { driver, index, device: driver.device(index)?, kernels: driver.load(index)? })
    }

    /// The kernel whose name has these parts, where they are not empty.
    fn kernel(&self, parts: &[&str]) -> Result<Kernel> {
        let mut name = ArrayString::<64>::new();
        for part in parts.iter().filter(|part| !part.is_empty()) {
            if !name.is_empty() {
                name.push('_');
            }
            name.push_str(part);
        }
        self.kernels.get(name.as_str()).map_or_else(|| self.driver.kernel(&name), |kernel| Ok(*kernel))
    }

    /// Whether its kernels multiply by warpgroups.
    pub(crate) fn warpgroups(&self) -> bool {
        let loaded = || self.kernels.is_empty() || self.kernels.contains_key("gemm_wgmma_bf16_128x256_nt");
        self.device.capability == (9, 0) && loaded()
    }

    /// A device whose driver makes up its kernels.
    pub(crate) fn without_kernels(driver: &'static dyn Driver, device: Device) -> Self {
        Self { driver, index: 0, device, kernels: HashMap::new() }
    }
}

/// Memory of a tensor on the device, or null.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffer {
    /// What the tensor is called.
    pub name: &'static str,
    /// Its address, 0 where there is none.
    pub address: u64,
    /// Its size.
    pub bytes: usize,
}

impl Buffer {
    /// Whether there is no such tensor.
    pub fn is_null(self) -> bool {
        self.address == 0
    }

    /// The tensor as something that a kernel reads.
    pub fn read(self) -> Region {
        self.region(Access::Read)
    }

    /// The tensor as something that a kernel writes, each element once.
    pub fn write(self) -> Region {
        self.region(Access::Write)
    }

    /// The tensor as something that a kernel reads and writes.
    pub fn read_write(self) -> Region {
        self.region(Access::ReadWrite)
    }

    fn region(self, access: Access) -> Region {
        Region { name: self.name, start: self.address as usize, bytes: self.bytes, access }
    }
}

/// A stream of a device, with scratch memory for what a call keeps between its kernels.
pub struct Queue<'a> {
    /// The device.
    pub gpu: &'a Gpu,
    /// Its stream.
    pub stream: Stream,
    /// Memory that nobody else uses until the kernels of this call have run.
    pub scratch: Buffer,
}

impl Queue<'_> {
    /// Puts the kernel whose name has these parts into the stream; `memory` is all that its parameters point to.
    ///
    /// # Safety
    /// `P` is the kernel's parameter struct, `repr(C)`, and its pointers are valid until the kernel has run, for what
    /// it does with them.
    pub unsafe fn launch<P: Copy>(
        &self,
        name: &[&str],
        blocks: usize,
        params: &P,
        memory: &[Region],
    ) -> Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        let kernel = self.gpu.kernel(name)?;
        // SAFETY: the struct lives for the call; drivers copy its bytes, padding included, and look at none of them.
        let params = unsafe { std::slice::from_raw_parts((&raw const *params).cast(), size_of::<P>()) };
        let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        // SAFETY: as promised by the caller.
        unsafe { self.gpu.driver.launch(self.gpu.index, self.stream, kernel, blocks, params, memory) }
    }

    /// The tensor map of a tensor, none of none.
    pub fn tensor_map(&self, spec: Option<MapSpec>) -> Result<TensorMap> {
        spec.map_or(Ok(TensorMap::NONE), |spec| self.gpu.driver.tensor_map(self.gpu.index, &spec))
    }

    /// Sets a word of device memory, in the order of the stream.
    ///
    /// # Safety
    /// The buffer is such a word.
    pub unsafe fn set_word(&self, at: Buffer, value: i32) -> Result<()> {
        // SAFETY: as promised by the caller.
        unsafe { self.gpu.driver.set_word(self.gpu.index, self.stream, at.address, value) }
    }

    /// The 32-bit integers of device memory, once all that is queued has run. The one thing that waits for the device.
    ///
    /// # Safety
    /// The buffer is device memory.
    pub unsafe fn read(&self, at: Buffer) -> Result<Vec<i32>> {
        let mut words = vec![0i32; at.bytes / 4];
        // SAFETY: all of the vector, whose elements may have any bits.
        let bytes = unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), 4 * words.len()) };
        if !words.is_empty() {
            // SAFETY: as promised by the caller.
            unsafe { self.gpu.driver.read(self.gpu.index, self.stream, at.address, bytes)? };
        }
        Ok(words)
    }

    /// The next `bytes` of the scratch memory, aligned to 256.
    pub fn take(&mut self, name: &'static str, bytes: usize) -> Buffer {
        let size = scratch_size(bytes);
        assert!(size <= self.scratch.bytes, "{name} was not counted in the scratch memory");
        let taken = Buffer { name, address: self.scratch.address, bytes };
        self.scratch.address += size as u64;
        self.scratch.bytes -= size;
        taken
    }
}

/// What a piece of scratch memory takes, so that the next one is aligned.
pub(crate) fn scratch_size(bytes: usize) -> usize {
    bytes.next_multiple_of(256)
}
