//! Which instruction set the kernels use: the best one of this machine, or a lower one by `FASTMOE_CPU_ISA`.

use crate::error::Error;
use std::sync::LazyLock;

/// An instruction set with its own kernels, from the most portable to the fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the compiler's baseline is.
    Portable,
    /// NEON, on every aarch64.
    Neon,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX-512 with bf16 dot products.
    Avx512Bf16,
    /// AMX tiles for bf16 and sums of bf16, AVX-512 for the rest.
    Amx,
}

impl Isa {
    const ALL: [Self; 6] =
        [Self::Portable, Self::Neon, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx];

    /// The name that `FASTMOE_CPU_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512_bf16",
            Self::Amx => "amx",
        }
    }

    /// The instruction sets of this machine, in rising order.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|isa| isa.present()).collect()
    }

    #[cfg(target_arch = "x86_64")]
    fn present(self) -> bool {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let avx512 = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        let bf16 = avx512 && is_x86_feature_detected!("avx512bf16");
        match self {
            Self::Portable => true,
            Self::Neon => false,
            Self::Avx2 => avx2,
            Self::Avx512 => avx512,
            Self::Avx512Bf16 => bf16,
            Self::Amx => bf16 && crate::amx::usable(),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn present(self) -> bool {
        self == Self::Portable || (self == Self::Neon && cfg!(target_arch = "aarch64"))
    }
}

/// Whether the processor works on registers of 512 bits in two halves, as a Zen 4 does.
pub fn halves_registers() -> bool {
    static HALVES: LazyLock<bool> = LazyLock::new(is_zen_4);
    *HALVES
}

#[cfg(target_arch = "x86_64")]
fn is_zen_4() -> bool {
    use std::arch::x86_64::__cpuid;
    let (vendor, signature) = (__cpuid(0), __cpuid(1).eax);
    let amd = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD";
    let family = (signature >> 8 & 0xf) + (signature >> 20 & 0xff);
    // A Zen 3 is of this family too, and has no such registers.
    amd && family == 0x19
}

#[cfg(not(target_arch = "x86_64"))]
fn is_zen_4() -> bool {
    false
}

/// The instruction set in use: read from the machine and `FASTMOE_CPU_ISA` at the first call.
pub fn isa() -> Result<Isa, Error> {
    static CHOSEN: LazyLock<Result<Isa, Error>> =
        LazyLock::new(|| choose(std::env::var("FASTMOE_CPU_ISA").ok().as_deref()));
    CHOSEN.clone()
}

fn choose(forced: Option<&str>) -> Result<Isa, Error> {
    let available = Isa::available();
    let best = *available.last().expect("the portable kernels are always there");
    let Some(given) = forced.filter(|v| !v.is_empty()) else { return Ok(best) };
    available.iter().copied().find(|i| i.name() == given).ok_or_else(|| Error::Isa {
        given: given.to_owned(),
        available: available.iter().map(|i| i.name()).collect::<Vec<_>>().join(", "),
    })
}

/// What this machine has and which kernels are used.
#[derive(Clone, Debug)]
pub struct CpuInfo {
    /// Architecture of the build.
    pub arch: &'static str,
    /// CPU features that matter here and are present.
    pub features: Vec<&'static str>,
    /// The instruction set in use.
    pub isa: &'static str,
    /// The instruction sets that `FASTMOE_CPU_ISA` may name here.
    pub available: Vec<&'static str>,
    /// Kernel of each dtype.
    pub kernels: Vec<(&'static str, &'static str)>,
    /// The thread pool in use.
    pub pool: &'static str,
}

/// Describes the machine; fails as `isa` does.
pub fn cpu_info() -> Result<CpuInfo, Error> {
    let isa = isa()?;
    let bf16 = match isa {
        Isa::Amx => "amx tiles",
        Isa::Avx512Bf16 => "avx512 bf16 dot products",
        _ => "widened to float32",
    };
    let wide = match isa {
        Isa::Amx => "avx512 fma or amx tiles of three bf16",
        Isa::Avx512 | Isa::Avx512Bf16 => "avx512 fma",
        _ => isa.name(),
    };
    let f16 = match isa {
        Isa::Amx => "widened to float32 or amx tiles of two bf16",
        _ => "widened to float32",
    };
    Ok(CpuInfo {
        arch: std::env::consts::ARCH,
        features: features(),
        isa: isa.name(),
        available: Isa::available().into_iter().map(Isa::name).collect(),
        kernels: vec![
            ("float32", wide),
            ("float64", "compiler vectors"),
            ("bfloat16", bf16),
            ("float16", f16),
        ],
        pool: crate::threads::pool_name(),
    })
}

#[cfg(target_arch = "x86_64")]
fn features() -> Vec<&'static str> {
    macro_rules! present {
        ($($name:tt),*) => { [$(($name, is_x86_feature_detected!($name))),*] };
    }
    let known = present!("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16");
    let mut found: Vec<_> = known.iter().filter(|f| f.1).map(|f| f.0).collect();
    if crate::amx::usable() {
        found.push("amx_bf16");
    }
    found
}

#[cfg(not(target_arch = "x86_64"))]
fn features() -> Vec<&'static str> {
    if cfg!(target_arch = "aarch64") { vec!["neon"] } else { vec![] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_lowers_but_never_invents() {
        assert_eq!(choose(Some("portable")), Ok(Isa::Portable));
        assert_eq!(choose(None), choose(Some("")));
        let text = choose(Some("sse9")).unwrap_err().to_string();
        assert!(text.contains("FASTMOE_CPU_ISA") && text.contains("'sse9'") && text.contains("portable"));
    }
}
