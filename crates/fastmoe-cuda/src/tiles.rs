//! Which tile a product gets, how many blocks compute it, and what its kernel is called.

use crate::limits;
use crate::{Buffer, DType, Gpu, Result};

/// Shared memory that a block of the widest tile is meant for: two stages more than GPUs with 100 KB have room for.
const WIDE_TILE_SHARED: u32 = 160 << 10;

/// Of a row of a slice, as in cuda/tile/shape.cuh.
const SLICE_BYTES: usize = 64;
/// All that a block can have on Hopper, where warpgroups fill it with slices and results.
const HOPPER_SHARED: u32 = 227 << 10;

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
    /// Slices of its operands in shared memory.
    pub stages: usize,
    /// Blocks that share a multiprocessor, where its shared memory allows it.
    pub resident: usize,
    /// Whether warpgroups compute it, by wgmma.
    pub warpgroups: bool,
}

impl Tile {
    /// Bytes of shared memory of a block, at most.
    fn shared(self) -> u32 {
        let of_stages = self.stages * SLICE_BYTES * (self.rows + self.columns);
        if self.warpgroups { HOPPER_SHARED } else { of_stages as u32 }
    }

    /// Tiles that a cluster of as many blocks computes at a time, each block one; they share an operand.
    fn cluster(self) -> usize {
        if self.warpgroups { 2 } else { 1 }
    }

    /// The tiles of a result of so many rows.
    fn of(self, rows: usize, columns: usize) -> usize {
        rows.div_ceil(self.rows) * columns.div_ceil(self.columns)
    }
}

// As in cuda/tile/entries.cuh.
const WIDE: Tile =
    Tile { name: "128x256", rows: 128, columns: 256, stages: 4, resident: 1, warpgroups: false };
const SQUARE: Tile = Tile { name: "128x128", rows: 128, columns: 128, stages: 3, resident: 2, ..WIDE };
// With few rows the weights have to come as fast as memory gives them, to as few blocks as there are tiles: of 8 stages
// 64 blocks have the 4 MB under way that 4.8 TB/s take at 0.8 us.
const FLAT: Tile = Tile { name: "32x128", rows: 32, columns: 128, stages: 8, resident: 2, ..WIDE };
const ANY: Tile = Tile { name: "64x128", rows: 64, columns: 128, stages: 2, resident: 2, ..WIDE };
const ANY_WEIGHT: Tile = Tile { resident: 3, ..ANY };
const WARPGROUPS: Tile = Tile { warpgroups: true, ..WIDE };

/// The tile of a product over rows `[rows, columns]`.
pub(crate) fn row_tile(
    gpu: &Gpu,
    math: Math,
    aligned: bool,
    [rows, columns]: [usize; 2],
    experts: usize,
) -> Tile {
    let rows_per_expert = rows / experts.max(1);
    let tiles = rows.min(experts) * WIDE.of(rows_per_expert.max(1), columns);
    match math.dtype {
        _ if !aligned => ANY,
        DType::F32 => SQUARE,
        // A warpgroup without rows does nothing, and TMA reads weights faster than cp.async does. Two of five multiprocessors
        // take all that an H100's memory gives.
        _ if gpu.warpgroups()
            && rows_per_expert <= WARPGROUPS.rows / 2
            && 5 * tiles >= 2 * gpu.device.multiprocessors as usize =>
        {
            WARPGROUPS
        }
        _ if rows_per_expert <= FLAT.rows => FLAT,
        _ if gpu.warpgroups() => wide(gpu, WARPGROUPS, tiles),
        _ if rows_per_expert < 256 => SQUARE,
        _ => wide(gpu, WIDE, tiles),
    }
}

/// The tile of a gradient of weights `[rows, columns]` an expert.
pub(crate) fn weight_tile(
    gpu: &Gpu,
    math: Math,
    aligned: bool,
    [rows, columns]: [usize; 2],
    experts: usize,
) -> Tile {
    match math.dtype {
        _ if !aligned => ANY_WEIGHT,
        DType::F32 => SQUARE,
        _ if columns < 256 => SQUARE,
        _ => {
            let wide_tile = if gpu.warpgroups() { WARPGROUPS } else { WIDE };
            wide(gpu, wide_tile, experts * WIDE.of(rows, columns))
        }
    }
}

/// The widest tile for a result of so many of them, unless they leave half of the multiprocessors idle: twice as many
/// squares then keep all of them busy, and each takes half as long.
fn wide(gpu: &Gpu, tile: Tile, tiles: usize) -> Tile {
    let idle = 2 * tiles <= gpu.device.multiprocessors as usize;
    if idle || gpu.device.shared_per_block < WIDE_TILE_SHARED { SQUARE } else { tile }
}

