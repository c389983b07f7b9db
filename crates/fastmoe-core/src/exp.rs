//! `exp` for f32 without branches or library calls, so that a loop over it becomes vector code.
//!
//! Every operation is a plain IEEE multiplication, addition or subtraction, none fused, in the order written: the
//! result has the same bits on every instruction set. Range reduction of Cody and Waite, polynomial of the Cephes
//! library (Moshier, `expf`).

/// Below `-126 ln 2` the result would be subnormal and is 0.
const UNDERFLOW: f32 = -87.336_54;
/// Above `127.5 ln 2` the scale `2^n` overflows and the result is infinite.
const OVERFLOW: f32 = 88.376_26;
/// `1.5 * 2^23`: adding it rounds to the nearest integer, which then sits in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;
/// `ln 2` in two parts; products of the first with an exponent are exact.
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
const POLYNOMIAL: [f32; 6] = [1.987_569_1e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];

/// `e^x` within 1 ulp for `-87.33 <= x <= 88.37`; 0 below, infinite above; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    let mut p = POLYNOMIAL[0];
    for coefficient in &POLYNOMIAL[1..] {
        p = p * r + coefficient;
    }
    let mantissa = (p * (r * r) + r) + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    let y = mantissa * scale;
    let y = if x < UNDERFLOW { 0.0 } else { y };
    if x > OVERFLOW { f32::INFINITY } else { y }
}

#[cfg(test)]
mod tests {
    use super::{OVERFLOW, UNDERFLOW, exp};

    #[test]
    fn within_one_ulp() {
        let samples = 2_000_000;
        let worst = (0..samples)
            .map(|i| UNDERFLOW + (OVERFLOW - UNDERFLOW) * i as f32 / samples as f32)
            .map(|x| {
                let wanted = f64::from(x).exp();
                let ulp = f64::from((wanted as f32).next_up()) - f64::from(wanted as f32);
                (f64::from(exp(x)) - wanted).abs() / ulp
            })
            .fold(0.0, f64::max);
        assert!(worst < 1.0, "{worst} ulp");
    }

    #[test]
    fn at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(1e30), f32::INFINITY);
        assert!(exp(UNDERFLOW) >= f32::MIN_POSITIVE);
        assert!(exp(OVERFLOW) < f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }
}
