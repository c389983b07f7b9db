//! The launch of a grouped product, with tensor maps where its kernel reads operands by them.

use crate::driver::{MapSpec, Region, TensorMap};
use crate::tiles::{Math, Tile, blocks, name};
use crate::{Buffer, Queue, Result};

/// Rows of a result that a warp has.
const RESULT_ROWS: u32 = 16;
/// Rows that a warpgroup has of one that it transposes.
const TRANSPOSED_RESULT_ROWS: u32 = 64;

/// What a kernel is chosen by, and given beside its parameters.
pub(crate) struct Grouped {
    pub kernel: &'static str,
    pub math: Math,
    pub tile: Tile,
    pub variant: &'static str,
    /// Clusters of tiles at most.
    pub clusters: usize,
    pub maps: Maps,
}

/// Of tensors that warpgroups do not read or write by themselves.
#[derive(Clone, Copy, Default)]
pub(crate) struct Maps {
    /// An operand, unless it is gathered.
    pub a: Option<MapSpec>,
    /// The other one.
    pub b: Option<MapSpec>,
    /// What else is read.
    pub inputs: [Option<MapSpec>; 2],
    /// What is written, where it is wanted.
    pub results: [Option<MapSpec>; 3],
}

impl Grouped {
    /// # Safety
    /// As [`Queue::launch`]; `P` is the struct of the kernel whose tile is not of warpgroups.
    pub unsafe fn launch<P: Copy>(&self, queue: &Queue<'_>, params: &P, memory: &[Region]) -> Result<()> {
        /// As in cuda/tile/tensor_boxes.cuh.
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Mapped<P> {
            maps: [TensorMap; 7],
            params: P,
        }
        let Self { kernel, math, tile, variant, clusters, maps } = *self;
        let name = name(kernel, math, tile, variant);
        let blocks = blocks(queue.gpu, tile, clusters)?;
        if blocks == 0 {
            return Ok(());
        }
        // SAFETY: as promised by the caller; kernels of warpgroups have the struct with its maps before it.
        unsafe {
            if tile.warpgroups {
                let Maps { a, b, inputs: [i, j], results: [x, y, z] } = maps;
                let mut maps = [TensorMap::NONE; 7];
                for (map, spec) in maps.iter_mut().zip([a, b, i, j, x, y, z]) {
                    *map = queue.tensor_map(spec)?;
                }
                queue.launch(&name, blocks, &Mapped { maps, params: *params }, memory)
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

/// Results `[R, N]` or `[E, M, N]`.
pub(crate) fn results(tensor: Buffer, sizes: [usize; 3]) -> Option<MapSpec> {
    operand(tensor, sizes, RESULT_ROWS, false)
}

/// The same, of a kernel that computes them the other way round.
pub(crate) fn transposed_results(tensor: Buffer, sizes: [usize; 3]) -> Option<MapSpec> {
    operand(tensor, sizes, TRANSPOSED_RESULT_ROWS, false)
}

/// Hidden states `[R, columns]`, in two maps where their gate and up columns are halves.
pub(crate) fn hidden(tensor: Buffer, [columns, rows]: [usize; 2], halves: bool) -> [Option<MapSpec>; 2] {
    let whole = results(tensor, [columns, rows, 1]);
    if !halves {
        return [whole, None];
    }
    let (width, up) = (columns / 2, (MapSpec::ELEMENT * columns / 2) as u64);
    [0, up].map(|at| whole.map(|map| MapSpec { address: map.address + at, sizes: [width, rows, 1], ..map }))
}

/// None of a tensor that is not there.
fn operand(tensor: Buffer, sizes: [usize; 3], box_height: u32, two_boxes: bool) -> Option<MapSpec> {
    let spec = MapSpec { address: tensor.address, sizes, pitch: sizes[0], box_height, two_boxes };
    (!tensor.is_null()).then_some(spec)
}
