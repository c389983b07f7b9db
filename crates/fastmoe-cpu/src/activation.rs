//! The activations between the two projections, and their derivatives.

use crate::math::Real;

/// Activation of the expert MLP; gated ones take a gate and an up row, the others one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `silu(gate) * up` (Shazeer, 2020).
    Swiglu,
    /// `gelu(gate) * up` with the exact (erf) GELU.
    Geglu,
    /// `gelu(gate) * up` with the tanh approximation.
    GegluTanh,
    /// `relu(gate) * up`.
    Reglu,
    /// gpt-oss: `(clamp(up, -7, 7) + 1) * g * sigmoid(1.702 g)` with `g = min(gate, 7)`.
    SwigluOai,
    /// `x * sigmoid(x)`.
    Silu,
    /// Exact (erf) GELU.
    Gelu,
    /// GELU, tanh approximation.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2`.
    Relu2,
}

impl Activation {
    /// Every activation with the name that Python uses.
    pub const ALL: [(&'static str, Self); 10] = [
        ("swiglu", Self::Swiglu),
        ("geglu", Self::Geglu),
        ("geglu_tanh", Self::GegluTanh),
        ("reglu", Self::Reglu),
        ("swiglu_oai", Self::SwigluOai),
        ("silu", Self::Silu),
        ("gelu", Self::Gelu),
        ("gelu_tanh", Self::GeluTanh),
        ("relu", Self::Relu),
        ("relu2", Self::Relu2),
    ];

    /// The activation of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(n, _)| *n == name).map(|&(_, a)| a)
    }

    /// Whether the up projection has a gate half and an up half.
    pub fn gated(self) -> bool {
        matches!(self, Self::Swiglu | Self::Geglu | Self::GegluTanh | Self::Reglu | Self::SwigluOai)
    }

    /// `out = act(gate)`, times the up row where gated (else `up` is not read).
    #[inline(always)]
    pub(crate) fn forward<F: Real>(self, gate: &[F], up: &[F], out: &mut [F]) {
        match self {
            Self::Swiglu => glu(gate, up, out, silu),
            Self::Geglu => glu(gate, up, out, gelu),
            Self::GegluTanh => glu(gate, up, out, gelu_tanh),
            Self::Reglu => glu(gate, up, out, relu),
            Self::SwigluOai => {
                for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
                    *o = (clamp_up(u) + F::ONE) * oai_gate(g).0;
                }
            }
            Self::Silu => plain(gate, out, silu),
            Self::Gelu => plain(gate, out, gelu),
            Self::GeluTanh => plain(gate, out, gelu_tanh),
            Self::Relu => plain(gate, out, relu),
            Self::Relu2 => plain(gate, out, relu2),
        }
    }

    /// From `grad = dL/d act`: `gate` and `up` become their own gradients, `out` the activation.
    #[inline(always)]
    pub(crate) fn backward<F: Real>(self, grad: &[F], gate: &mut [F], up: &mut [F], out: &mut [F]) {
        match self {
            Self::Swiglu => glu_backward(grad, gate, up, out, silu),
            Self::Geglu => glu_backward(grad, gate, up, out, gelu),
            Self::GegluTanh => glu_backward(grad, gate, up, out, gelu_tanh),
            Self::Reglu => glu_backward(grad, gate, up, out, relu),
            Self::SwigluOai => {
                for (((&d, g), u), o) in grad.iter().zip(gate).zip(up).zip(out) {
                    let (value, slope) = oai_gate(*g);
                    let (clamped, inside) =
                        (clamp_up(*u), u.at_most(F::from_f64(7.0)).at_least(F::from_f64(-7.0)) == *u);
                    *o = (clamped + F::ONE) * value;
                    *u = if inside { d * value } else { F::ZERO };
                    *g = d * (clamped + F::ONE) * slope;
                }
            }
            Self::Silu => plain_backward(grad, gate, out, silu),
            Self::Gelu => plain_backward(grad, gate, out, gelu),
            Self::GeluTanh => plain_backward(grad, gate, out, gelu_tanh),
            Self::Relu => plain_backward(grad, gate, out, relu),
            Self::Relu2 => plain_backward(grad, gate, out, relu2),
        }
    }
}

#[inline(always)]
fn glu<F: Real>(gate: &[F], up: &[F], out: &mut [F], f: impl Fn(F) -> (F, F)) {
    for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        *o = f(g).0 * u;
    }
}

#[inline(always)]
fn plain<F: Real>(x: &[F], out: &mut [F], f: impl Fn(F) -> (F, F)) {
    for (o, &x) in out.iter_mut().zip(x) {
        *o = f(x).0;
    }
}

#[inline(always)]
fn glu_backward<F: Real>(grad: &[F], gate: &mut [F], up: &mut [F], out: &mut [F], f: impl Fn(F) -> (F, F)) {
    for (((&d, g), u), o) in grad.iter().zip(gate).zip(up).zip(out) {
        let (value, slope) = f(*g);
        *o = value * *u;
        *g = d * *u * slope;
        *u = d * value;
    }
}

#[inline(always)]
fn plain_backward<F: Real>(grad: &[F], x: &mut [F], out: &mut [F], f: impl Fn(F) -> (F, F)) {
    for ((&d, x), o) in grad.iter().zip(x).zip(out) {
        let (value, slope) = f(*x);
        *o = value;
        *x = d * slope;
    }
}

// Each returns the value and the derivative; the compiler drops the one that is not used.

#[inline(always)]
fn silu<F: Real>(x: F) -> (F, F) {
    let s = x.sigmoid();
    (x * s, s + x * s * (F::ONE - s))
}

#[inline(always)]
fn gelu<F: Real>(x: F) -> (F, F) {
    let phi = F::from_f64(0.5) * (F::ONE + (x * F::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf());
    let density = F::from_f64(0.398_942_280_401_432_7) * (x * x * F::from_f64(-0.5)).exp();
    (x * phi, phi + x * density)
}

#[inline(always)]
fn gelu_tanh<F: Real>(x: F) -> (F, F) {
    let root = F::from_f64(0.797_884_560_802_865_4); // sqrt(2/pi)
    let cubic = F::from_f64(0.044715);
    let t = Real::tanh(root * (x + cubic * x * x * x));
    let half = F::from_f64(0.5) * (F::ONE + t);
    let slope = root * (F::ONE + F::from_f64(3.0) * cubic * x * x);
    (x * half, half + F::from_f64(0.5) * x * (F::ONE - t * t) * slope)
}

#[inline(always)]
fn relu<F: Real>(x: F) -> (F, F) {
    let slope = if x > F::ZERO { F::ONE } else { F::ZERO };
    (x.at_least(F::ZERO), slope)
}

#[inline(always)]
fn relu2<F: Real>(x: F) -> (F, F) {
    let r = x.at_least(F::ZERO);
    (r * r, r + r)
}

#[inline(always)]
fn clamp_up<F: Real>(x: F) -> F {
    x.at_most(F::from_f64(7.0)).at_least(F::from_f64(-7.0))
}

#[inline(always)]
fn oai_gate<F: Real>(x: F) -> (F, F) {
    let g = x.at_most(F::from_f64(7.0));
    let s = (g * F::from_f64(1.702)).sigmoid();
    let slope = s + g * F::from_f64(1.702) * s * (F::ONE - s);
    (g * s, if x > F::from_f64(7.0) { F::ZERO } else { slope })
}
