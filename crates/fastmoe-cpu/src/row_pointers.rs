//! Addresses of the rows of a tile, such that no instruction of its inner loop computes any.

use std::hint::black_box;

/// Rows to a pointer: as many as addressing modes reach from one.
const ROWS_TO_POINTER: usize = 3;

/// Where the rows of a tile of A begin.
#[derive(Clone, Copy)]
pub struct RowPointers<F> {
    every_third: [*const F; 4],
    stride: usize,
}

impl<F> RowPointers<F> {
    /// `rows` rows, at most 12, `stride` numbers apart.
    #[inline(always)]
    pub fn new(start: *const F, stride: usize, rows: usize) -> Self {
        let mut every_third = [start; 4];
        for i in 1..rows.div_ceil(ROWS_TO_POINTER) {
            // The compiler would go back to a single pointer if it knew how they lie.
            every_third[i] = black_box(start.wrapping_add(i * ROWS_TO_POINTER * stride));
        }
        Self { every_third, stride }
    }

    /// Number `k` of row `r`.
    #[inline(always)]
    pub fn at(&self, r: usize, k: usize) -> *const F {
        self.every_third[r / ROWS_TO_POINTER].wrapping_add(r % ROWS_TO_POINTER * self.stride + k)
    }

    /// Moves all rows on by `n` numbers.
    #[inline(always)]
    pub fn advance(&mut self, n: usize) {
        for p in &mut self.every_third {
            *p = p.wrapping_add(n);
        }
    }
}
