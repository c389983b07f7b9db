//! AMX multiplies bf16: a tile is 32 rows by 32 columns, held in four tile registers.
//!
//! Operands are packed as for the AVX-512 dot products: a tile register of A is 16 rows of 16 pairs, one of B
//! 16 pairs by 16 columns, which is what a panel of pairs looks like in memory.
//!
//! Wider numbers are sums of bf16, in as many planes, whose products are multiplied one by one and added in f32. Two make an
//! IEEE half; three make an f32, for which the products that are below its last bit are left out.

use crate::machine::{Avx512, Avx512Pairs, BLOCK, Machine, Op, Tile, TileUpdate};
use crate::simd::{F32x16, Vector};
use std::arch::asm;
use std::mem::MaybeUninit;
use std::sync::LazyLock;

/// AMX for the products, AVX-512 for everything else; of bf16, or of numbers that are split into `PLANES` of it.
#[derive(Clone, Copy)]
pub struct Amx<const PLANES: usize>;

/// Rows and bytes of the eight tile registers: all 16 x 64.
#[repr(C, align(64))]
struct TileConfig([u8; 64]);

static CONFIG: TileConfig = {
    let mut bytes = [0; 64];
    bytes[0] = 1; // palette
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = 64;
        bytes[48 + tile] = 16;
        tile += 1;
    }
    TileConfig(bytes)
};

/// Whether the CPU has AMX with bf16 and the system lets this process use it.
pub fn usable() -> bool {
    static USABLE: LazyLock<bool> = LazyLock::new(|| cpu_has_tiles() && system_permits_tiles());
    *USABLE
}

fn cpu_has_tiles() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    let leaf = std::arch::x86_64::__cpuid_count(7, 0);
    leaf.edx & (BF16 | TILE) == BF16 | TILE
}

#[cfg(target_os = "linux")]
fn system_permits_tiles() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const REQUEST_PERMISSION: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    let refused: i64;
    // SAFETY: the system call takes two numbers, touches no memory of ours and clobbers rcx and r11 only.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => refused,
            in("rdi") REQUEST_PERMISSION,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    refused == 0
}

#[cfg(not(target_os = "linux"))]
fn system_permits_tiles() -> bool {
    false
}

impl<const PLANES: usize> Machine for Amx<PLANES> {
    type Acc = f32;
    type Cell = half::bf16;
    type V = F32x16;
    type Few = Avx512;
    const PAIRS: bool = true;
    const ROWS: usize = 32;
    const ACROSS: usize = 2;
    const PLANES: usize = PLANES;
    const ROWS_TO_SPLIT: usize = [0, 48, 128][PLANES - 1];
    const DEPTH: usize = if PLANES > 1 { 64 } else { 128 };
    const WHOLE_TILES: bool = true;

    unsafe fn call<O: Op<Self>>(op: O) -> O::Out {
        #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn inside<const PLANES: usize, O: Op<Amx<PLANES>>>(op: O) -> O::Out {
            // SAFETY: this function is compiled for the machine's instruction set.
            unsafe { op.run() }
        }
        // SAFETY: the caller has the instruction set.
        unsafe { inside(op) }
    }

    unsafe fn tile(mut t: Tile<'_, f32>) {
        // SAFETY: as promised by the caller; `begin` has set the tile shapes on this thread.
        unsafe {
            match (PLANES, t.rows) {
                // Few rows gain nothing from tiles of 16.
                (1, 0..=4) => Avx512Pairs::tile(t),
                (1, 5..=16) => half_tile(&mut t),
                (1, _) => full_tile(&mut t),
                (_, 0..=16) => Planes::<PLANES, 1>::tile(&mut t),
                _ => Planes::<PLANES, 2>::tile(&mut t),
            }
        }
    }

    fn begin() {
        // SAFETY: the instruction set is usable, and CONFIG is a valid palette-1 configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly)) }
    }

    fn end() {
        // SAFETY: releasing tiles is always allowed where AMX is usable.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }
}

const UNIT: usize = size_of::<f32>();
const B_STRIDE: usize = 32 * UNIT;

