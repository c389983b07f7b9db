//! Rows between token order and expert order, and sums over them: the launches of `combine.cu`, `permute.cu`,
//! `grad_score.cu` and `grad_bias.cu`, whose parameter structs are mirrored here.

use crate::limits;
use crate::{Buffer, DType, Gpu, Queue, Result, scratch_size};

/// Warps of a block of these kernels.
const WARPS: usize = 4;

/// Blocks of a multiprocessor that these kernels are compiled for, and those that sum gradients of biases.
pub(crate) const RESIDENT: usize = 8;
const RESIDENT_BIAS: usize = 7;

/// Blocks for so many pieces of work of a warp: one for each, or as many as are resident, since those of a second wave would
/// have the device for themselves.
pub(crate) fn blocks(gpu: &Gpu, resident: usize, warps: usize) -> usize {
    warps.div_ceil(WARPS).min(resident * gpu.device.multiprocessors as usize)
}

/// Pieces of a row that one warp covers at once.
fn parts(dtype: DType, columns: usize) -> usize {
    columns.div_ceil(if (columns * dtype.bytes()).is_multiple_of(16) { 32 * 16 / dtype.bytes() } else { 32 })
}

/// `out[t] = sum_k weights[t,k] y[inverse[t,k]]`; -1 adds nothing.
#[derive(Clone, Copy)]
pub struct Combine {
    /// Of `y` and `out`.
    pub dtype: DType,
    /// T.
    pub tokens: usize,
    /// K.
    pub top_k: usize,
    /// N.
    pub rows: usize,
    /// H.
    pub columns: usize,
    /// `[N, H]` sorted rows.
    pub y: Buffer,
    /// `[T, K]`.
    pub inverse: Buffer,
    /// `[T, K]`, or null for ones.
    pub weights: Buffer,
    /// `[T, H]`.
    pub out: Buffer,
}

impl Combine {
    /// # Safety
    /// The buffers have these sizes and stay until the kernel has run.
    pub unsafe fn launch(&self, queue: &Queue<'_>) -> Result<()> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Params {
            y: u64,
            inverse: u64,
            weights: u64,
            out: u64,
            tokens: i32,
            top_k: i32,
            rows: i32,
            columns: i32,
        }
        let Self { dtype, tokens, top_k, rows, columns, y, inverse, weights, out } = *self;
        let params = Params {
            y: y.address,
            inverse: inverse.address,
            weights: weights.address,
            out: out.address,
            tokens: limits::rows("T (tokens)", tokens)?,
            top_k: limits::rows("K (experts per token)", top_k)?,
            rows: limits::rows("sorted rows", rows)?,
            columns: limits::columns("H (hidden size)", columns)?,
        };
        let memory = [y.read(), inverse.read(), weights.read(), out.write()];
        let blocks = blocks(queue.gpu, RESIDENT, tokens * parts(dtype, columns));
        // SAFETY: this is the kernel's struct, and as promised by the caller.
        unsafe { queue.launch(&["combine", dtype.suffix()], blocks, &params, &memory) }
    }
}

/// `out[r] = x[gather[r]]`, zeros where -1.
#[derive(Clone, Copy)]
pub struct Permute {
    /// Of `x` and `out`.
    pub dtype: DType,
    /// T.
    pub tokens: usize,
    /// N.
    pub rows: usize,
    /// H.
    pub columns: usize,
    /// `[T, H]`.
    pub x: Buffer,
    /// `[N]`.
    pub gather: Buffer,
    /// `[N, H]`.
    pub out: Buffer,
}

