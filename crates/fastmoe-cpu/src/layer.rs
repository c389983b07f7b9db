//! What forward and backward share: the typed view of an expert MLP, its experts at work, packed rows.

use crate::dtype::Element;
use crate::gemm::Factor;
use crate::machine::{Machine, Op};
use crate::math::Real;
use crate::memory::Scratch;
use crate::pack::{Rows, pack_numbers, pack_row, pad_row, row_stride};
use crate::problem::{Mlp, Ptr, Weight};
use crate::quantized::Quantized;
use crate::threads::Threads;
use crate::turned;
use std::ops::Range;

/// Fewest and most columns of a product that a task computes at a time.
pub const BLOCK_COLS: usize = 128;
pub const WIDE_COLS: usize = 512;
/// Weights times rows of a product that take less time than other threads to wake up.
const ALONE: usize = 1 << 14;
/// Sums of a task, so that they stay in the cache.
const CHUNK_SUMS: usize = 128 << 10;

/// Columns of a task: wide where the rows of B run along them, for only then is its memory read in long runs, and where
/// the rows of A are packed for every task; narrow where that leaves threads without work.
pub fn block_cols<M: Machine, E: Element>(
    factor: Factor<'_, E>,
    cols: usize,
    work: &[Work],
    threads: Threads,
) -> usize {
    let enough = |width: &usize| work.len() * cols.div_ceil(*width) >= 4 * threads.0;
    if factor.is_nk() && !mostly_turned::<M>(work) {
        return BLOCK_COLS;
    }
    [WIDE_COLS, 2 * BLOCK_COLS].into_iter().find(enough).unwrap_or(BLOCK_COLS)
}

/// An expert that has rows, and which.
#[derive(Clone)]
pub struct Work {
    pub expert: usize,
    pub rows: Range<usize>,
}

impl Work {
    /// Whether `Machine::Few` multiplies them.
    pub fn is_few<M: Machine>(&self) -> bool {
        self.rows.len() < M::ROWS_TO_SPLIT
    }

    /// The rows in chunks whose sums over `cols` columns stay in the cache.
    pub fn chunks<M: Machine>(&self, cols: usize) -> impl Iterator<Item = Range<usize>> {
        let (end, at_once) = (self.rows.end, chunk_rows::<M>(cols));
        self.rows.clone().step_by(at_once).map(move |start| start..end.min(start + at_once))
    }

    /// Rows of the largest chunk.
    pub fn longest_chunk<M: Machine>(&self, cols: usize) -> usize {
        self.rows.len().min(chunk_rows::<M>(cols))
    }
}

/// A multiple of every machine's tile rows.
fn chunk_rows<M: Machine>(cols: usize) -> usize {
    // Splitting a weight into planes takes long: fewer chunks, each of which does it again.
    let most = if M::PLANES > 1 { 2 * CHUNK_SUMS } else { CHUNK_SUMS };
    (most / cols.max(1)).max(1).next_multiple_of(96)
}

/// The experts with rows, in order.
pub fn work(offsets: &[i32]) -> Vec<Work> {
    let ranges = offsets.windows(2).map(|o| o[0] as usize..o[1] as usize).enumerate();
    ranges.filter(|(_, rows)| !rows.is_empty()).map(|(expert, rows)| Work { expert, rows }).collect()
}

/// Whether products of as many rows as an expert has on average are turned.
pub fn mostly_turned<M: Machine>(work: &[Work]) -> bool {
    let rows = work.last().map_or(0, |last| last.rows.end);
    turned::pays::<M>(rows / work.len().max(1))
}

/// Sorted rows packed as A.
pub struct PackedRows<F: Real> {
    data: Scratch<F>,
    cols: usize,
    /// Units from one row to the next.
    pub stride: usize,
}

impl<F: Real> PackedRows<F> {
    /// Room for `rows` rows of `cols` numbers, and for the rows that whole tiles read beyond the last.
    pub fn new<M: Machine<Acc = F>>(rows: usize, cols: usize) -> Self {
        let stride = row_stride::<M>(cols);
        Self { data: Scratch::new((rows + M::ROWS) * stride), cols, stride }
    }

