//! The grouped products: the launches of the `sm80_*.cu` and `sm90_*.cu` kernels, whose parameter structs are mirrored here.

use crate::grouped::{
    self, Grouped, Maps, results, rows_across, rows_along_inner, transposed_results, weights,
};
use crate::limits;
use crate::tiles::{Math, aligned, row_clusters, row_tile, weight_clusters, weight_tile};
use crate::{Buffer, Queue, Result};
use fastmoe_core::Update;

/// Units whose slopes the hidden gradient sums into one number.
pub(crate) const SLOPE_UNITS: usize = 32;
/// The sizes of an expert layer.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// What is multiplied.
    pub math: Math,
    /// T.
    pub tokens: usize,
    /// N, the sorted rows.
    pub rows: usize,
    /// H.
    pub hidden: usize,
    /// I.
    pub intermediate: usize,
    /// E.
    pub experts: usize,
    /// The activation's index in the order of the kernels, and whether it is gated.
    pub activation: (i32, bool),
    /// W1 is `[E, H, 2I]` and W2 `[E, I, H]`.
    pub transposed: bool,
    /// Gate and up columns alternate.
    pub interleaved: bool,
}

impl Sizes {
    /// Columns of the up projection.
    pub fn up(&self) -> usize {
        if self.activation.1 { 2 * self.intermediate } else { self.intermediate }
    }

    /// Whether these are gate columns, then up columns.
    fn halves(&self) -> bool {
        self.activation.1 && !self.interleaved
    }
}

/// `hidden[r] = x[gather[r]] W1^T + b1`, `act[r] = activation(hidden[r])`.
#[derive(Clone, Copy)]
pub(crate) struct Up {
    pub sizes: Sizes,
    pub x: Buffer,
    pub gather: Buffer,
    pub offsets: Buffer,
    pub w1: Buffer,
    pub b1: Buffer,
    /// `[N, 2I]`, or null where not wanted.
    pub hidden: Buffer,
    /// `[N, I]`.
    pub act: Buffer,
}

impl Up {
    /// # Safety
    /// The buffers have these sizes and stay until the kernel has run; the plan is valid for them.
    pub unsafe fn launch(&self, queue: &Queue<'_>) -> Result<()> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Params {
            x: u64,
            gather: u64,
            offsets: u64,
            w1: u64,
            b1: u64,
            hidden: u64,
            act: u64,
            tokens: i32,
            rows: i32,
            hidden_size: i32,
            intermediate: i32,
            experts: i32,
            activation: i32,
            interleaved: i32,
            transposed: i32,
        }
        let Self { sizes, x, gather, offsets, w1, b1, hidden, act } = *self;
        let aligned =
            aligned(sizes.math.dtype, &[sizes.hidden, sizes.intermediate], &[x, w1, b1, hidden, act]);
        let tile = row_tile(queue.gpu, sizes.math, aligned, [sizes.rows, sizes.up()], sizes.experts);
        let params = Params {
            x: x.address,
            gather: gather.address,
            offsets: offsets.address,
            w1: w1.address,
            b1: b1.address,
            hidden: hidden.address,
            act: act.address,
            tokens: limits::rows("T (tokens)", sizes.tokens)?,
            rows: limits::rows("sorted rows", sizes.rows)?,
            hidden_size: limits::columns("H (hidden size)", sizes.hidden)?,
            intermediate: limits::columns("I (intermediate size)", sizes.intermediate)?,
            experts: limits::rows("E (experts)", sizes.experts)?,
            activation: sizes.activation.0,
            interleaved: sizes.interleaved.into(),
            transposed: sizes.transposed.into(),
        };
        let memory =
            [x.read(), gather.read(), offsets.read(), w1.read(), b1.read(), hidden.write(), act.write()];
        let (variant, w1) = weights(w1, sizes.transposed, [sizes.hidden, sizes.up(), sizes.experts]);
        // Gate and up columns of a unit are in one tile.
        let clusters = row_clusters(tile, sizes.rows, sizes.experts, sizes.up());
        let [gate, up] = grouped::hidden(hidden, [sizes.up(), sizes.rows], sizes.halves());
        let act = results(act, [sizes.intermediate, sizes.rows, 1]);
        let maps = Maps { b: w1, results: [gate, up, act], ..Maps::default() };
        let product = Grouped { kernel: "up", math: sizes.math, tile, variant, clusters, maps };
        // SAFETY: this is the kernel's struct, and as promised by the caller.
        unsafe { product.launch(queue, &params, &memory) }
    }
}

/// `y[r] = a[r] W[e]^T + bias[e]` over the sorted rows r of every expert e, zeros behind the last.
#[derive(Clone, Copy)]
pub struct Product {
    /// What is multiplied.
    pub math: Math,
    /// N, the sorted rows.
    pub rows: usize,
    /// Columns of `a`.
    pub inner: usize,
    /// Columns of `y`.
    pub columns: usize,
    /// E.
    pub experts: usize,
    /// W is `[E, inner, columns]` rather than `[E, columns, inner]`.
    pub transposed: bool,
    /// `[N, inner]`.
    pub a: Buffer,
    /// `[E + 1]`.
    pub offsets: Buffer,
    /// The weights.
    pub w: Buffer,
    /// `[E, columns]`, or null.
    pub bias: Buffer,
    /// `[N, columns]`.
    pub y: Buffer,
}