impl Permute {
    /// # Safety
    /// The buffers have these sizes and stay until the kernel has run.
    pub unsafe fn launch(&self, queue: &Queue<'_>) -> Result<()> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Params {
            x: u64,
            gather: u64,
            out: u64,
            tokens: i32,
            rows: i32,
            columns: i32,
        }
        let Self { dtype, tokens, rows, columns, x, gather, out } = *self;
        let params = Params {
            x: x.address,
            gather: gather.address,
            out: out.address,
            tokens: limits::rows("T (tokens)", tokens)?,
            rows: limits::rows("sorted rows", rows)?,
            columns: limits::columns("H (hidden size)", columns)?,
        };
        let memory = [x.read(), gather.read(), out.write()];
        let blocks = blocks(queue.gpu, RESIDENT, rows * parts(dtype, columns));
        // SAFETY: this is the kernel's struct, and as promised by the caller.
        unsafe { queue.launch(&["permute", dtype.suffix()], blocks, &params, &memory) }
    }
}

/// `sorted[inverse[t,k]] = weights[t,k]`, 0 in unused rows.
#[derive(Clone, Copy)]
pub(crate) struct SortWeights {
    /// T*K.
    pub slots: usize,
    /// N.
    pub rows: usize,
    /// `[T, K]`.
    pub weights: Buffer,
    /// `[N]`.
    pub gather: Buffer,
    /// `[T, K]`.
    pub inverse: Buffer,
    /// `[N]`.
    pub sorted: Buffer,
}

impl SortWeights {
    /// # Safety
    /// As [`Permute::launch`].
    pub unsafe fn launch(&self, queue: &Queue<'_>) -> Result<()> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Params {
            weights: u64,
            gather: u64,
            inverse: u64,
            sorted: u64,
            slots: i32,
            rows: i32,
        }
        let Self { slots, rows, weights, gather, inverse, sorted } = *self;
        let params = Params {
            weights: weights.address,
            gather: gather.address,
            inverse: inverse.address,
            sorted: sorted.address,
            slots: limits::rows("T*K (routed rows)", slots)?,
            rows: limits::rows("sorted rows", rows)?,
        };
        let memory = [weights.read(), gather.read(), inverse.read(), sorted.write()];
        let blocks = blocks(queue.gpu, RESIDENT, slots.max(rows).div_ceil(32));
        // SAFETY: this is the kernel's struct, and as promised by the caller.
        unsafe { queue.launch(&["sort_weights"], blocks, &params, &memory) }
    }
}

/// The gradients of [`Combine`]: `grad_y[inverse[t,k]] = weights[t,k] grad_out[t]`, zeros in unused rows, and
/// `grad_weights[t,k] = <grad_out[t], y[inverse[t,k]]>`, 0 where dropped.
#[derive(Clone, Copy)]
pub struct UnpermuteGrad {
    /// Of the rows.
    pub dtype: DType,
    /// T.
    pub tokens: usize,
    /// K.
    pub top_k: usize,
    /// N.
    pub rows: usize,
    /// H.
    pub columns: usize,
    /// `[T, H]`.
    pub grad_out: Buffer,
    /// `[N, H]`.
    pub y: Buffer,
    /// `[N]`.
    pub gather: Buffer,
    /// `[T, K]`.
    pub inverse: Buffer,
    /// `[T, K]`, or null for ones.
    pub weights: Buffer,
    /// `[N, H]`, or null where not wanted.
    pub grad_y: Buffer,
    /// `[T, K]`, or null where not wanted.
    pub grad_weights: Buffer,
}