    /// Packs rows of a tensor, those of each expert for the machine that multiplies them.
    ///
    /// # Safety
    /// The machine has the instruction set; `src` is valid for `rows x cols` numbers.
    pub unsafe fn pack<M: Machine<Acc = F>, E: Element<Acc = F>>(
        src: Rows<'_, E>,
        rows: usize,
        cols: usize,
        work: &[Work],
        threads: Threads,
    ) -> Self {
        const AT_ONCE: usize = 32;
        let packed = Self::new::<M>(rows, cols);
        let job = PackJob { src, cols, work, packed: &packed };
        threads.for_each(rows.div_ceil(AT_ONCE), |i| {
            let rows = i * AT_ONCE..rows.min((i + 1) * AT_ONCE);
            // SAFETY: as promised by the caller; each task writes its own rows.
            unsafe { M::call(PackSome { job: &job, rows }) }
        });
        packed
    }

    /// Writes numbers of row `r` from column `from` on, after the last one the padding too.
    ///
    /// # Safety
    /// Reached only from code compiled for the machine; nothing else uses these columns of the row.
    #[inline(always)]
    pub unsafe fn write<M: Machine<Acc = F>>(&self, r: usize, from: usize, numbers: &[F]) {
        // SAFETY: as promised by the caller.
        unsafe {
            pack_numbers::<M>(numbers, self.row(r), from);
            if from + numbers.len() == self.cols {
                pad_row::<M>(self.cols, self.row(r));
            }
        }
    }

    /// Row `r`.
    #[inline(always)]
    pub fn row(&self, r: usize) -> *mut F {
        self.data.ptr().wrapping_add(r * self.stride)
    }
}

struct PackJob<'a, F: Real, E> {
    src: Rows<'a, E>,
    cols: usize,
    work: &'a [Work],
    packed: &'a PackedRows<F>,
}

// SAFETY: tasks read the source and write disjoint rows.
unsafe impl<F: Real, E> Sync for PackJob<'_, F, E> {}

struct PackSome<'a, F: Real, E> {
    job: &'a PackJob<'a, F, E>,
    rows: Range<usize>,
}

impl<M: Machine, E: Element<Acc = M::Acc>> Op<M> for PackSome<'_, M::Acc, E> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(self) {
        let PackJob { src, cols, work, packed } = *self.job;
        for r in self.rows {
            let few = M::PLANES > 1
                && work.get(work.partition_point(|work| work.rows.end <= r)).is_some_and(Work::is_few::<M>);
            // SAFETY: as promised by the caller of `pack`.
            unsafe {
                if few {
                    pack_row::<M::Few, E>(src.row(r), cols, packed.row(r));
                } else {
                    pack_row::<M, E>(src.row(r), cols, packed.row(r));
                }
            }
        }
    }
}

/// An expert MLP with its types.
pub struct Layer<'a, M: Machine, E> {
    /// Sizes, flags and plan.
    pub p: &'a Mlp<'a>,
    /// The experts with rows.
    pub work: Vec<Work>,
    /// `[rows]` routing weights in sorted order, 0 in unused rows.
    pub scales: Scratch<M::Acc>,
    /// Worker threads.
    pub threads: Threads,
    /// Hidden units of a task.
    block_cols: usize,
    elements: std::marker::PhantomData<E>,
}

// SAFETY: the pointers inside are read by all tasks and written by none.
unsafe impl<M: Machine, E> Sync for Layer<'_, M, E> {}

/// Some columns of W1 that a task computes: where they start in W1's own order, and how many.
#[derive(Clone, Copy)]
pub struct Part {
    pub start: usize,
    pub len: usize,
}

