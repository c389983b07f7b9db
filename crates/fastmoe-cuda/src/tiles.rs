//! Which tile a product gets, how many blocks compute it, and what its kernel is called.

use crate::limits;
use crate::{Buffer, DType, Gpu, Result};

/// Shared memory that a block of the widest tile is meant for: two stages more than GPUs with 100 KB have room for.
const WIDE_TILE_SHARED: u32 = 160 << 10;

/// What is multiplied, in what precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Math {
    /// Of the tensors.
    pub dtype: DType,
    /// Whether f32 tensors are rounded to tf32 for the tensor cores.
    pub tf32: bool,
}

impl Math {
    /// What kernel names call `bf16`, `f16`, `f32` or `tf32`.
    pub fn from_name(name: &str) -> Option<Self> {
        let dtypes = [DType::Bf16, DType::F16, DType::F32].into_iter();
        let mut all = dtypes.flat_map(|dtype| [false, true].map(|tf32| Self { dtype, tf32 }));
        all.find(|math| math.name() == name)
    }

    fn name(self) -> &'static str {
        if self.tf32 && self.dtype == DType::F32 { "tf32" } else { self.dtype.suffix() }
    }
}

/// A tile of the output that a block computes at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    /// What kernel names call it.
    pub name: &'static str,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Blocks that share a multiprocessor.
    pub resident: usize,
}

const WIDE: Tile = Tile { name: "128x256", rows: 128, columns: 256, resident: 1 };
const SQUARE: Tile = Tile { name: "128x128", rows: 128, columns: 128, resident: 2 };
const FLAT: Tile = Tile { name: "32x128", rows: 32, columns: 128, resident: 2 };
const ANY: Tile = Tile { name: "64x128", rows: 64, columns: 128, resident: 3 };

/// The tile of a product over rows, `rows_per_expert` of them on average.
pub(crate) fn row_tile(gpu: &Gpu, math: Math, aligned: bool, rows_per_expert: usize) -> Tile {
    match math.dtype {
        _ if !aligned => ANY,
        DType::F32 => SQUARE,
        _ if rows_per_expert <= 32 => FLAT,
        _ if rows_per_expert < 256 || gpu.device.shared_per_block < WIDE_TILE_SHARED => SQUARE,
        _ => WIDE,
    }
}

/// The tile of a gradient of weights `[rows, columns]` an expert.
pub(crate) fn weight_tile(gpu: &Gpu, math: Math, aligned: bool, columns: usize) -> Tile {
    match math.dtype {
        _ if !aligned => ANY,
        DType::F32 => SQUARE,
        _ if columns < 256 || gpu.device.shared_per_block < WIDE_TILE_SHARED => SQUARE,
        _ => WIDE,
    }
}

/// Whether rows of these lengths, in tensors at these places, start at multiples of 16 bytes.
pub(crate) fn aligned(dtype: DType, columns: &[usize], tensors: &[Buffer]) -> bool {
    columns.iter().all(|columns| (columns * dtype.bytes()).is_multiple_of(16))
        && tensors.iter().all(|tensor| tensor.address.is_multiple_of(16))
}

pub(crate) fn blocks(gpu: &Gpu, tile: Tile, tiles: usize) -> Result<usize> {
    limits::rows("tiles of the result", tiles)?;
    Ok(tiles.min(gpu.device.multiprocessors as usize * tile.resident))
}

pub(crate) fn rows_per_expert(rows: usize, experts: usize) -> usize {
    rows / experts.max(1)
}

/// Tiles over the sorted rows at most: every expert may end in a part of one, and so may the unused rows.
pub(crate) fn row_tiles(tile: Tile, rows: usize, experts: usize, columns: usize) -> usize {
    if rows == 0 { 0 } else { (rows / tile.rows + experts + 1) * columns.div_ceil(tile.columns) }
}

pub(crate) fn name(kernel: &str, math: Math, tile: Tile, variant: &str) -> String {
    let variant = if tile == ANY { "any" } else { variant };
    [kernel, math.name(), tile.name, variant].join("_")
}
