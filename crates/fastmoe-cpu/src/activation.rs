//! The activations between the two projections.

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
}