/// Whether rows of these lengths, in tensors at these places, start at multiples of 16 bytes. Those of no elements do not.
pub(crate) fn aligned(dtype: DType, columns: &[usize], tensors: &[Buffer]) -> bool {
    columns.iter().all(|columns| *columns > 0 && (columns * dtype.bytes()).is_multiple_of(16))
        && tensors.iter().all(|tensor| tensor.address.is_multiple_of(16))
}

/// The grid for so many clusters of tiles: of whole clusters, and of one even where a device could not run it at once.
pub(crate) fn blocks(gpu: &Gpu, tile: Tile, clusters: usize) -> Result<usize> {
    limits::rows("tiles of the result", tile.cluster() * clusters)?;
    let resident = gpu.device.resident(tile.resident, tile.shared());
    let at_once = gpu.device.multiprocessors as usize * resident / tile.cluster();
    Ok(tile.cluster() * clusters.min(at_once.max(1)))
}

/// Clusters of tiles over the sorted rows at most: every expert may end in a part of a tile, and so may the unused rows.
/// Rows of tiles are taken in pairs, and the last of an odd number by itself.
pub(crate) fn row_clusters(tile: Tile, rows: usize, experts: usize, columns: usize) -> usize {
    let across = columns.div_ceil(tile.columns);
    let (whole, ends) = (rows / tile.rows * across / tile.cluster(), across.div_ceil(tile.cluster()));
    if rows == 0 { 0 } else { whole + (experts + 1) * ends }
}

/// Clusters of tiles of a gradient of weights `[rows, columns]` an expert.
pub(crate) fn weight_clusters(tile: Tile, rows: usize, experts: usize, columns: usize) -> usize {
    experts * tile.of(rows, columns).div_ceil(tile.cluster())
}