/// Rows of A and C are padded to 32 (16 for `half_tile`) by whoever allocates them: a tile reads and writes
/// them all.
unsafe fn full_tile(t: &mut Tile<'_, f32>) {
    let (a_stride, c_stride) = (t.a_stride * UNIT, t.c_stride * UNIT);
    let (c0, c1) = (t.c, t.c.wrapping_add(16 * t.c_stride));
    // SAFETY: 32 rows of A and C and a panel of B are valid; between the blocks nothing else uses tiles.
    unsafe {
        if t.update == TileUpdate::Add {
            asm!(
                "tileloadd tmm0, [{c0} + {s}]", "tileloadd tmm1, [{c0} + {s} + 64]",
                "tileloadd tmm2, [{c1} + {s}]", "tileloadd tmm3, [{c1} + {s} + 64]",
                c0 = in(reg) c0, c1 = in(reg) c1, s = in(reg) c_stride,
                options(nostack, readonly),
            );
        } else {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
        }
        for k in (0..t.units).step_by(BLOCK) {
            t.ahead.step();
            asm!(
                "tileloadd tmm4, [{a0} + {sa}]",
                "tileloadd tmm6, [{b} + {sb}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {sb} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a1} + {sa}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                a0 = in(reg) t.a.add(k), a1 = in(reg) t.a.add(k + 16 * t.a_stride), sa = in(reg) a_stride,
                b = in(reg) t.b.add(k * 32), sb = in(reg) B_STRIDE,
                options(nostack, readonly),
            );
        }
        asm!(
            "tilestored [{c0} + {s}], tmm0", "tilestored [{c0} + {s} + 64], tmm1",
            "tilestored [{c1} + {s}], tmm2", "tilestored [{c1} + {s} + 64], tmm3",
            c0 = in(reg) c0, c1 = in(reg) c1, s = in(reg) c_stride,
            options(nostack),
        );
    }
}

unsafe fn half_tile(t: &mut Tile<'_, f32>) {
    let (a_stride, c_stride) = (t.a_stride * UNIT, t.c_stride * UNIT);
    // SAFETY: 16 rows of A and C and a panel of B are valid; between the blocks nothing else uses tiles.
    unsafe {
        if t.update == TileUpdate::Add {
            asm!(
                "tileloadd tmm0, [{c} + {s}]", "tileloadd tmm1, [{c} + {s} + 64]",
                c = in(reg) t.c, s = in(reg) c_stride,
                options(nostack, readonly),
            );
        } else {
            asm!("tilezero tmm0", "tilezero tmm1", options(nostack, nomem));
        }
        for k in (0..t.units).step_by(BLOCK) {
            t.ahead.step();
            asm!(
                "tileloadd tmm4, [{a} + {sa}]",
                "tileloadd tmm6, [{b} + {sb}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {sb} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                a = in(reg) t.a.add(k), sa = in(reg) a_stride,
                b = in(reg) t.b.add(k * 32), sb = in(reg) B_STRIDE,
                options(nostack, readonly),
            );
        }
        asm!(
            "tilestored [{c} + {s}], tmm0", "tilestored [{c} + {s} + 64], tmm1",
            c = in(reg) t.c, s = in(reg) c_stride,
            options(nostack),
        );
    }
}

/// Tiles of `HALVES` times 16 rows whose operands have several planes.
struct Planes<const PLANES: usize, const HALVES: usize>;

