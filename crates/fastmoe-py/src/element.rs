//! Element types of the tensors that cross the border.

use fastmoe_cpu::DType;

/// Element type of an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    F32,
    F64,
    Bf16,
    F16,
    I32,
    I64,
    U8,
}

/// A Rust type whose slices an argument can be read as.
///
/// # Safety
/// `ELEMENT` has the size and layout of the type, and every bit pattern is a value of it.
pub unsafe trait Scalar: Copy {
    const ELEMENT: Element;
}

// SAFETY: same size and layout; every bit pattern is a value.
unsafe impl Scalar for f32 {
    const ELEMENT: Element = Element::F32;
}
// SAFETY: as above.
unsafe impl Scalar for f64 {
    const ELEMENT: Element = Element::F64;
}
// SAFETY: as above.
unsafe impl Scalar for i32 {
    const ELEMENT: Element = Element::I32;
}
// SAFETY: as above.
unsafe impl Scalar for i64 {
    const ELEMENT: Element = Element::I64;
}

impl Element {
    const ALL: [Self; 7] = [Self::F32, Self::F64, Self::Bf16, Self::F16, Self::I32, Self::I64, Self::U8];

    /// The name that torch and NumPy use.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
            Self::I32 => "int32",
            Self::I64 => "int64",
            Self::U8 => "uint8",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|e| e.name() == name)
    }

    /// From NumPy's type string, such as `<f4`; the byte order has to be the machine's.
    pub fn from_typestr(typestr: &str) -> Option<Self> {
        let native = if cfg!(target_endian = "little") { '<' } else { '>' };
        if typestr == "|u1" {
            return Some(Self::U8);
        }
        match typestr.strip_prefix(native)? {
            "f4" => Some(Self::F32),
            "f8" => Some(Self::F64),
            "f2" => Some(Self::F16),
            "i4" => Some(Self::I32),
            "i8" => Some(Self::I64),
            _ => None,
        }
    }

    pub fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::F64 | Self::I64 => 8,
            Self::Bf16 | Self::F16 => 2,
            Self::U8 => 1,
        }
    }

    /// The floating-point type, if it is one.
    pub fn float(self) -> Option<DType> {
        match self {
            Self::F32 => Some(DType::F32),
            Self::F64 => Some(DType::F64),
            Self::Bf16 => Some(DType::Bf16),
            Self::F16 => Some(DType::F16),
            Self::I32 | Self::I64 | Self::U8 => None,
        }
    }

    /// Type of routing weights and scores beside tensors of `dtype`: float64 for float64, else float32.
    pub fn of_weights(dtype: DType) -> Self {
        if dtype == DType::F64 { Self::F64 } else { Self::F32 }
    }
}

impl From<DType> for Element {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::F64 => Self::F64,
            DType::Bf16 => Self::Bf16,
            DType::F16 => Self::F16,
        }
    }
}
