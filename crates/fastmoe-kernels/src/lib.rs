#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod arch;
#[cfg(test)]
mod tests;

pub use arch::Arch;
use ruzstd::decoding::StreamingDecoder;
use std::io::Read;

/// A kernel family, compiled for one target.
#[derive(Debug)]
pub struct Image {
    /// The name of its source in `cuda/kernels`.
    pub family: &'static str,
    /// What runs it.
    pub arch: Arch,
    /// Its entry points.
    pub kernels: &'static [Kernel],
    zstd: &'static [u8],
}

/// An entry point. The numbers of a kernel in PTX are those of its machine code for [`Arch::Sm80`].
#[derive(Debug)]
pub struct Kernel {
    /// The symbol.
    pub name: &'static str,
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Registers of a thread.
    pub registers: u32,
    /// Stack and spills of a thread.
    pub local_bytes: u32,
}

static IMAGES: &[Image] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The images of this build, sorted by family.
pub fn images() -> &'static [Image] {
    IMAGES
}

/// The images that a device of this compute capability runs, one of each family that has any for it.
pub fn images_of(major: u32, minor: u32) -> impl Iterator<Item = &'static Image> {
    let families = IMAGES.chunk_by(|a, b| a.family == b.family);
    families.filter_map(move |of| choose(of, of[0].family, major, minor))
}

/// The image of a family for a device of this compute capability: its machine code, or else PTX.
fn choose<'a>(images: &'a [Image], family: &str, major: u32, minor: u32) -> Option<&'a Image> {
    let made_for = Arch::of_device(major, minor)?;
    let of = |arch| images.iter().find(|image| image.family == family && image.arch == arch);
    of(made_for).or_else(|| of(Arch::Ptx80))
}

impl Image {
    /// What the driver loads: an ELF file, or PTX that ends in a zero.
    pub fn inflate(&self) -> Vec<u8> {
        let mut inflated = Vec::new();
        StreamingDecoder::new(self.zstd)
            .map_err(|error| error.to_string())
            .and_then(|mut decoder| decoder.read_to_end(&mut inflated).map_err(|error| error.to_string()))
            .expect("the build compressed this image");
        inflated
    }

    /// The bytes that it adds to the library.
    pub fn compressed_bytes(&self) -> usize {
        self.zstd.len()
    }
}
