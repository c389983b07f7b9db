//! Machines: a register type, its tile sizes, and the one door into code compiled for an instruction set.
//!
//! `PAIRS` machines multiply bf16 directly: a packed operand is made of 32-bit units, each a pair of bf16
//! that are neighbours along the contraction. On the others a unit is one number, widened to the type of
//! sums. Packing, blocking and epilogues are the same for both. Machines with several `PLANES` split wider numbers
//! into sums of bf16: the first plane has the largest part of each number, the next one what that leaves, and so on.

use crate::dtype::Element;
use crate::isa::halves_registers;
use crate::math::Real;
use crate::prefetch::Prefetch;
use crate::row_pointers::RowPointers;
use crate::simd::{Array, Vector};
use half::{bf16, f16};

/// Work that is compiled anew for every machine it runs on.
pub trait Op<M: Machine> {
    /// What it returns.
    type Out;
    /// Does the work.
    ///
    /// # Safety
    /// Implementations are `#[inline(always)]` and are called through `Machine::call` only.
    unsafe fn run(self) -> Self::Out;
}

/// An instruction set with its register and tile sizes.
pub trait Machine: Copy + Send + Sync + 'static {
    /// Type of sums; also the size of a unit of a packed operand.
    type Acc: Real + Element<Acc = Self::Acc>;
    /// A number inside a unit: bf16 where units are pairs, else the type of sums.
    type Cell: Element<Acc = Self::Acc>;
    /// The register.
    type V: Vector<Cell = Self::Acc>;
    /// Units are pairs of bf16.
    const PAIRS: bool;
    /// Rows of the largest tile.
    const ROWS: usize;
    /// Registers across a tile.
    const ACROSS: usize;
    /// 32 registers instead of 16.
    const MANY_REGISTERS: bool = Self::ROWS > 6;
    /// Planes of packed operands: into so many pairs of bf16 numbers of a wider type are split.
    const PLANES: usize = 1;
    /// What multiplies the rows of experts that have too few for splitting their weights.
    type Few: Machine<Acc = Self::Acc, Few = Self::Few>;
    /// From so many rows of an expert on it pays to split its weights (measured).
    const ROWS_TO_SPLIT: usize = 0;
    /// Units of the contraction that a tile goes through at a time, so that its operands stay in L1.
    const DEPTH: usize = 192;
    /// A tile reads and writes all `ROWS` rows, wanted or not.
    const WHOLE_TILES: bool = false;
    /// Columns of a tile and of a packed panel.
    const COLS: usize = Self::ACROSS * Self::V::LANES;
    /// Numbers along the contraction in a unit.
    const UNIT: usize = if Self::PAIRS { 2 } else { 1 };

    /// Runs `op` compiled for this instruction set.
    ///
    /// # Safety
    /// The machine has the instruction set, and whatever `op` asks for holds.
    unsafe fn call<O: Op<Self>>(op: O) -> O::Out;

    /// Up to so many rows of A, packing rows of W takes longer than inner products with W in its place (measured).
    fn few_rows() -> usize {
        match Self::WHOLE_TILES {
            true if Self::PLANES > 1 => 0,
            true => 8,
            false if Self::MANY_REGISTERS && halves_registers() => 96,
            false => 24,
        }
    }

    /// Whether registers of sums can be written as `update` does.
    fn ends_in(update: TileUpdate) -> bool {
        match update {
            TileUpdate::StreamBf16 => Self::PAIRS,
            TileUpdate::StreamF16 => Self::V::CONVERTS_F16,
            _ => true,
        }
    }

    /// `C[rows, COLS] (+)= A[rows, units] B[units, COLS]`.
    ///
    /// # Safety
    /// As `call`; see `Tile` for the operands.
    #[inline(always)]
    unsafe fn tile(tile: Tile<'_, Self::Acc>) {
        // SAFETY: as promised by the caller.
        unsafe { Self::call(tile) }
    }

    /// Prepares this thread for `tile`.
    fn begin() {}
    /// Ends what `begin` began.
    fn end() {}
}

