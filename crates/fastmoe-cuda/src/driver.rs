//! What the backend needs of a driver: devices, images, launches. libcuda is one; the CPU emulator is another.

use crate::{Error, Result};
use std::collections::HashMap;

/// A stream of a device; 0 is the default stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(pub usize);

/// A loaded kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The driver's handle.
    pub function: usize,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

/// What a kernel may do with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read only.
    Read,
    /// Every element is written once, and none is read.
    Write,
    /// Anything.
    ReadWrite,
}

/// Memory that a launch is given; only checking drivers look at it.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// What the tensor is called.
    pub name: &'static str,
    /// Its address.
    pub start: usize,
    /// Its size.
    pub bytes: usize,
    /// What the kernel may do with it.
    pub access: Access,
}

/// CUDA's `CUtensorMap`: what the tensor memory accelerator of Hopper has to know of a tensor.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap(pub [u64; 16]);

impl TensorMap {
    /// Of no tensor.
    pub const NONE: Self = Self([0; 16]);
}

/// A tensor of 16-bit elements, and the boxes in which it is copied to shared memory: 64 elements wide, in CUDA's swizzle
/// of 128 bytes, with zeros for what is outside the tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSpec {
    /// Its address.
    pub address: u64,
    /// Width, height and depth, none of them 0.
    pub sizes: [usize; 3],
    /// Elements from the start of a row to that of the next. There are no gaps between matrices.
    pub pitch: usize,
    /// The height of a box; its depth is 1.
    pub box_height: u32,
    /// L2 fetches 256 bytes of a row at once, two boxes of them.
    pub two_boxes: bool,
}

impl MapSpec {
    /// Bytes of an element.
    pub const ELEMENT: usize = 2;
    /// Elements of a row of a box.
    pub const BOX_WIDTH: u32 = 64;

    /// Bytes from a row to the next, and from a matrix to the next.
    pub fn strides(&self) -> [u64; 2] {
        let [_, height, _] = self.sizes;
        [self.pitch, self.pitch * height].map(|elements| (Self::ELEMENT * elements) as u64)
    }
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The product's name.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block can be given.
    pub shared_per_block: u32,
}

impl Device {
    /// Blocks that a multiprocessor holds at a time, each with so many bytes of shared memory; `most` is what else limits
    /// them.
    pub(crate) fn resident(&self, most: usize, shared: u32) -> usize {
        /// What the hardware takes of each block (CUDA C++ Programming Guide, "Compute Capabilities"); beside it one block
        /// can be given all that a multiprocessor has.
        const RESERVED: u32 = 1 << 10;
        most.min((self.shared_per_block.saturating_add(RESERVED) / (shared + RESERVED)) as usize).max(1)
    }
}

/// A driver. Every method may be called from any thread.
pub trait Driver: Send + Sync {
    /// The CUDA version that it supports: `1000 * major + 10 * minor`.
    fn version(&self) -> Result<i32>;

    /// The number of devices.
    fn device_count(&self) -> Result<i32>;

    /// What device `device` is.
    fn device(&self, device: i32) -> Result<Device>;

    /// Loads everything that this build has for a device, by name. Not while a stream of it is being captured.
    fn load(&self, device: i32) -> Result<HashMap<&'static str, Kernel>>;

    /// A kernel that [`load`](Self::load) did not give.
    fn kernel(&self, name: &str) -> Result<Kernel> {
        Err(Error::NoKernel { name: name.to_owned() })
    }

    /// The tensor map of a tensor. Drivers that run nothing need not make any.
    fn tensor_map(&self, _device: i32, _spec: &MapSpec) -> Result<TensorMap> {
        Ok(TensorMap::NONE)
    }

    /// Puts a kernel with one parameter struct into a stream.
    ///
    /// # Safety
    /// `params` has the layout of the kernel's parameter struct, and its pointers are valid on the device, until the
    /// kernel has run, for all that the kernel does with them.
    unsafe fn launch(
        &self,
        device: i32,
        stream: Stream,
        kernel: Kernel,
        blocks: u32,
        params: &[u8],
        memory: &[Region],
    ) -> Result<()>;

    /// Sets a 32-bit word, in the order of the stream.
    ///
    /// # Safety
    /// The address is a word of device memory that stays until then.
    unsafe fn set_word(&self, device: i32, stream: Stream, address: u64, value: i32) -> Result<()>;

    /// Copies device memory to the host, once all that is in the stream has run.
    ///
    /// # Safety
    /// The address begins as many bytes of device memory as `into` has.
    unsafe fn read(&self, device: i32, stream: Stream, address: u64, into: &mut [u8]) -> Result<()>;
}