impl UnpermuteGrad {
    /// # Safety
    /// The buffers have these sizes and stay until the kernel has run; no two slots of `inverse` name one row.
    pub unsafe fn launch(&self, queue: &Queue<'_>) -> Result<()> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Params {
            grad_out: u64,
            y: u64,
            gather: u64,
            inverse: u64,
            weights: u64,
            grad_y: u64,
            grad_weights: u64,
            tokens: i32,
            top_k: i32,
            rows: i32,
            columns: i32,
        }
        let params = Params {
            grad_out: self.grad_out.address,
            y: self.y.address,
            gather: self.gather.address,
            inverse: self.inverse.address,
            weights: self.weights.address,
            grad_y: self.grad_y.address,
            grad_weights: self.grad_weights.address,
            tokens: limits::rows("T (tokens)", self.tokens)?,
            top_k: limits::rows("K (experts per token)", self.top_k)?,
            rows: limits::rows("sorted rows", self.rows)?,
            columns: limits::columns("H (hidden size)", self.columns)?,
        };
        let memory = [
            self.grad_out.read(),
            self.y.read(),
            self.gather.read(),
            self.inverse.read(),
            self.weights.read(),
            self.grad_y.write(),
            self.grad_weights.write(),
        ];
        let blocks = blocks(queue.gpu, RESIDENT, (self.tokens * self.top_k).max(self.rows));
        // SAFETY: this is the kernel's struct, and as promised by the caller.
        unsafe { queue.launch(&["unpermute_grad", self.dtype.suffix()], blocks, &params, &memory) }
    }
}

/// `grad_weights[t,k] = sum_i partial[inverse[t,k], i] + <grad_out[t], b2[e]>`, 0 where dropped.
#[derive(Clone, Copy)]
pub(crate) struct GradScore {
    /// Of the rows.
    pub dtype: DType,
    /// T.
    pub tokens: usize,
    /// K.
    pub top_k: usize,
    /// N.
    pub rows: usize,
    /// E.
    pub experts: usize,
    /// H.
    pub columns: usize,
    /// Columns of `partial`.
    pub tiles: usize,
    /// `[N, tiles]`.
    pub partial: Buffer,
    /// `[T, K]`.
    pub inverse: Buffer,
    /// `[T, H]`.
    pub grad_out: Buffer,
    /// `[E, H]` or null.
    pub b2: Buffer,
    /// `[E + 1]`.
    pub offsets: Buffer,
    /// `[T, K]`.
    pub grad_weights: Buffer,
}

impl GradScore {
    /// # Safety
    /// As [`UnpermuteGrad::launch`].
    pub unsafe fn launch(&self, queue: &Queue<'_>) -> Result<()> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Params {
            partial: u64,
            inverse: u64,
            grad_out: u64,
            b2: u64,
            offsets: u64,
            grad_weights: u64,
            tokens: i32,
            top_k: i32,
            rows: i32,
            experts: i32,
            columns: i32,
            tiles: i32,
        }
        let params = Params {
            partial: self.partial.address,
            inverse: self.inverse.address,
            grad_out: self.grad_out.address,
            b2: self.b2.address,
            offsets: self.offsets.address,
            grad_weights: self.grad_weights.address,
            tokens: limits::rows("T (tokens)", self.tokens)?,
            top_k: limits::rows("K (experts per token)", self.top_k)?,
            rows: limits::rows("sorted rows", self.rows)?,
            experts: limits::rows("E (experts)", self.experts)?,
            columns: limits::columns("H (hidden size)", self.columns)?,
            tiles: limits::columns("tiles of a row", self.tiles)?,
        };
        let memory = [
            self.partial.read(),
            self.inverse.read(),
            self.grad_out.read(),
            self.b2.read(),
            self.offsets.read(),
            self.grad_weights.write(),
        ];
        let slots = self.tokens * self.top_k;
        let warps = if self.b2.is_null() { slots.div_ceil(32) } else { slots };
        // SAFETY: this is the kernel's struct, and as promised by the caller.
        unsafe {
            queue.launch(
                &["grad_score", self.dtype.suffix()],
                blocks(queue.gpu, RESIDENT, warps),
                &params,
                &memory,
            )
        }
    }
}

