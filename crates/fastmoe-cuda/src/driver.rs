//! What the backend needs of a driver: devices, images, launches. libcuda is one; the CPU emulator is another.

use crate::Result;
use std::ffi::CStr;

/// A loaded image of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module(pub usize);

/// An entry point of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function(pub usize);

/// A stream of a device; 0 is the default stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(pub usize);

/// The shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Blocks of the one-dimensional grid.
    pub blocks: u32,
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

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The product's name.
    pub name: String,
    /// Compute capability, `10 * major + minor`.
    pub arch: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block can be given.
    pub shared_per_block: u32,
}

/// A driver. Every method may be called from any thread.
pub trait Driver: Send + Sync {
    /// The number of devices.
    fn device_count(&self) -> Result<i32>;

    /// What device `device` is.
    fn device(&self, device: i32) -> Result<Device>;

    /// Loads an image on a device. Not while a stream of it is being captured.
    fn load(&self, device: i32, image: &[u8]) -> Result<Module>;

    /// Finds an entry point and lets it have `shared` bytes of dynamic shared memory.
    fn function(&self, device: i32, module: Module, name: &CStr, shared: u32) -> Result<Function>;

    /// Puts a kernel with one parameter struct into a stream.
    ///
    /// # Safety
    /// `params` has the layout of the kernel's parameter struct, and its pointers are valid on the device, until the
    /// kernel has run, for all that the kernel does with them.
    unsafe fn launch(
        &self,
        device: i32,
        stream: Stream,
        function: Function,
        shape: Shape,
        params: &[u8],
        memory: &[Region],
    ) -> Result<()>;

    /// Whether [`Driver::launch`] looks at `memory`.
    fn checks_memory(&self) -> bool {
        false
    }
}
