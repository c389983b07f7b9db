//! From a dtype and the instruction set in use to the code compiled for the two.

/// Calls `$function::<Machine, Element>($args)` for a dtype.
///
/// The caller promises what the function asks for; the instruction set is present because `isa()` chose it.
macro_rules! dispatch {
    ($dtype:expr, $function:ident($($arg:expr),* $(,)?)) => {{
        use $crate::dtype::DType;
        use $crate::isa::Isa;
        use $crate::machine::*;
        let isa = $crate::isa::isa().unwrap_or(Isa::Portable);
        #[cfg(target_arch = "x86_64")]
        use $crate::amx::Amx;
        #[cfg(target_arch = "x86_64")]
        match ($dtype, isa) {
            (DType::F64, Isa::Portable) => $function::<Portable64, f64>($($arg),*),
            (DType::F64, _) => $function::<Avx2Double, f64>($($arg),*),
            (DType::F32, Isa::Avx2) => $function::<Avx2, f32>($($arg),*),
            (DType::F16, Isa::Avx2) => $function::<Avx2, half::f16>($($arg),*),
            (DType::Bf16, Isa::Avx2) => $function::<Avx2, half::bf16>($($arg),*),
            (DType::F32, Isa::Avx512 | Isa::Avx512Bf16) => $function::<Avx512, f32>($($arg),*),
            (DType::F16, Isa::Avx512 | Isa::Avx512Bf16) => $function::<Avx512, half::f16>($($arg),*),
            (DType::F32, Isa::Amx) => $function::<Amx<3>, f32>($($arg),*),
            (DType::F16, Isa::Amx) => $function::<Amx<2>, half::f16>($($arg),*),
            (DType::Bf16, Isa::Avx512) => $function::<Avx512, half::bf16>($($arg),*),
            (DType::Bf16, Isa::Avx512Bf16) => $function::<Avx512Pairs, half::bf16>($($arg),*),
            (DType::Bf16, Isa::Amx) => $function::<Amx<1>, half::bf16>($($arg),*),
            (DType::F32, _) => $function::<Portable, f32>($($arg),*),
            (DType::F16, _) => $function::<Portable, half::f16>($($arg),*),
            (DType::Bf16, _) => $function::<Portable, half::bf16>($($arg),*),
        }
        #[cfg(target_arch = "aarch64")]
        match ($dtype, isa) {
            (DType::F64, _) => $function::<Portable64, f64>($($arg),*),
            (DType::F32, Isa::Neon) => $function::<Neon, f32>($($arg),*),
            (DType::F16, Isa::Neon) => $function::<Neon, half::f16>($($arg),*),
            (DType::Bf16, Isa::Neon) => $function::<Neon, half::bf16>($($arg),*),
            (DType::F32, _) => $function::<Portable, f32>($($arg),*),
            (DType::F16, _) => $function::<Portable, half::f16>($($arg),*),
            (DType::Bf16, _) => $function::<Portable, half::bf16>($($arg),*),
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        {
            let _ = isa;
            match $dtype {
                DType::F64 => $function::<Portable64, f64>($($arg),*),
                DType::F32 => $function::<Portable, f32>($($arg),*),
                DType::F16 => $function::<Portable, half::f16>($($arg),*),
                DType::Bf16 => $function::<Portable, half::bf16>($($arg),*),
            }
        }
    }};
}
pub(crate) use dispatch;
