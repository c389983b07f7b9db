//! Walks the memory that the next block of work will read, a few lines at a time, while this one computes.

use crate::simd::prefetch_l2;

/// Bytes of a cache line.
pub const LINE: usize = 64;

/// A rectangle of memory still to be brought into L2.
pub struct Prefetch {
    row: *const u8,
    stride: usize,
    bytes: usize,
    column: usize,
    rows: usize,
    lines_per_step: usize,
}

impl Prefetch {
    /// Nothing ahead.
    pub const NONE: Self =
        Self { row: std::ptr::null(), stride: 0, bytes: 0, column: 0, rows: 0, lines_per_step: 0 };

    /// `rows` rows of `bytes` bytes, `stride` bytes apart, spread evenly over `steps` steps.
    pub fn new(start: *const u8, rows: usize, bytes: usize, stride: usize, steps: usize) -> Self {
        let lines = rows * bytes.div_ceil(LINE);
        let lines_per_step = lines.div_ceil(steps.max(1));
        Self { row: start, stride, bytes, column: 0, rows, lines_per_step }
    }

    /// Asks for the next few lines.
    #[inline(always)]
    pub fn step(&mut self) {
        let mut lines = self.lines_per_step;
        while lines > 0 && self.rows > 0 {
            let run = lines.min((self.bytes - self.column).div_ceil(LINE));
            for _ in 0..run {
                prefetch_l2(self.row.wrapping_add(self.column));
                self.column += LINE;
            }
            lines -= run;
            if self.column >= self.bytes {
                self.column = 0;
                self.row = self.row.wrapping_add(self.stride);
                self.rows -= 1;
            }
        }
    }
}