/// `out[e] = sum of scale[r] rows[gather[r]]` over the sorted rows r of expert e.
#[derive(Clone, Copy)]
pub struct GradBias {
    /// Of the rows.
    pub dtype: DType,
    /// E.
    pub experts: usize,
    /// C.
    pub columns: usize,
    /// N.
    pub sorted: usize,
    /// Rows of `rows`.
    pub sources: usize,
    /// `[N, C]`, or `[T, C]` with `gather`.
    pub rows: Buffer,
    /// `[N]`, or null for the row itself.
    pub gather: Buffer,
    /// `[N]`, or null for ones.
    pub scale: Buffer,
    /// `[E + 1]`.
    pub offsets: Buffer,
    /// `[E, C]`.
    pub out: Buffer,
}

impl GradBias {
    /// Into how many parts an expert's rows are split, so that few experts with many rows keep the device busy.
    fn splits(sorted: usize, experts: usize) -> usize {
        (sorted / experts.max(1) / 256).clamp(1, 64)
    }

    /// Bytes of scratch memory.
    pub fn scratch(sorted: usize, experts: usize, columns: usize) -> usize {
        match Self::splits(sorted, experts) {
            1 => 0,
            splits => scratch_size(4 * splits * experts * columns),
        }
    }

    /// # Safety
    /// As [`UnpermuteGrad::launch`].
    pub unsafe fn launch(&self, queue: &mut Queue<'_>) -> Result<()> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Params {
            rows: u64,
            gather: u64,
            scale: u64,
            offsets: u64,
            partial: u64,
            out: u64,
            experts: i32,
            sorted: i32,
            sources: i32,
            columns: i32,
            splits: i32,
        }
        let splits = Self::splits(self.sorted, self.experts);
        let partial = match splits {
            1 => Buffer::default(),
            _ => queue.take("partial", 4 * splits * self.experts * self.columns),
        };
        let params = Params {
            rows: self.rows.address,
            gather: self.gather.address,
            scale: self.scale.address,
            offsets: self.offsets.address,
            partial: partial.address,
            out: self.out.address,
            experts: limits::rows("E (experts)", self.experts)?,
            sorted: limits::rows("sorted rows", self.sorted)?,
            sources: limits::rows("rows of the source", self.sources)?,
            columns: limits::columns("H (hidden size)", self.columns)?,
            splits: splits as i32,
        };
        let suffix = self.dtype.suffix();
        let inputs = [self.rows.read(), self.gather.read(), self.scale.read(), self.offsets.read()];
        let [rows, gather, scale, offsets] = inputs;
        let output = if splits == 1 { self.out } else { partial };
        let memory = [rows, gather, scale, offsets, output.write()];
        let warps = self.experts * splits * parts(self.dtype, self.columns);
        // SAFETY: this is the struct of both kernels, and as promised by the caller.
        unsafe {
            let part = blocks(queue.gpu, RESIDENT_BIAS, warps);
            queue.launch(&["grad_bias", suffix], part, &params, &memory)?;
            if splits > 1 {
                let sum = blocks(queue.gpu, RESIDENT, (self.experts * self.columns).div_ceil(32));
                let memory = [partial.read(), self.out.write()];
                queue.launch(&["grad_bias_sum", suffix], sum, &params, &memory)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiles::tests::{by_registers, compiled};

    #[test]
    fn multiprocessors_hold_the_blocks_that_grids_count_on() {
        let families =
            ["combine_", "grad_bias_", "grad_route_", "grad_score_", "permute_", "route_", "sort_weights"];
        for kernel in compiled().filter(|kernel| families.iter().any(|family| kernel.name.contains(family))) {
            assert_eq!(kernel.threads as usize, 32 * WARPS, "{}", kernel.name);
            let of_bias = kernel.name.starts_with("grad_bias_") && !kernel.name.contains("sum");
            let resident = if of_bias { RESIDENT_BIAS } else { RESIDENT };
            assert!(resident <= by_registers(kernel), "{}", kernel.name);
            let shared = if kernel.name.starts_with("route_") { crate::route::SHARED } else { 0 };
            assert_eq!(kernel.shared_bytes, shared, "{}", kernel.name);
        }
    }
}