impl<'a, M: Machine, E: Element<Acc = M::Acc>> Layer<'a, M, E> {
    /// The typed view of `p` for a pass.
    ///
    /// # Safety
    /// The pointers of `p` are valid for its sizes and its plan has been validated.
    pub unsafe fn new(p: &'a Mlp<'a>, backward: bool) -> Self {
        let mut scales = Scratch::zeroed(p.rows.gather.len());
        for (i, &row) in p.rows.inverse.iter().enumerate() {
            if let Ok(row) = usize::try_from(row) {
                // SAFETY: there is a weight for each entry of `inverse`.
                scales[row] = unsafe { *p.weights.cast::<M::Acc>().add(i) };
            }
        }
        let work = work(p.rows.offsets);
        let alone = p.rows.gather.len() * p.hidden * p.intermediate < ALONE;
        let threads = if alone { Threads(1) } else { p.threads };
        let mut layer =
            Self { p, work, scales, threads, block_cols: BLOCK_COLS, elements: std::marker::PhantomData };
        let factor = if backward { layer.w2(0).t() } else { layer.w1(0) };
        layer.block_cols = block_cols::<M, E>(factor, p.intermediate, &layer.work, threads);
        layer
    }

    /// Sorted rows.
    pub fn rows(&self) -> usize {
        self.p.rows.gather.len()
    }

    /// Rows of a tensor `[T, cols]` in sorted order, packed.
    ///
    /// # Safety
    /// `x` is valid for the tokens.
    pub unsafe fn gather(&self, x: Ptr, cols: usize) -> PackedRows<M::Acc> {
        let src = Rows::<E>::gathered(x.cast(), cols, self.p.rows.gather);
        // SAFETY: as promised by the caller; the plan's rows are tokens.
        unsafe { PackedRows::pack::<M, E>(src, self.rows(), cols, &self.work, self.threads) }
    }

    /// Columns of the up projection: 2I where gated.
    pub fn up_cols(&self) -> usize {
        if self.p.activation.gated() { 2 * self.p.intermediate } else { self.p.intermediate }
    }

    /// Blocks of hidden units.
    pub fn blocks(&self) -> usize {
        self.p.intermediate.div_ceil(self.block_cols)
    }

    /// First hidden unit and number of units of a block.
    pub fn block(&self, b: usize) -> (usize, usize) {
        (b * self.block_cols, self.block_cols.min(self.p.intermediate - b * self.block_cols))
    }

    /// Where the gate and up columns of a block lie: one after the other, or alternating in one part.
    pub fn parts(&self, b: usize) -> ([Part; 2], usize) {
        let (start, len) = self.block(b);
        let first = Part { start, len };
        match (self.p.activation.gated(), self.p.interleaved) {
            (true, true) => ([Part { start: 2 * start, len: 2 * len }; 2], 1),
            (true, false) => ([first, Part { start: self.p.intermediate + start, len }], 2),
            (false, _) => ([first; 2], 1),
        }
    }

    /// W1 of an expert as the factor of the up projection, `[H, 2I]`.
    pub fn w1(&self, expert: usize) -> Factor<'a, E> {
        self.weight(self.p.w1, expert, self.p.hidden, self.up_cols())
    }

    /// W2 of an expert as the factor of the down projection, `[I, H]`.
    pub fn w2(&self, expert: usize) -> Factor<'a, E> {
        self.weight(self.p.w2, expert, self.p.intermediate, self.p.hidden)
    }

    fn weight(&self, weight: Weight, expert: usize, inner: usize, cols: usize) -> Factor<'a, E> {
        match weight {
            Weight::Plain(start) => {
                let start = start.cast::<E>().wrapping_add(expert * inner * cols);
                Factor::weight(start, inner, cols, self.p.transposed)
            }
            Weight::Quantized { format, codes, scales } => {
                Factor::QuantizedNk(Quantized::new(format, codes, scales, [expert, cols, inner]))
            }
        }
    }
}

/// Splits a row `g0 u0 g1 u1 ..` into its halves.
#[inline(always)]
pub fn split_pairs<F: Copy>(row: &[F], gate: &mut [F], up: &mut [F]) {
    for ((pair, g), u) in row.chunks_exact(2).zip(gate).zip(up) {
        (*g, *u) = (pair[0], pair[1]);
    }
}