impl Product {
    /// # Safety
    /// The buffers have these sizes and stay until the kernel has run; the offsets rise from 0 to at most N.
    pub unsafe fn launch(&self, queue: &Queue<'_>) -> Result<()> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Params {
            a: u64,
            offsets: u64,
            w: u64,
            bias: u64,
            y: u64,
            rows: i32,
            inner: i32,
            columns: i32,
            experts: i32,
            transposed: i32,
        }
        let Self { math, rows, inner, columns, experts, transposed, a, offsets, w, bias, y } = *self;
        let aligned = aligned(math.dtype, &[inner, columns], &[a, w, bias, y]);
        let tile = row_tile(queue.gpu, math, aligned, [rows, columns], experts);
        let params = Params {
            a: a.address,
            offsets: offsets.address,
            w: w.address,
            bias: bias.address,
            y: y.address,
            rows: limits::rows("sorted rows", rows)?,
            inner: limits::columns("K (columns of the rows)", inner)?,
            columns: limits::columns("N (columns of the result)", columns)?,
            experts: limits::rows("E (experts)", experts)?,
            transposed: transposed.into(),
        };
        let memory = [a.read(), offsets.read(), w.read(), bias.read(), y.write()];
        let (variant, w) = weights(w, transposed, [inner, columns, experts]);
        let y = results(y, [columns, rows, 1]);
        let maps =
            Maps { a: rows_along_inner(a, [inner, rows]), b: w, results: [y, None, None], ..Maps::default() };
        let clusters = row_clusters(tile, rows, experts, columns);
        let product = Grouped { kernel: "gemm", math, tile, variant, clusters, maps };
        // SAFETY: this is the kernel's struct, and as promised by the caller.
        unsafe { product.launch(queue, &params, &memory) }
    }
}

/// From the gradient of the output to that of the hidden states, with what the other gradients need.
#[derive(Clone, Copy)]
pub(crate) struct GradHidden {
    pub sizes: Sizes,
    /// `[T, H]`.
    pub grad_out: Buffer,
    pub gather: Buffer,
    pub offsets: Buffer,
    /// `[N]` routing weights in sorted order.
    pub weights: Buffer,
    pub w2: Buffer,
    pub hidden: Buffer,
    /// `[N, 2I]`, or null where not wanted.
    pub grad_hidden: Buffer,
    /// `[N, I]` the activation times the routing weight, or null where not wanted.
    pub scaled_act: Buffer,
    /// `[N, ceil(I / 32)]` f32, or null where not wanted.
    pub slopes: Buffer,
}

impl GradHidden {
    /// # Safety
    /// As [`Up::launch`].
    pub unsafe fn launch(&self, queue: &Queue<'_>) -> Result<()> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Params {
            grad_out: u64,
            gather: u64,
            offsets: u64,
            weights: u64,
            w2: u64,
            hidden: u64,
            grad_hidden: u64,
            scaled_act: u64,
            slopes: u64,
            tokens: i32,
            rows: i32,
            hidden_size: i32,
            intermediate: i32,
            experts: i32,
            activation: i32,
            interleaved: i32,
            transposed: i32,
        }
        let sizes = self.sizes;
        let aligned = aligned(
            sizes.math.dtype,
            &[sizes.hidden, sizes.intermediate],
            &[self.grad_out, self.w2, self.hidden, self.grad_hidden, self.scaled_act],
        );
        let tile = row_tile(queue.gpu, sizes.math, aligned, [sizes.rows, sizes.intermediate], sizes.experts);
        let params = Params {
            grad_out: self.grad_out.address,
            gather: self.gather.address,
            offsets: self.offsets.address,
            weights: self.weights.address,
            w2: self.w2.address,
            hidden: self.hidden.address,
            grad_hidden: self.grad_hidden.address,
            scaled_act: self.scaled_act.address,
            slopes: self.slopes.address,
            tokens: limits::rows("T (tokens)", sizes.tokens)?,
            rows: limits::rows("sorted rows", sizes.rows)?,
            hidden_size: limits::columns("H (hidden size)", sizes.hidden)?,
            intermediate: limits::columns("I (intermediate size)", sizes.intermediate)?,
            experts: limits::rows("E (experts)", sizes.experts)?,
            activation: sizes.activation.0,
            interleaved: sizes.interleaved.into(),
            transposed: sizes.transposed.into(),
        };
        let memory = [
            self.grad_out.read(),
            self.gather.read(),
            self.offsets.read(),
            self.weights.read(),
            self.w2.read(),
            self.hidden.read(),
            self.grad_hidden.write(),
            self.scaled_act.write(),
            self.slopes.write(),
        ];
        let inner = [sizes.hidden, sizes.intermediate, sizes.experts];
        let (variant, w2) = weights(self.w2, !sizes.transposed, inner);
        let clusters = row_clusters(tile, sizes.rows, sizes.experts, sizes.intermediate);
        let hidden = |tensor| grouped::hidden(tensor, [sizes.up(), sizes.rows], sizes.halves());
        let [gate, up] = hidden(self.grad_hidden);
        let scaled_act = results(self.scaled_act, [sizes.intermediate, sizes.rows, 1]);
        let maps = Maps { a: None, b: w2, inputs: hidden(self.hidden), results: [gate, up, scaled_act] };
        let product = Grouped { kernel: "grad_hidden", math: sizes.math, tile, variant, clusters, maps };
        // SAFETY: this is the kernel's struct, and as promised by the caller.
        unsafe { product.launch(queue, &params, &memory) }
    }
}