/// Operands of one tile product.
pub struct Tile<'a, F> {
    /// Rows of A, each contiguous.
    pub a: *const F,
    /// Units from one row of A to the next.
    pub a_stride: usize,
    /// At most `Machine::ROWS`.
    pub rows: usize,
    /// Columns that are wanted, if fewer than a panel has; sums of the others may not be written.
    pub cols: usize,
    /// Panel of B: `[units][COLS]`.
    pub b: *const F,
    /// Length of the contraction in units; zeros follow up to the next multiple of `BLOCK`.
    pub units: usize,
    /// Where the sums go.
    pub c: *mut F,
    /// Numbers from one row of C to the next.
    pub c_stride: usize,
    /// What becomes of C.
    pub update: TileUpdate,
    /// Memory that will be wanted soon.
    pub ahead: &'a mut Prefetch,
}

/// What a tile does with its sums.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum TileUpdate {
    /// Writes them.
    Write,
    /// Adds them to what is there.
    Add,
    /// Writes them past the caches, see `Vector::store_past_caches`.
    Stream,
    /// Writes them past the caches as bf16, of which C is then made; where `Machine::ends_in` it.
    StreamBf16,
    /// The same as IEEE half.
    StreamF16,
}

/// Packed operands are padded with zeros to a multiple of this many units along the contraction.
pub const BLOCK: usize = 16;

impl<M: Machine> Op<M> for Tile<'_, M::Acc> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(self) {
        macro_rules! rows {
            ($($n:literal)*) => {
                match self.rows {
                    // SAFETY: as promised by the caller of `tile`.
                    $($n if $n <= M::ROWS => unsafe { fma_tile::<M, $n>(self) },)*
                    n => unreachable!("{n} rows in a tile of {}", M::ROWS),
                }
            };
        }
        rows!(1 2 3 4 5 6 7 8 9 10 11 12)
    }
}

/// `sum + a b` over units.
///
/// # Safety
/// Reached only from code compiled for the machine.
#[inline(always)]
pub unsafe fn multiply_add<M: Machine>(sum: M::V, a: M::V, b: M::V) -> M::V {
    // SAFETY: as promised by the caller.
    unsafe { if M::PAIRS { sum.dot_pairs(a, b) } else { sum.fma(a, b) } }
}

#[inline(always)]
unsafe fn fma_tile<M: Machine, const R: usize>(t: Tile<'_, M::Acc>) {
    // SAFETY: as promised by the caller of `tile`.
    unsafe {
        match M::ACROSS {
            1 => fma_tile_across::<M, R, 1>(t),
            2 => fma_tile_across::<M, R, 2>(t),
            _ => fma_tile_across::<M, R, 4>(t),
        }
    }
}

/// Units between two steps of the pointers; divides `BLOCK`.
const UNROLL: usize = 4;

/// Keeps all sums in registers; each block of the contraction starts at zero, which keeps rounding small.
#[inline(always)]
unsafe fn fma_tile_across<M: Machine, const R: usize, const N: usize>(t: Tile<'_, M::Acc>) {
    // SAFETY: as promised by the caller of `tile`: R rows of A, a panel of B, R rows of C.
    unsafe {
        let mut sums = [[M::V::zero(); N]; R];
        let mut a = RowPointers::new(t.a, t.a_stride, R);
        let mut b = t.b;
        for _ in 0..t.units / BLOCK {
            t.ahead.step();
            for _ in 0..BLOCK / UNROLL {
                for k in 0..UNROLL {
                    add_unit::<M, R, N>(&a, b, k, &mut sums);
                }
                a.advance(UNROLL);
                b = b.wrapping_add(UNROLL * M::COLS);
            }
        }
        for k in 0..t.units % BLOCK {
            add_unit::<M, R, N>(&a, b, k, &mut sums);
        }
        let at = |r: usize, n: usize| r * t.c_stride + n * M::V::LANES;
        // Chosen outside the loops, which the compiler unrolls then: sums that it indexes would live on the stack.
        match t.update {
            TileUpdate::Write => {
                for r in 0..R {
                    for n in 0..N {
                        sums[r][n].store(t.c.add(at(r, n)));
                    }
                }
            }
            TileUpdate::Add => {
                for r in 0..R {
                    for n in 0..N {
                        let c = t.c.add(at(r, n));
                        M::V::load(c).add(sums[r][n]).store(c);
                    }
                }
            }
            TileUpdate::Stream => {
                for r in 0..R {
                    for n in 0..N {
                        sums[r][n].store_past_caches(t.c.add(at(r, n)));
                    }
                }
            }
            TileUpdate::StreamBf16 => {
                for r in 0..R {
                    for n in (0..N - N % 2).step_by(2) {
                        let c = t.c.cast::<bf16>().add(at(r, n));
                        M::V::round_to_bf16([sums[r][n], sums[r][n + 1]]).store_past_caches(c.cast());
                    }
                }
            }
            TileUpdate::StreamF16 => {
                for r in 0..R {
                    for n in (0..N - N % 2).step_by(2) {
                        let c = t.c.cast::<f16>().add(at(r, n));
                        M::V::round_to_f16([sums[r][n], sums[r][n + 1]]).store_past_caches(c.cast());
                    }
                }
            }
        }
    }
}

