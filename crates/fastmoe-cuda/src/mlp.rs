//! The expert MLP on the device: three kernels forward, and backward what the gradients that are asked for need.

use crate::products::{Factor, GradHidden, GradWeight, Product, SLOPE_UNITS, Sizes, Up};
use crate::rows::{Combine, GradBias, GradScore, SortWeights};
use crate::{Buffer, Queue, Result, scratch_size};
use fastmoe_core::Update;

/// `out[t] = sum_k weights[t,k] (act(x W1^T + b1) W2^T + b2)`.
#[derive(Clone, Copy)]
pub struct Mlp {
    /// Sizes and flags.
    pub sizes: Sizes,
    /// K.
    pub top_k: usize,
    /// `[T, H]`.
    pub x: Buffer,
    /// `[E, 2I, H]` (`[E, I, H]` ungated), transposed `[E, H, 2I]`.
    pub w1: Buffer,
    /// `[E, 2I]`, or null.
    pub b1: Buffer,
    /// `[E, H, I]`, transposed `[E, I, H]`.
    pub w2: Buffer,
    /// `[E, H]`, or null.
    pub b2: Buffer,
    /// `[T, K]` f32.
    pub weights: Buffer,
    /// `[E + 1]`.
    pub offsets: Buffer,
    /// `[N]`.
    pub gather: Buffer,
    /// `[T, K]`.
    pub inverse: Buffer,
}

/// Where the gradients go; null means not wanted and not computed.
#[derive(Clone, Copy, Default)]
pub struct MlpGrads {
    /// `[T, H]`.
    pub x: Buffer,
    /// `[T, K]` f32.
    pub weights: Buffer,
    /// Like W1.
    pub w1: (Buffer, Update),
    /// Like b1.
    pub b1: Buffer,
    /// Like W2.
    pub w2: (Buffer, Update),
    /// Like b2.
    pub b2: Buffer,
}

impl MlpGrads {
    fn hidden(&self) -> bool {
        [self.x, self.w1.0, self.b1].iter().any(|grad| !grad.is_null())
    }
}

impl Mlp {
    /// Bytes of `[N, columns]`.
    fn rows_bytes(&self, columns: usize) -> usize {
        self.sizes.rows * columns * self.sizes.math.dtype.bytes()
    }

    /// Bytes of scratch memory of [`Mlp::forward`].
    pub fn forward_scratch(&self) -> usize {
        scratch_size(self.rows_bytes(self.sizes.intermediate))
            + scratch_size(self.rows_bytes(self.sizes.hidden))
    }

    /// Queues the forward pass; keeps the pre-activation `[N, 2I]` in `hidden` unless that is null.
    ///
    /// # Safety
    /// The buffers have these sizes and stay until the kernels have run; the plan is valid for them.
    pub unsafe fn forward(&self, queue: &mut Queue<'_>, out: Buffer, hidden: Buffer) -> Result<()> {
        let Self { sizes, x, w1, b1, offsets, gather, .. } = *self;
        let act = queue.take("act", self.rows_bytes(sizes.intermediate));
        let y = queue.take("y", self.rows_bytes(sizes.hidden));
        let down = Product {
            math: sizes.math,
            rows: sizes.rows,
            inner: sizes.intermediate,
            columns: sizes.hidden,
            experts: sizes.experts,
            transposed: sizes.transposed,
            a: act,
            offsets,
            w: self.w2,
            bias: self.b2,
            y,
        };
        // SAFETY: as promised by the caller; scratch memory has the sizes that it was taken with.
        unsafe {
            Up { sizes, x, gather, offsets, w1, b1, hidden, act }.launch(queue)?;
            down.launch(queue)?;
            self.combine(y, self.weights, out).launch(queue)
        }
    }

    fn combine(&self, y: Buffer, weights: Buffer, out: Buffer) -> Combine {
        Combine {
            dtype: self.sizes.math.dtype,
            tokens: self.sizes.tokens,
            top_k: self.top_k,
            rows: self.sizes.rows,
            columns: self.sizes.hidden,
            y,
            inverse: self.inverse,
            weights,
            out,
        }
    }

    fn slope_columns(&self) -> usize {
        self.sizes.intermediate.div_ceil(SLOPE_UNITS)
    }

    /// Bytes of what the backward pass keeps: sorted weights, hidden gradient, scaled activation, slopes, rows of dx.
    fn backward_pieces(&self, grads: &MlpGrads) -> [usize; 5] {
        let sizes = &self.sizes;
        let when = |wanted: bool, bytes: usize| if wanted { bytes } else { 0 };
        [
            4 * sizes.rows,
            when(grads.hidden(), self.rows_bytes(sizes.up())),
            when(!grads.w2.0.is_null(), self.rows_bytes(sizes.intermediate)),
            when(!grads.weights.is_null(), 4 * sizes.rows * self.slope_columns()),
            when(!grads.x.is_null(), self.rows_bytes(sizes.hidden)),
        ]
    }

