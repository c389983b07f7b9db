//! What kernels are compiled for, and what a device runs.

/// The target of a compiled image.
///
/// Family targets (`f`) run on every device of their family, which the architecture-specific ones (`a`) do not: an
/// image for sm_100f serves B200 and B300, one for sm_120f all of GeForce Blackwell and DGX Spark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arch {
    /// Ampere and Ada, machine code.
    Sm80,
    /// Hopper with wgmma, machine code.
    Sm90a,
    /// Data-centre Blackwell, machine code.
    Sm100f,
    /// Desktop Blackwell, machine code.
    Sm120f,
    /// PTX that the driver compiles: embedded modules, and devices newer than this build.
    Ptx80,
}

impl Arch {
    /// Every target, PTX last.
    pub const ALL: [Arch; 5] = [Arch::Sm80, Arch::Sm90a, Arch::Sm100f, Arch::Sm120f, Arch::Ptx80];

    /// The name in `FASTMOE_CUDA_ARCHS`, in file names and in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Arch::Sm80 => "80",
            Arch::Sm90a => "90a",
            Arch::Sm100f => "100f",
            Arch::Sm120f => "120f",
            Arch::Ptx80 => "ptx",
        }
    }

    /// The number behind `compute_` and `sm_`; PTX is what machine code for 8.0 is made from.
    pub const fn code(self) -> &'static str {
        match self {
            Arch::Ptx80 => Arch::Sm80.name(),
            machine => machine.name(),
        }
    }

    /// The target of [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<Arch> {
        Self::ALL.into_iter().find(|arch| arch.name() == name)
    }

    /// The machine code that a device of this compute capability runs, PTX where there is none.
    ///
    /// Machine code for 8.0 runs on later 8.x, but not on the embedded 8.7 and 8.8 (CUDA C++ Programming Guide, "Binary
    /// Compatibility").
    pub const fn of_device(major: u32, minor: u32) -> Option<Arch> {
        match (major, minor) {
            (8, 0 | 6 | 9) => Some(Arch::Sm80),
            (9, 0) => Some(Arch::Sm90a),
            (10, 0 | 3) => Some(Arch::Sm100f),
            (12, 0 | 1) => Some(Arch::Sm120f),
            (8.., _) => Some(Arch::Ptx80),
            _ => None,
        }
    }

    /// Whether a kernel family is made for this target: `sm90_` in front of its name binds it to Hopper, `sm100_` to
    /// data-centre Blackwell; all others, `sm80_` among them, use nothing that a later device lacks.
    pub fn is_for(self, family: &str) -> bool {
        match family.split_once('_').map(|(prefix, _)| prefix) {
            Some("sm90") => self == Arch::Sm90a,
            Some("sm100") => self == Arch::Sm100f,
            Some("sm120") => self == Arch::Sm120f,
            _ => true,
        }
    }
}