/// One unit of the contraction.
#[inline(always)]
unsafe fn add_unit<M: Machine, const R: usize, const N: usize>(
    a: &RowPointers<M::Acc>,
    b: *const M::Acc,
    k: usize,
    sums: &mut [[M::V; N]; R],
) {
    // SAFETY: as promised by the caller of `tile`.
    unsafe {
        let mut panel = [M::V::zero(); N];
        for n in 0..N {
            panel[n] = M::V::load(b.add((k * N + n) * M::V::LANES));
        }
        for r in 0..R {
            let a = M::V::splat(a.at(r, k));
            for n in 0..N {
                sums[r][n] = multiply_add::<M>(sums[r][n], a, panel[n]);
            }
        }
    }
}

macro_rules! machine {
    ($(#[$doc:meta])* $name:ident, $acc:ty, $cell:ty, $vector:ty, $rows:literal x $across:literal, $pairs:literal, $($feature:literal)?) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub struct $name;
        impl Machine for $name {
            type Acc = $acc;
            type Cell = $cell;
            type V = $vector;
            type Few = Self;
            const PAIRS: bool = $pairs;
            const ROWS: usize = $rows;
            const ACROSS: usize = $across;
            unsafe fn call<O: Op<Self>>(op: O) -> O::Out {
                $(#[target_feature(enable = $feature)])?
                unsafe fn inside<O: Op<$name>>(op: O) -> O::Out {
                    // SAFETY: this function is compiled for the machine's instruction set.
                    unsafe { op.run() }
                }
                // SAFETY: the caller has the instruction set.
                unsafe { inside(op) }
            }
        }
    };
}

machine!(
    /// f32 on any machine.
    Portable, f32, f32, Array<f32, 4>, 4 x 2, false,
);
machine!(
    /// f64 on any machine.
    Portable64, f64, f64, Array<f64, 4>, 4 x 1, false,
);
#[cfg(target_arch = "aarch64")]
machine!(
    /// f32 on NEON.
    Neon, f32, f32, crate::simd::F32x4, 6 x 4, false,
);
#[cfg(target_arch = "x86_64")]
machine!(
    /// f64 on AVX2, in vectors that the compiler makes.
    Avx2Double, f64, f64, Array<f64, 4>, 4 x 2, false, "avx2,fma,f16c"
);
#[cfg(target_arch = "x86_64")]
machine!(
    /// f32 on AVX2 with FMA.
    Avx2, f32, f32, crate::simd::F32x8, 6 x 2, false, "avx2,fma,f16c"
);
#[cfg(target_arch = "x86_64")]
machine!(
    /// f32 on AVX-512.
    Avx512, f32, f32, crate::simd::F32x16, 12 x 2, false, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
);
#[cfg(target_arch = "x86_64")]
machine!(
    /// bf16 by AVX-512 dot products.
    Avx512Pairs, f32, bf16, crate::simd::F32x16, 12 x 2, true,
    "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
);