impl<const PLANES: usize, const HALVES: usize> Planes<PLANES, HALVES> {
    /// Each block of the contraction starts at zero and with the products that are small, so that their sum is rounded as
    /// little as one of whole numbers.
    unsafe fn tile(t: &mut Tile<'_, f32>) {
        // SAFETY: 16 rows of A and C a half and a panel of B are valid; between the blocks nothing else uses tiles.
        unsafe {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
            for k in (0..t.units).step_by(BLOCK) {
                t.ahead.step();
                // Each product has an operand of the one before.
                Self::a(t, k, PLANES - 1);
                Self::b(t, k, 0);
                Self::multiply();
                if PLANES == 3 {
                    Self::a(t, k, 1);
                    Self::multiply();
                }
                Self::b(t, k, 1);
                Self::multiply();
                Self::a(t, k, 0);
                Self::multiply();
                if PLANES == 3 {
                    Self::b(t, k, 2);
                    Self::multiply();
                }
            }
            for k in (0..t.units).step_by(BLOCK) {
                Self::a(t, k, 0);
                Self::b(t, k, 0);
                Self::multiply();
            }
            if t.update == TileUpdate::Add {
                let mut sums = MaybeUninit::<Sums>::uninit();
                Self::store(sums.as_mut_ptr().cast(), 32);
                Amx::<PLANES>::call(AddSums {
                    sums: sums.as_ptr().cast(),
                    rows: 16 * HALVES,
                    c: t.c,
                    c_stride: t.c_stride,
                });
            } else {
                Self::store(t.c, t.c_stride);
            }
        }
    }

    /// Loads a plane of A from unit `k` on.
    #[inline(always)]
    unsafe fn a(t: &Tile<'_, f32>, k: usize, plane: usize) {
        let a = t.a.wrapping_add(k * PLANES + plane * BLOCK);
        // SAFETY: as in `tile`.
        unsafe {
            asm!("tileloadd tmm4, [{a} + {s}]", a = in(reg) a, s = in(reg) t.a_stride * UNIT, options(nostack, readonly));
            if HALVES == 2 {
                let a = a.wrapping_add(16 * t.a_stride);
                asm!("tileloadd tmm5, [{a} + {s}]", a = in(reg) a, s = in(reg) t.a_stride * UNIT, options(nostack, readonly));
            }
        }
    }

    /// Loads a plane of B from unit `k` on.
    #[inline(always)]
    unsafe fn b(t: &Tile<'_, f32>, k: usize, plane: usize) {
        let b = t.b.wrapping_add((k * PLANES + plane * BLOCK) * 32);
        // SAFETY: as in `tile`.
        unsafe {
            asm!(
                "tileloadd tmm6, [{b} + {s}]", "tileloadd tmm7, [{b} + {s} + 64]",
                b = in(reg) b, s = in(reg) B_STRIDE, options(nostack, readonly),
            );
        }
    }

    #[inline(always)]
    unsafe fn multiply() {
        // SAFETY: as in `tile`.
        unsafe {
            asm!("tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7", options(nostack, nomem));
            if HALVES == 2 {
                asm!("tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7", options(nostack, nomem));
            }
        }
    }

    #[inline(always)]
    unsafe fn store(c: *mut f32, c_stride: usize) {
        // SAFETY: as in `tile`.
        unsafe {
            asm!(
                "tilestored [{c} + {s}], tmm0", "tilestored [{c} + {s} + 64], tmm1",
                c = in(reg) c, s = in(reg) c_stride * UNIT, options(nostack),
            );
            if HALVES == 2 {
                let c = c.wrapping_add(16 * c_stride);
                asm!(
                    "tilestored [{c} + {s}], tmm2", "tilestored [{c} + {s} + 64], tmm3",
                    c = in(reg) c, s = in(reg) c_stride * UNIT, options(nostack),
                );
            }
        }
    }
}

#[repr(C, align(64))]
struct Sums([[f32; 32]; 32]);

/// Adds the sums of a tile to C.
struct AddSums {
    sums: *const f32,
    rows: usize,
    c: *mut f32,
    c_stride: usize,
}

impl<const PLANES: usize> Op<Amx<PLANES>> for AddSums {
    type Out = ();
    #[inline(always)]
    unsafe fn run(self) {
        for r in 0..self.rows {
            for n in (0..32).step_by(F32x16::LANES) {
                // SAFETY: as promised by the caller of `tile`: C has 32 columns of these rows.
                unsafe {
                    let c = self.c.add(r * self.c_stride + n);
                    F32x16::load(c).add(F32x16::load(self.sums.add(r * 32 + n))).store(c);
                }
            }
        }
    }
}