/// The parts of a kernel's name.
pub(crate) fn name(kernel: &'static str, math: Math, tile: Tile, variant: &'static str) -> [&'static str; 5] {
    let by = if tile.warpgroups { "wgmma" } else { "" };
    // Without alignment float32 is multiplied in full.
    let any = tile == ANY || tile == ANY_WEIGHT;
    let (math, variant) = if any { (math.dtype.suffix(), "any") } else { (math.name(), variant) };
    [kernel, by, math, tile.name, variant]
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::driver::Device;
    use fastmoe_kernels::Kernel;

    /// The kernels of this build, on every target: none in a build without kernels.
    pub fn compiled() -> impl Iterator<Item = &'static Kernel> {
        crate::images().iter().flat_map(|image| image.kernels)
    }

    /// Blocks for which a multiprocessor has registers: 65536, given to warps in units of 256.
    pub fn by_registers(kernel: &Kernel) -> usize {
        (65536 / (kernel.threads / 32 * (32 * kernel.registers).next_multiple_of(256))) as usize
    }

    const BF16: Math = Math { dtype: DType::Bf16, tf32: false };

    fn gpu(capability: (u32, u32), multiprocessors: u32, shared_kib: u32) -> Gpu {
        let shared_per_block = shared_kib << 10;
        let device = Device { name: String::new(), capability, multiprocessors, shared_per_block };
        Gpu::without_kernels(&crate::record::Recorder, device)
    }

    #[test]
    fn tiles_are_those_of_the_images() {
        for kernel in compiled() {
            let of = |tile: &Tile| {
                kernel.name.contains(&format!("_{}_", tile.name))
                    && kernel.name.contains("_wgmma_") == tile.warpgroups
            };
            let any = if kernel.name.starts_with("grad_weight") { ANY_WEIGHT } else { ANY };
            let Some(tile) = [WIDE, WARPGROUPS, SQUARE, FLAT, any].into_iter().find(of) else { continue };
            let (shared, most) = (kernel.shared_bytes, tile.shared());
            assert!(if tile.warpgroups { shared <= most } else { shared == most }, "{}", kernel.name);
            assert!(tile.resident <= by_registers(kernel), "{}", kernel.name);
        }
    }

    #[test]
    fn rows_that_are_not_aligned_are_never_tf32() {
        let tf32 = Math { dtype: DType::F32, tf32: true };
        assert_eq!(name("up", tf32, SQUARE, "nt"), ["up", "", "tf32", "128x128", "nt"]);
        assert_eq!(name("up", tf32, ANY, "nt"), ["up", "", "f32", "64x128", "any"]);
    }

    #[test]
    fn few_wide_tiles_become_squares() {
        for (capability, wide) in [((8, 0), WIDE), ((9, 0), WARPGROUPS), ((10, 0), WIDE)] {
            let gpu = gpu(capability, 132, 227);
            let tile = |rows, columns| row_tile(&gpu, BF16, true, [rows, columns], 8);
            assert_eq!(tile(2048, 4096), wide);
            assert_eq!(tile(2048, 1024), SQUARE, "64 wide tiles");
            assert_eq!(tile(2048, 1280), wide, "80 wide tiles");
            let weight = |experts| weight_tile(&gpu, BF16, true, [1024, 1024], experts);
            assert_eq!([weight(2), weight(3)], [SQUARE, wide]);
        }
    }

    #[test]
    fn warpgroups_take_few_rows_of_an_expert_as_well() {
        let tile = |capability, rows: usize| {
            row_tile(&gpu(capability, 132, 227), BF16, true, [128 * rows, 4096], 128)
        };
        assert_eq!([32, 33, 255, 256].map(|rows| tile((8, 0), rows)), [FLAT, SQUARE, SQUARE, WIDE]);
        assert_eq!([1, 64, 65, 256].map(|rows| tile((9, 0), rows)), [WARPGROUPS; 4]);
        let one_token = |top_k, columns| row_tile(&gpu((9, 0), 132, 227), BF16, true, [top_k, columns], 128);
        assert_eq!([768, 1536, 2048].map(|columns| one_token(8, columns)), [FLAT, FLAT, WARPGROUPS]);
        assert_eq!(one_token(2, 28672), WARPGROUPS);
        let float = Math { dtype: DType::F32, tf32: true };
        assert_eq!(row_tile(&gpu((9, 0), 132, 227), float, true, [4096, 4096], 8), SQUARE);
        assert_eq!(name("up", BF16, WARPGROUPS, "nt"), ["up", "wgmma", "bf16", "128x256", "nt"]);
    }

    #[test]
    fn grids_are_as_large_as_what_is_resident() {
        let blocks = |gpu, tile| super::blocks(&gpu, tile, 1 << 20).unwrap();
        assert_eq!(blocks(gpu((9, 0), 132, 227), FLAT), 264);
        assert_eq!(blocks(gpu((8, 0), 108, 163), FLAT), 216);
        assert_eq!(blocks(gpu((8, 9), 142, 99), FLAT), 142);
        assert_eq!(blocks(gpu((8, 9), 142, 99), SQUARE), 284);
    }

    #[test]
    fn grids_are_of_whole_clusters() {
        let blocks = |multiprocessors, clusters| {
            super::blocks(&gpu((9, 0), multiprocessors, 227), WARPGROUPS, clusters).unwrap()
        };
        assert_eq!(
            [0, 1, 2, 66, 67, 1 << 20].map(|clusters| blocks(132, clusters)),
            [0, 2, 4, 132, 132, 132]
        );
        assert_eq!([1, 2, 3, 131].map(|multiprocessors| blocks(multiprocessors, 1 << 20)), [2, 2, 2, 130]);
        let gpu = gpu((9, 0), 132, 227);
        let error = super::blocks(&gpu, WARPGROUPS, (1 << 29) + 1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tiles of the result: got 1073741826, wanted at most 1073741824 on a GPU"
        );
    }

    /// As the kernels take them: rows of tiles in pairs, and what an odd number leaves in pairs of columns.
    fn pairs(m: usize, n: usize) -> usize {
        m / 2 * n + m % 2 * n.div_ceil(2)
    }

    #[test]
    fn clusters_are_as_many_as_experts_may_need() {
        const ROWS: [usize; 7] = [0, 1, 128, 129, 256, 257, 400];
        for n in 1..5 {
            let given = |rows: [usize; 3]| row_clusters(WARPGROUPS, rows.iter().sum(), 2, 256 * n);
            // Of two experts and behind them.
            let needed = |rows: [usize; 3]| rows.map(|rows| pairs(rows.div_ceil(128), n)).iter().sum();
            for i in 0..ROWS.len().pow(3) {
                let rows = [i % 7, i / 7 % 7, i / 49].map(|i| ROWS[i]);
                assert!((needed(rows)..).contains(&given(rows)), "{rows:?} {n}");
            }
            for rows in [[1, 1, 1], [257, 1, 257]] {
                assert_eq!(given(rows), needed(rows), "no split of as many rows needs more");
            }
            assert_eq!(given([0; 3]), 0);
        }
    }

    #[test]
    fn clusters_of_weights_are_those_of_their_tiles() {
        for (m, n) in (0..6).flat_map(|m| (0..6).map(move |n| (m, n))) {
            let clusters = |tile| weight_clusters(tile, 128 * m, 3, 256 * n);
            assert_eq!([WIDE, WARPGROUPS].map(clusters), [3 * m * n, 3 * pairs(m, n)]);
            assert_eq!(pairs(m, n), pairs(n, m), "whichever factor is shared");
        }
    }
}
