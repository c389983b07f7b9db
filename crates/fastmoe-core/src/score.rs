//! From logits to scores, one row at a time.
//!
//! Sums run in 16 lanes: element j is added to lane `j % 16`, and the lanes are folded in halves (lane i and i + 8,
//! i + 4, i + 2, i + 1). The order is part of the definition: every backend gets the same bits.

use crate::error::named;
use crate::{Error, Float};
use std::str::FromStr;

const LANES: usize = 16;

/// How the logits of one token become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// `exp(x_j - max) / sum_j exp(x_j - max)`; all NaN when the row holds a NaN, `+inf`, or nothing but `-inf`.
    Softmax,
    /// `1 / (1 + exp(-x))`, element by element.
    Sigmoid,
    /// `sqrt(softplus(x))` with `softplus(x) = max(x, 0) + log1p(exp(-|x|))`, element by element (DeepSeek-V4).
    SqrtSoftplus,
}

impl FromStr for Score {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        named(
            "score",
            name,
            &[("softmax", Self::Softmax), ("sigmoid", Self::Sigmoid), ("sqrt_softplus", Self::SqrtSoftplus)],
        )
    }
}

impl Score {
    /// Replaces the logits of one row by their scores.
    #[inline(always)]
    pub(crate) fn apply<F: Float>(self, row: &mut [F]) {
        match self {
            Self::Softmax => softmax(row),
            Self::Sigmoid => sigmoid(row),
            Self::SqrtSoftplus => sqrt_softplus(row),
        }
    }

    /// Replaces the gradients of one row of scores by those of its logits.
    #[inline(always)]
    pub(crate) fn apply_backward<F: Float>(self, grad: &mut [F], scores: &[F], logits: &[F]) {
        match self {
            Self::Softmax => softmax_backward(grad, scores),
            Self::Sigmoid => sigmoid_backward(grad, scores),
            Self::SqrtSoftplus => sqrt_softplus_backward(grad, scores, logits),
        }
    }
}

#[inline(always)]
fn softmax<F: Float>(row: &mut [F]) {
    let max = maximum(row);
    let mut sums = [F::ZERO; LANES];
    in_lanes(row, |x| {
        for (x, sum) in x.iter_mut().zip(&mut sums) {
            *x = (*x - max).exp();
            *sum += *x;
        }
    });
    let sum = fold_halves(sums, |a, b| a + b);
    for x in row {
        *x = *x / sum;
    }
}

#[inline(always)]
fn sigmoid<F: Float>(row: &mut [F]) {
    in_lanes(row, |x| {
        for x in x {
            *x = F::ONE / (F::ONE + (-*x).exp());
        }
    });
}

#[inline(always)]
fn sqrt_softplus<F: Float>(row: &mut [F]) {
    in_lanes(row, |x| {
        for x in x {
            let positive = if *x > F::ZERO { *x } else { F::ZERO };
            let size = if *x > F::ZERO { *x } else { -*x };
            *x = (positive + (-size).exp().log1p()).sqrt();
        }
    });
}

#[inline(always)]
pub(crate) fn softmax_backward<F: Float>(grad: &mut [F], softmax: &[F]) {
    let inner = dot(grad, softmax);
    for (grad, &softmax) in grad.iter_mut().zip(softmax) {
        *grad = softmax * (*grad - inner);
    }
}

#[inline(always)]
fn sigmoid_backward<F: Float>(grad: &mut [F], sigmoid: &[F]) {
    for (grad, &sigmoid) in grad.iter_mut().zip(sigmoid) {
        *grad = *grad * sigmoid * (F::ONE - sigmoid);
    }
}

/// The slope of `sqrt(softplus(x))` is `sigmoid(x) / (2 sqrt(softplus(x)))`, and goes to 0 with the root.
#[inline(always)]
fn sqrt_softplus_backward<F: Float>(grad: &mut [F], root: &[F], logits: &[F]) {
    for ((grad, &root), &x) in grad.iter_mut().zip(root).zip(logits) {
        let sigmoid = F::ONE / (F::ONE + (-x).exp());
        let through = *grad * sigmoid / (root + root);
        *grad = if root == F::ZERO { F::ZERO } else { through };
    }
}

/// Replaces every logit by `cap * tanh(x / cap)`.
#[inline(always)]
pub(crate) fn soft_cap<F: Float>(row: &mut [F], cap: F) {
    in_lanes(row, |x| {
        for x in x {
            *x = (*x / cap).tanh() * cap;
        }
    });
}

/// Calls `work` on 16 elements at a time; the last, shorter chunk is filled up with `-inf`.
#[inline(always)]
fn in_lanes<F: Float>(row: &mut [F], mut work: impl FnMut(&mut [F; LANES])) {
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        work(chunk);
    }
    if !rest.is_empty() {
        let mut chunk = [F::NEG_INFINITY; LANES];
        chunk[..rest.len()].copy_from_slice(rest);
        work(&mut chunk);
        rest.copy_from_slice(&chunk[..rest.len()]);
    }
}

/// The largest number of a row, NaN left out.
#[inline(always)]
fn maximum<F: Float>(row: &[F]) -> F {
    let larger = |x: F, max: F| if x > max { x } else { max };
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [F::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(x, *lane);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = larger(x, *lane);
    }
    fold_halves(lanes, larger)
}

#[inline(always)]
fn dot<F: Float>(a: &[F], b: &[F]) -> F {
    let mut sums = [F::ZERO; LANES];
    let mut add = |a: &[F], b: &[F]| {
        for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    };
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        add(a, b);
    }
    add(a_rest, b_rest);
    fold_halves(sums, |a, b| a + b)
}

#[inline(always)]
fn fold_halves<F: Float>(mut lanes: [F; LANES], fold: impl Fn(F, F) -> F) -> F {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = fold(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// One after the other, in one lane: for the few choices of a token.
#[inline(always)]
pub(crate) fn sum<F: Float>(values: impl Iterator<Item = F>) -> F {
    let mut sum = F::ZERO;
    for value in values {
        sum += value;
    }
    sum
}
