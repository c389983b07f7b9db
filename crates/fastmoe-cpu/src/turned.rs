//! Products with the roles of their operands exchanged: tiles take rows of W where they lie, and rows of A are packed.
//!
//! That saves packing the many rows of W, and tiles are multiplied while the next ones are on their way from memory. Sums
//! come out transposed, and are the same to the bit.

use crate::dtype::Element;
use crate::gemm::{Factor, Product, padded_cols};
use crate::machine::{BLOCK, Machine, Tile, TileUpdate};
use crate::memory::Scratch;
use crate::pack::{Rows, pack_panels_nk, units};
use crate::prefetch::Prefetch;
use crate::simd::Vector;

/// With more rows it takes less time to pack W, for tiles whose operands then stay in the first cache (measured); the chunks
/// of an expert that has far more than the others are of as many.
const MOST_ROWS: usize = 192;

/// Whether products of `rows` rows are better turned.
pub fn pays<M: Machine>(rows: usize) -> bool {
    M::WHOLE_TILES && M::PLANES == 1 && rows <= MOST_ROWS
}

impl<M: Machine, E: Element<Acc = M::Acc>> Product<'_, M, E> {
    /// Whether W has whole tiles where it lies, and few enough rows meet it.
    #[inline(always)]
    pub fn is_turned(&self) -> bool {
        pays::<M>(self.rows)
            && self.parts[0].is_nk()
            && self.inner > 0
            && self.inner.is_multiple_of(BLOCK * M::UNIT)
            && self.cols.is_multiple_of(M::ROWS)
    }

    /// Computes C where `is_turned`.
    ///
    /// # Safety
    /// As `compute`.
    #[inline(always)]
    pub unsafe fn turned(&self) {
        let units = units::<M>(self.inner);
        let panels = self.rows.div_ceil(M::COLS);
        // A single panel needs no block of W again: its sums stay in registers.
        let depth = if panels == 1 { units } else { M::DEPTH };
        let packed = Scratch::<M::Acc>::new(panels * units * M::COLS);
        let sums = Scratch::<M::Acc>::new(panels * M::COLS * M::ROWS);
        let mut nothing = Prefetch::NONE;
        let mut room = self.parts[0].room::<M>(self.inner, M::ROWS);
        // Units of A are pairs of numbers as they are stored.
        let a = Rows::dense(self.a.cast::<E>(), self.a_stride * M::UNIT);
        // SAFETY: as promised by the caller; there is room for the panels.
        unsafe { pack_panels_nk::<M, E>(&a, self.inner, self.rows, packed.ptr()) };
        for (p, part) in self.parts.iter().enumerate() {
            for n in (0..self.cols).step_by(M::ROWS) {
                // SAFETY: as promised by the caller: B has these columns, and C memory for whole tiles of rows.
                unsafe {
                    let Factor::Nk(w) = part.column(n).plain(self.inner, M::ROWS, &mut room) else {
                        unreachable!("the parts of B lie alike")
                    };
                    for k in (0..units).step_by(depth) {
                        for panel in 0..panels {
                            M::tile(Tile {
                                a: w.start.cast::<M::Acc>().add(k),
                                a_stride: w.stride / M::UNIT,
                                rows: M::ROWS,
                                cols: self.rows - panel * M::COLS,
                                b: packed.ptr().add((panel * units + k) * M::COLS),
                                units: depth.min(units - k),
                                c: sums.ptr().add(panel * M::COLS * M::ROWS),
                                c_stride: M::COLS,
                                update: if k > 0 { TileUpdate::Add } else { TileUpdate::Write },
                                ahead: &mut nothing,
                            });
                        }
                    }
                    let c = self.c.add(p * padded_cols::<M>(self.cols) + n);
                    for panel in 0..panels {
                        let sums = sums.ptr().add(panel * M::COLS * M::ROWS);
                        turn::<M>(sums, c.add(panel * M::COLS * self.c_stride()), self.c_stride());
                    }
                }
            }
        }
    }
}

/// `C[COLS, ROWS]` from its transpose.
#[inline(always)]
unsafe fn turn<M: Machine>(sums: *const M::Acc, c: *mut M::Acc, c_stride: usize) {
    let lanes = M::V::LANES;
    for r in (0..M::COLS).step_by(lanes) {
        for n in (0..M::ROWS).step_by(lanes) {
            // SAFETY: as promised by the caller.
            unsafe {
                let mut block = [M::V::zero(); 16];
                for i in 0..lanes {
                    block[i] = M::V::load(sums.add((n + i) * M::COLS + r));
                }
                M::V::transpose(&mut block[..lanes]);
                for i in 0..lanes {
                    block[i].store(c.add((r + i) * c_stride + n));
                }
            }
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::MOST_ROWS;
    use crate::amx::Amx;
    use crate::grouped::grouped;
    use crate::isa::Isa;
    use crate::problem::GroupedMm;
    use crate::{DType, Threads};
    use half::bf16;

    /// Rows times a weight, once all together and once a few at a time, each time by an expert with that weight.
    #[test]
    fn turned_products_are_the_same_to_the_bit() {
        if !Isa::available().contains(&Isa::Amx) {
            return;
        }
        const ROWS: usize = 2 * MOST_ROWS + 1;
        let numbers = |n: usize| (0..n).map(|i| bf16::from_f64((i as f64).sin() * (i % 7) as f64));
        for (inner, outer) in [(32, 32), (288, 96), (1120, 64)] {
            let x: Vec<bf16> = numbers(ROWS * inner).collect();
            let w: Vec<bf16> = numbers(outer * inner).collect();
            let product = |offsets: &[i32]| {
                let weights = w.repeat(offsets.len() - 1);
                let mut out = vec![bf16::NAN; ROWS * outer];
                let (dtype, threads) = (DType::Bf16, Threads::new(2));
                let p = GroupedMm { dtype, inner, outer, rows: ROWS, offsets, transposed: false, threads };
                // SAFETY: the machine is there; the vectors have the sizes of `p`.
                unsafe {
                    let (x, w) = (x.as_ptr().cast(), weights.as_ptr().cast());
                    grouped::<Amx<1>, bf16>(&p, x, w, None, out.as_mut_ptr().cast());
                }
                out.iter().map(|x| x.to_bits()).collect::<Vec<u16>>()
            };
            let end = ROWS as i32;
            assert!(
                product(&[0, end]) == product(&[0, 9, 25, 58, 121, 200, 210, 350, end]),
                "{inner} {outer}"
            );
        }
    }
}
