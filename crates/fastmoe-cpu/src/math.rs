//! Elementary functions in branch-free arithmetic, so that loops over them become vector code.

use fastmoe_core::Float;

/// A float that sums and activations are computed in.
pub trait Real: Float + Default {
    /// The error function.
    fn erf(self) -> Self;

    /// `self` where it is not above `hi`; NaN stays NaN.
    #[inline(always)]
    fn at_most(self, hi: Self) -> Self {
        if self > hi { hi } else { self }
    }
    /// `self` where it is not below `lo`; NaN stays NaN.
    #[inline(always)]
    fn at_least(self, lo: Self) -> Self {
        if self < lo { lo } else { self }
    }
    /// `1 / (1 + e^-x)`.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        Self::from_f64(1.0) / (Self::from_f64(1.0) + (-self).exp())
    }
    /// Hyperbolic tangent.
    #[inline(always)]
    fn tanh(self) -> Self {
        Self::from_f64(1.0) - Self::from_f64(2.0) / ((self + self).exp() + Self::from_f64(1.0))
    }
}

impl Real for f64 {
    #[inline(always)]
    fn erf(self) -> Self {
        libm::erf(self)
    }
    #[inline(always)]
    fn tanh(self) -> Self {
        f64::tanh(self)
    }
}

impl Real for f32 {
    /// Rational minimax approximation on [-4, 4], beyond which erf is +-1 in f32.
    #[inline(always)]
    fn erf(self) -> Self {
        let x = self.at_most(4.0).at_least(-4.0);
        let z = x * x;
        let mut p = -2.726_142_3e-10;
        for c in
            [2.770_681_4e-8, -2.101_024e-6, -5.692_506_4e-5, -7.349_906_3e-4, -2.954_6e-3, -1.609_603_3e-2]
        {
            p = p * z + c;
        }
        let mut q = -1.456_607_2e-5;
        for c in [-2.133_740_5e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2] {
            q = q * z + c;
        }
        x * p / q
    }
}

/// Inner product with sixteen partial sums: a fixed order, and vector code.
#[inline(always)]
pub fn dot<F: Real>(a: &[F], b: &[F]) -> F {
    let mut sums = [F::default(); 16];
    let (a16, b16) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest = a16.remainder().iter().zip(b16.remainder());
    let mut total = F::default();
    for (&x, &y) in rest {
        total += x * y;
    }
    for (x, y) in a16.zip(b16) {
        for i in 0..16 {
            sums[i] += x[i] * y[i];
        }
    }
    for s in sums {
        total += s;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_and_tanh_are_accurate() {
        for i in -8000..8000 {
            let x = i as f32 * 0.01;
            let want = libm::erf(f64::from(x));
            assert!((f64::from(Real::erf(x)) - want).abs() <= 4e-7, "erf({x}) {} {want}", Real::erf(x));
            assert!((f64::from(Real::tanh(x)) - f64::from(x).tanh()).abs() <= 2e-7, "tanh({x})");
        }
        assert!(Real::erf(f32::NAN).is_nan() && Real::tanh(f32::NAN).is_nan());
        assert_eq!(Real::sigmoid(-200.0f32), 0.0);
    }
}