    /// Bytes of scratch memory of [`Mlp::backward`].
    pub fn backward_scratch(&self, grads: &MlpGrads) -> usize {
        let sizes = &self.sizes;
        let bias = |grad: Buffer, columns| {
            if grad.is_null() { 0 } else { GradBias::scratch(sizes.rows, sizes.experts, columns) }
        };
        self.backward_pieces(grads).into_iter().map(scratch_size).sum::<usize>()
            + bias(grads.b1, sizes.up())
            + bias(grads.b2, sizes.hidden)
    }

    /// Queues the gradients that are asked for, from the saved pre-activation.
    ///
    /// # Safety
    /// As [`Mlp::forward`], for the gradients too.
    pub unsafe fn backward(
        &self,
        queue: &mut Queue<'_>,
        hidden: Buffer,
        grad_out: Buffer,
        grads: &MlpGrads,
    ) -> Result<()> {
        let Self { sizes, offsets, gather, inverse, .. } = *self;
        let Sizes { math, tokens, rows, experts, transposed, .. } = sizes;
        let names = ["sorted_weights", "grad_hidden", "scaled_act", "slopes", "grad_rows"];
        let mut pieces = [Buffer::default(); 5];
        for ((piece, name), bytes) in pieces.iter_mut().zip(names).zip(self.backward_pieces(grads)) {
            if bytes > 0 {
                *piece = queue.take(name, bytes);
            }
        }
        let [weights, grad_hidden, scaled_act, slopes, grad_rows] = pieces;
        let bias = |columns, rows_of, gather: Buffer, scale, out| GradBias {
            dtype: math.dtype,
            experts,
            columns,
            sorted: rows,
            sources: if gather.is_null() { rows } else { tokens },
            rows: rows_of,
            gather,
            scale,
            offsets,
            out,
        };
        let none = Buffer::default();
        let sorted = |rows, columns| Factor { rows, gather: none, columns };
        let gathered = |rows| Factor { rows, gather, columns: sizes.hidden };
        let weight =
            |a, b, out| GradWeight { math, tokens, rows, experts, offsets, a, b, out }.transposed(transposed);
        // SAFETY: as promised by the caller; scratch memory has the sizes that it was taken with.
        unsafe {
            let slots = tokens * self.top_k;
            SortWeights { slots, rows, weights: self.weights, gather, inverse, sorted: weights }
                .launch(queue)?;
            if pieces[1..4].iter().any(|piece| !piece.is_null()) {
                GradHidden {
                    sizes,
                    grad_out,
                    gather,
                    offsets,
                    weights,
                    w2: self.w2,
                    hidden,
                    grad_hidden,
                    scaled_act,
                    slopes,
                }
                .launch(queue)?;
            }
            if !grads.weights.is_null() {
                GradScore {
                    dtype: math.dtype,
                    tokens: self.sizes.tokens,
                    top_k: self.top_k,
                    rows,
                    experts,
                    columns: sizes.hidden,
                    tiles: self.slope_columns(),
                    partial: slopes,
                    inverse,
                    grad_out,
                    b2: self.b2,
                    offsets,
                    grad_weights: grads.weights,
                }
                .launch(queue)?;
            }
            if !grads.w2.0.is_null() {
                let (left, right) = (gathered(grad_out), sorted(scaled_act, sizes.intermediate));
                weight(left, right, grads.w2).launch(queue)?;
            }
            if !grads.b2.is_null() {
                bias(sizes.hidden, grad_out, gather, weights, grads.b2).launch(queue)?;
            }
            if !grads.w1.0.is_null() {
                let (left, right) = (sorted(grad_hidden, sizes.up()), gathered(self.x));
                weight(left, right, grads.w1).launch(queue)?;
            }
            if !grads.b1.is_null() {
                bias(sizes.up(), grad_hidden, none, none, grads.b1).launch(queue)?;
            }
            if !grads.x.is_null() {
                Product {
                    math,
                    rows,
                    inner: sizes.up(),
                    columns: sizes.hidden,
                    experts,
                    transposed: !transposed,
                    a: grad_hidden,
                    offsets,
                    w: self.w1,
                    bias: none,
                    y: grad_rows,
                }
                .launch(queue)?;
                self.combine(grad_rows, none, grads.x).launch(queue)?;
            }
        }
        Ok(())
    }
}
