//! `tanh` and `log1p` for f32 in the manner of [`crate::exp`]: plain IEEE operations in the order written, no branches,
//! the same bits on every instruction set.

use crate::exp::exp;

/// Below it `tanh` is a polynomial, above it follows from `exp`.
const TANH_SMALL: f32 = 0.625;
/// Polynomial of the Cephes library (Moshier, `tanhf`).
const TANH: [f32; 5] = [-5.704_988_7e-3, 2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1];

/// Within 2 ulp; NaN stays NaN.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let square = x * x;
    let mut p = TANH[0];
    for coefficient in &TANH[1..] {
        p = p * square + coefficient;
    }
    let small = p * square * x + x;
    let size = x.abs();
    let large = (1.0 - 2.0 / (exp(size + size) + 1.0)).copysign(x);
    if size < TANH_SMALL { small } else { large }
}

/// `ln(1 + t)` within 2 ulp for `0 <= t <= 1`; NaN stays NaN.
///
/// It is `2 artanh(s)` with `s = t / (t + 2) <= 1/3`, whose series `s + s^3/3 + s^5/5 + ...` is cut after `s^15`.
#[inline(always)]
pub(crate) fn log1p(t: f32) -> f32 {
    let s = t / (t + 2.0);
    let square = s * s;
    let mut p = 1.0 / 15.0;
    for denominator in [13.0, 11.0, 9.0, 7.0, 5.0, 3.0] {
        p = p * square + 1.0 / denominator;
    }
    let s = s + s;
    p * square * s + s
}

#[cfg(test)]
mod tests {
    use super::{log1p, tanh};

    fn worst(low: f32, high: f32, given: impl Fn(f32) -> f32, wanted: impl Fn(f64) -> f64) -> f64 {
        let samples = 1_000_000;
        (0..=samples)
            .map(|i| low + (high - low) * i as f32 / samples as f32)
            .map(|x| {
                let wanted = wanted(f64::from(x));
                let ulp = f64::from((wanted.abs() as f32).next_up()) - f64::from(wanted.abs() as f32);
                (f64::from(given(x)) - wanted).abs() / ulp
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn within_two_ulp() {
        for (low, high) in [(-12.0, 12.0), (-0.7, 0.7), (0.0, 1e-4)] {
            assert!(worst(low, high, tanh, f64::tanh) < 2.0, "tanh from {low} to {high}");
        }
        for high in [1.0, 1e-3, 1e-9, 1e-30] {
            assert!(worst(0.0, high, log1p, f64::ln_1p) < 2.0, "log1p to {high}");
        }
    }

    #[test]
    fn at_the_edges() {
        assert_eq!((tanh(f32::INFINITY), tanh(f32::NEG_INFINITY)), (1.0, -1.0));
        assert_eq!((tanh(0.0), tanh(1e30), tanh(-1e30)), (0.0, 1.0, -1.0));
        assert_eq!(log1p(0.0), 0.0);
        assert!(tanh(f32::NAN).is_nan());
        assert!(log1p(f32::NAN).is_nan());
    }
}
