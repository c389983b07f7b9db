//! The launch of a grouped product, with tensor maps where its kernel reads operands by them.

use crate::driver::{MapSpec, Region, TensorMap};
use crate::tiles::{Math, Tile, blocks, name};
use crate::{Buffer, Queue, Result};

/// What a kernel is chosen by, and given beside its parameters.
pub(crate) struct Grouped {
    pub kernel: &'static str,
    pub math: Math,
    pub tile: Tile,
    pub variant: &'static str,
    /// Clusters of tiles at most.
    pub clusters: usize,
    /// A and B for warpgroups, none of an operand that is gathered or empty.
    pub operands: [Option<MapSpec>; 2],
}

impl Grouped {
    /// # Safety
    /// As [`Queue::launch`]; `P` is the struct of the kernel whose tile is not of warpgroups.
    pub unsafe fn launch<P: Copy>(&self, queue: &Queue<'_>, params: &P, memory: &[Region]) -> Result<()> {
        /// As in cuda/tile/tensor_boxes.cuh.
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Mapped<P> {
            a: TensorMap,
            b: TensorMap,
            params: P,
        }
        let Self { kernel, math, tile, variant, clusters, operands: [a, b] } = *self;
        let name = name(kernel, math, tile, variant);
        let blocks = blocks(queue.gpu, tile, clusters)?;
        // SAFETY: as promised by the caller; kernels of warpgroups have the struct with two maps before it.
        unsafe {
            if tile.warpgroups {
                let (a, b) = (queue.tensor_map(a)?, queue.tensor_map(b)?);
                queue.launch(&name, blocks, &Mapped { a, b, params: *params }, memory)
            } else {
                queue.launch(&name, blocks, params, memory)
            }
        }
    }
}

/// The variant of kernels for weights `[E, N, K]`, or `[E, K, N]` where they are transposed, and these as operand B.
pub(crate) fn weights(
    w: Buffer,
    transposed: bool,
    [inner, columns, experts]: [usize; 3],
) -> (&'static str, Option<MapSpec>) {
    if transposed {
        ("nn", operand(w, [columns, inner, experts], 64, false))
    } else {
        ("nt", operand(w, [inner, columns, experts], 128, true))
    }
}

/// Rows `[R, K]` of a product over their columns.
pub(crate) fn rows_along_inner(rows: Buffer, [inner, count]: [usize; 2]) -> Option<MapSpec> {
    operand(rows, [inner, count, 1], 64, true)
}

/// Rows `[R, M]` or `[R, N]` of a product over all of an expert's rows.
pub(crate) fn rows_across(rows: Buffer, [columns, count]: [usize; 2]) -> Option<MapSpec> {
    operand(rows, [columns, count, 1], 64, false)
}

/// None of an empty tensor, which has no map, and of which no kernel reads.
fn operand(tensor: Buffer, sizes: [usize; 3], box_height: u32, two_boxes: bool) -> Option<MapSpec> {
    (!sizes.contains(&0)).then_some(MapSpec { address: tensor.address, sizes, box_height, two_boxes })
}
