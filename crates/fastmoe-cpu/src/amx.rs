//! bf16 on AMX: a tile is 32 rows by 32 columns, held in four tile registers.
//!
//! Operands are packed as for the AVX-512 dot products: a tile register of A is 16 rows of 16 pairs, one of B
//! 16 pairs by 16 columns, which is what a panel of pairs looks like in memory.

use crate::machine::{Avx512Pairs, BLOCK, Machine, Op, Tile, TileUpdate};
use crate::simd::F32x16;
use std::arch::asm;
use std::sync::LazyLock;

/// AMX for the products, AVX-512 for everything else.
#[derive(Clone, Copy)]
pub struct Amx;

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

impl Machine for Amx {
    type Acc = f32;
    type Cell = half::bf16;
    type V = F32x16;
    const PAIRS: bool = true;
    const ROWS: usize = 32;
    const ACROSS: usize = 2;
    const DEPTH: usize = 128;
    const WHOLE_TILES: bool = true;

    unsafe fn call<O: Op<Self>>(op: O) -> O::Out {
        #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn inside<O: Op<Amx>>(op: O) -> O::Out {
            // SAFETY: this function is compiled for the machine's instruction set.
            unsafe { op.run() }
        }
        // SAFETY: the caller has the instruction set.
        unsafe { inside(op) }
    }

    unsafe fn tile(mut t: Tile<'_, f32>) {
        // SAFETY: as promised by the caller; `begin` has set the tile shapes on this thread.
        unsafe {
            match t.rows {
                // Few rows gain nothing from tiles of 16.
                0..=4 => Avx512Pairs::tile(t),
                5..=16 => half_tile(&mut t),
                _ => full_tile(&mut t),
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