/// A factor of a gradient of weights: rows in sorted order, or gathered.
#[derive(Clone, Copy)]
pub struct Factor {
    /// `[N, columns]`, or `[T, columns]` where gathered.
    pub rows: Buffer,
    /// `[N]`, or null.
    pub gather: Buffer,
    /// Columns.
    pub columns: usize,
}

/// `out[e] = sum of a[r]^T b[r]` over the sorted rows r of expert e, or added to it; at most one factor is gathered.
#[derive(Clone, Copy)]
pub struct GradWeight {
    /// What is multiplied.
    pub math: Math,
    /// T, the rows of a gathered factor.
    pub tokens: usize,
    /// N, the sorted rows.
    pub rows: usize,
    /// E.
    pub experts: usize,
    /// `[E + 1]`.
    pub offsets: Buffer,
    /// Gives the rows of the result.
    pub a: Factor,
    /// Gives its columns.
    pub b: Factor,
    /// `[E, a, b]`, f32 where sums are added to it.
    pub out: (Buffer, Update),
}

impl GradWeight {
    /// The same with the factors exchanged where the weight is transposed.
    pub fn transposed(self, transposed: bool) -> Self {
        if transposed { Self { a: self.b, b: self.a, ..self } } else { self }
    }

    /// # Safety
    /// The buffers have these sizes and stay until the kernel has run; the plan is valid for them.
    pub unsafe fn launch(&self, queue: &Queue<'_>) -> Result<()> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Params {
            a: u64,
            b: u64,
            gather_a: u64,
            gather_b: u64,
            offsets: u64,
            out: u64,
            sum: u64,
            adds: i32,
            tokens: i32,
            rows: i32,
            m: i32,
            n: i32,
            experts: i32,
        }
        let Self { math, tokens, rows, experts, offsets, a, b, out: (out, update) } = *self;
        let aligned = rows > 0 && aligned(math.dtype, &[a.columns, b.columns], &[a.rows, b.rows, out]);
        let variant = if a.gather.is_null() { "b" } else { "a" };
        let (result, transposed) =
            ([b.columns, a.columns, experts], queue.gpu.warpgroups() && variant == "b");
        // Warpgroups gather the rows of a tile, never its columns: they compute such a result the other way round.
        let [rows_of_tile, columns_of_tile] = if transposed { [b, a] } else { [a, b] };
        let sizes = [rows_of_tile, columns_of_tile].map(|factor| factor.columns);
        let tile = weight_tile(queue.gpu, math, aligned, sizes, experts);
        let [a, b] = if tile.warpgroups { [rows_of_tile, columns_of_tile] } else { [a, b] };
        let map = if transposed { transposed_results(out, result) } else { results(out, result) };
        let params = Params {
            a: a.rows.address,
            b: b.rows.address,
            gather_a: a.gather.address,
            gather_b: b.gather.address,
            offsets: offsets.address,
            out: if update == Update::AddWide { 0 } else { out.address },
            sum: if update == Update::AddWide { out.address } else { 0 },
            adds: (update == Update::Add).into(),
            tokens: limits::rows("T (tokens)", tokens)?,
            rows: limits::rows("sorted rows", rows)?,
            m: limits::columns("rows of a gradient of weights", a.columns)?,
            n: limits::columns("columns of a gradient of weights", b.columns)?,
            experts: limits::rows("E (experts)", experts)?,
        };
        let written = if update == Update::Write { out.write() } else { out.read_write() };
        let memory =
            [a.rows.read(), b.rows.read(), a.gather.read(), b.gather.read(), offsets.read(), written];
        let written_map = map.filter(|_| update == Update::Write);
        let plain = rows_across(b.rows, [b.columns, rows]);
        let maps = Maps { b: plain, results: [written_map, None, None], ..Maps::default() };
        let clusters = weight_clusters(tile, a.columns, experts, b.columns);
        let product = Grouped { kernel: "grad_weight", math, tile, variant, clusters, maps };
        // SAFETY: this is the kernel's struct, and as promised by the caller.
        unsafe { product.launch(queue, &params, &memory) }
    }
}
