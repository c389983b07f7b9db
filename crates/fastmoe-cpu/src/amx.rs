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
            match (PLANES, t.rows, t.cols) {
                // Few rows gain nothing from tiles of 16.
                (1, 0..=4, _) => Avx512Pairs::tile(t),
                (1, 5..=16, _) => Registers::<1, 2>::tile(&mut t),
                (1, _, 0..=16) => Registers::<2, 1>::tile(&mut t),
                (1, ..) => Registers::<2, 2>::tile(&mut t),
                (_, 0..=16, _) => Registers::<1, 2>::planes_tile::<PLANES>(&mut t),
                _ => Registers::<2, 2>::planes_tile::<PLANES>(&mut t),
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

/// Bytes of a unit, and of a row of a panel.
const UNIT: usize = size_of::<f32>();
const PANEL: usize = 32 * UNIT;

/// The tile registers of a product: `DOWN` times 16 rows by `ACROSS` times 16 columns of sums in tmm0 to tmm3, a block of
/// rows of A in tmm4 and tmm5, a block of a panel of B in tmm6 and tmm7.
struct Registers<const DOWN: usize, const ACROSS: usize>;

impl<const DOWN: usize, const ACROSS: usize> Registers<DOWN, ACROSS> {
    #[inline(always)]
    unsafe fn zero() {
        // SAFETY: `begin` has set the tile shapes on this thread, and between the blocks nothing else uses tiles.
        unsafe {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem))
        }
    }

    /// Loads sums from C.
    #[inline(always)]
    unsafe fn load(c: *const f32, c_stride: usize) {
        let (c0, c1, s) = (c, c.wrapping_add(16 * c_stride), c_stride * UNIT);
        // SAFETY: as in `zero`; C has the rows and columns.
        unsafe {
            asm!("tileloadd tmm0, [{c} + {s}]", c = in(reg) c0, s = in(reg) s, options(nostack, readonly));
            if ACROSS == 2 {
                asm!("tileloadd tmm1, [{c} + {s} + 64]", c = in(reg) c0, s = in(reg) s, options(nostack, readonly));
            }
            if DOWN == 2 {
                asm!("tileloadd tmm2, [{c} + {s}]", c = in(reg) c1, s = in(reg) s, options(nostack, readonly));
            }
            if DOWN == 2 && ACROSS == 2 {
                asm!("tileloadd tmm3, [{c} + {s} + 64]", c = in(reg) c1, s = in(reg) s, options(nostack, readonly));
            }
        }
    }

    /// Stores sums to C.
    #[inline(always)]
    unsafe fn store(c: *mut f32, c_stride: usize) {
        let (c0, c1, s) = (c, c.wrapping_add(16 * c_stride), c_stride * UNIT);
        // SAFETY: as in `zero`; C has the rows and columns.
        unsafe {
            asm!("tilestored [{c} + {s}], tmm0", c = in(reg) c0, s = in(reg) s, options(nostack));
            if ACROSS == 2 {
                asm!("tilestored [{c} + {s} + 64], tmm1", c = in(reg) c0, s = in(reg) s, options(nostack));
            }
            if DOWN == 2 {
                asm!("tilestored [{c} + {s}], tmm2", c = in(reg) c1, s = in(reg) s, options(nostack));
            }
            if DOWN == 2 && ACROSS == 2 {
                asm!("tilestored [{c} + {s} + 64], tmm3", c = in(reg) c1, s = in(reg) s, options(nostack));
            }
        }
    }

    /// Loads a block of A.
    #[inline(always)]
    unsafe fn a(a: *const f32, a_stride: usize) {
        let (a0, a1, s) = (a, a.wrapping_add(16 * a_stride), a_stride * UNIT);
        // SAFETY: as in `zero`; A has the rows.
        unsafe {
            asm!("tileloadd tmm4, [{a} + {s}]", a = in(reg) a0, s = in(reg) s, options(nostack, readonly));
            if DOWN == 2 {
                asm!("tileloadd tmm5, [{a} + {s}]", a = in(reg) a1, s = in(reg) s, options(nostack, readonly));
            }
        }
    }

    /// Loads a block of a panel.
    #[inline(always)]
    unsafe fn b(b: *const f32) {
        // SAFETY: as in `zero`; the panel has the block.
        unsafe {
            asm!("tileloadd tmm6, [{b} + {s}]", b = in(reg) b, s = in(reg) PANEL, options(nostack, readonly));
            if ACROSS == 2 {
                asm!("tileloadd tmm7, [{b} + {s} + 64]", b = in(reg) b, s = in(reg) PANEL, options(nostack, readonly));
            }
        }
    }

    /// Adds the product of the blocks to the sums.
    #[inline(always)]
    unsafe fn multiply() {
        // SAFETY: as in `zero`.
        unsafe {
            asm!("tdpbf16ps tmm0, tmm4, tmm6", options(nostack, nomem));
            if ACROSS == 2 {
                asm!("tdpbf16ps tmm1, tmm4, tmm7", options(nostack, nomem));
            }
            if DOWN == 2 {
                asm!("tdpbf16ps tmm2, tmm5, tmm6", options(nostack, nomem));
            }
            if DOWN == 2 && ACROSS == 2 {
                asm!("tdpbf16ps tmm3, tmm5, tmm7", options(nostack, nomem));
            }
        }
    }

    /// Loads a block of A and one of a panel and adds their product. Loads that take turns with products are faster than
    /// loads before them (measured).
    #[inline(always)]
    unsafe fn multiply_block(a: *const f32, a_stride: usize, b: *const f32) {
        // SAFETY: as in `a` and `b`.
        unsafe {
            if DOWN < 2 || ACROSS < 2 {
                Self::a(a, a_stride);
                Self::b(b);
                return Self::multiply();
            }
            asm!(
                "tileloadd tmm4, [{a0} + {sa}]",
                "tileloadd tmm6, [{b} + {sb}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {sb} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a1} + {sa}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                a0 = in(reg) a, a1 = in(reg) a.wrapping_add(16 * a_stride), sa = in(reg) a_stride * UNIT,
                b = in(reg) b, sb = in(reg) PANEL,
                options(nostack, readonly),
            );
        }
    }

    /// The product of a tile of bf16. Its rows and columns are padded to whole registers by whoever allocates them.
    unsafe fn tile(t: &mut Tile<'_, f32>) {
        // SAFETY: as promised by the caller.
        unsafe {
            if t.update == TileUpdate::Add {
                Self::load(t.c, t.c_stride);
            } else {
                Self::zero();
            }
            for k in (0..t.units).step_by(BLOCK) {
                t.ahead.step();
                Self::multiply_block(t.a.add(k), t.a_stride, t.b.add(k * 32));
            }
            Self::store(t.c, t.c_stride);
        }
    }

    /// The product of a tile whose operands have several planes. Each block of the contraction starts at zero and with the
    /// products that are small, so that their sum is rounded as little as one of whole numbers.
    unsafe fn planes_tile<const PLANES: usize>(t: &mut Tile<'_, f32>) {
        let (a_start, a_stride, b_start) = (t.a, t.a_stride, t.b);
        let a = |k: usize, plane: usize| a_start.wrapping_add(k * PLANES + plane * BLOCK);
        let b = |k: usize, plane: usize| b_start.wrapping_add((k * PLANES + plane * BLOCK) * 32);
        // SAFETY: as promised by the caller.
        unsafe {
            Self::zero();
            for k in (0..t.units).step_by(BLOCK) {
                t.ahead.step();
                // Each product has an operand of the one before.
                Self::a(a(k, PLANES - 1), a_stride);
                Self::b(b(k, 0));
                Self::multiply();
                if PLANES == 3 {
                    Self::a(a(k, 1), a_stride);
                    Self::multiply();
                }
                Self::b(b(k, 1));
                Self::multiply();
                Self::a(a(k, 0), a_stride);
                Self::multiply();
                if PLANES == 3 {
                    Self::b(b(k, 2));
                    Self::multiply();
                }
            }
            for k in (0..t.units).step_by(BLOCK) {
                Self::a(a(k, 0), a_stride);
                Self::b(b(k, 0));
                Self::multiply();
            }
            if t.update == TileUpdate::Add {
                let mut sums = MaybeUninit::<Sums>::uninit();
                Self::store(sums.as_mut_ptr().cast(), 32);
                Amx::<PLANES>::call(AddSums {
                    sums: sums.as_ptr().cast(),
                    rows: 16 * DOWN,
                    c: t.c,
                    c_stride: t.c_stride,
                });
            } else {
                Self::store(t.c, t.c_stride);
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
