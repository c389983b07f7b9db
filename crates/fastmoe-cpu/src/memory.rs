//! A pool of aligned buffers that are used again instead of being given back to the system.
//!
//! Fresh memory costs a page fault every 4 KiB, more than the arithmetic of a weight gradient; memory that
//! comes back from the last step is already mapped.

use crate::math::Real;
use std::alloc::{Layout, dealloc, handle_alloc_error};
use std::collections::VecDeque;
use std::ops::{Deref, DerefMut, RangeInclusive};
use std::ptr::NonNull;
use std::sync::{LazyLock, Mutex, PoisonError};

const ALIGN: usize = 64;
/// Buffers from this size on start on a huge page and ask the kernel for huge pages.
const HUGE: usize = 2 << 20;

/// A 64-byte aligned block of uninitialised memory; dropping it puts it back into the pool.
pub struct Buffer {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a Buffer owns its memory and has no thread-bound state.
unsafe impl Send for Buffer {}

/// What the pool holds and how often it served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes waiting to be used again.
    pub cached_bytes: u64,
    /// Bytes in use.
    pub used_bytes: u64,
    /// Requests served from the pool.
    pub hits: u64,
    /// Requests that needed new memory.
    pub misses: u64,
}

#[derive(Default)]
struct Pool {
    free: VecDeque<Block>,
    stats: Stats,
}

impl Pool {
    /// The smallest waiting block with one of these lengths.
    fn take(&mut self, lengths: RangeInclusive<usize>) -> Option<Block> {
        let blocks = self.free.iter().enumerate().filter(|(_, block)| lengths.contains(&block.1));
        let (index, _) = blocks.min_by_key(|(_, block)| block.1)?;
        let block = self.free.remove(index)?;
        self.stats.cached_bytes -= block.1 as u64;
        Some(block)
    }
}

struct Block(NonNull<u8>, usize);

// SAFETY: a free block is owned by the pool alone.
unsafe impl Send for Block {}

static POOL: LazyLock<Mutex<Pool>> = LazyLock::new(Mutex::default);

/// At most this much waits in the pool: half of the machine's memory, or `FASTMOE_CACHE_MB`.
static LIMIT: LazyLock<usize> = LazyLock::new(|| {
    let set = std::env::var("FASTMOE_CACHE_MB").ok().and_then(|v| v.parse::<usize>().ok());
    set.map_or_else(|| physical_memory() / 2, |mb| mb << 20)
});

fn physical_memory() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text.split_whitespace().nth(1).and_then(|v| v.parse::<usize>().ok());
    kib.map_or(8 << 30, |kib| kib << 10)
}

fn layout(len: usize) -> Layout {
    let align = if len >= HUGE { HUGE } else { ALIGN };
    Layout::from_size_align(len, align).expect("a buffer fits the address space")
}

fn release(block: Block) {
    // SAFETY: the block was allocated with this layout and has no owner left.
    unsafe { dealloc(block.0.as_ptr(), layout(block.1)) }
}

/// Takes `bytes` from the pool, or new memory where no waiting block fits.
pub fn alloc(bytes: usize) -> Buffer {
    let len = bytes.max(1).next_multiple_of(if bytes >= HUGE { HUGE } else { ALIGN });
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    pool.stats.used_bytes += len as u64;
    if let Some(Block(start, len_found)) = pool.take(len..=len + len / 8) {
        pool.stats.used_bytes += (len_found - len) as u64;
        pool.stats.hits += 1;
        return Buffer { start, len: len_found };
    }
    pool.stats.misses += 1;
    // Sizes that follow the routing vary from step to step: a block that has just become too small is replaced.
    let outgrown = pool.take(len - len / 8..=len);
    drop(pool);
    outgrown.into_iter().for_each(release);
    // SAFETY: the layout is not empty.
    let Some(start) = NonNull::new(unsafe { std::alloc::alloc(layout(len)) }) else {
        handle_alloc_error(layout(len))
    };
    // Not for the end: a huge page of which little is used would cost its whole size.
    ask_for_huge_pages(start, bytes - bytes % HUGE);
    Buffer { start, len }
}

#[cfg(target_os = "linux")]
fn ask_for_huge_pages(start: NonNull<u8>, len: usize) {
    const MADV_HUGEPAGE: i32 = 14;
    unsafe extern "C" {
        fn madvise(start: *mut u8, len: usize, advice: i32) -> i32;
    }
    // SAFETY: the range is ours; the advice changes no contents, and a refusal is harmless.
    unsafe { madvise(start.as_ptr(), len, MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages(_start: NonNull<u8>, _len: usize) {}

/// Gives all waiting memory back to the system.
pub fn empty_cache() {
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    pool.stats.cached_bytes = 0;
    let blocks = std::mem::take(&mut pool.free);
    drop(pool);
    blocks.into_iter().for_each(release);
}

/// The pool's counters.
pub fn stats() -> Stats {
    POOL.lock().unwrap_or_else(PoisonError::into_inner).stats
}

impl Buffer {
    /// Start of the block.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Bytes of the block, at least what was asked for.
    #[expect(clippy::len_without_is_empty, reason = "a buffer is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Start and length, for an owner that gives them back to `from_raw`.
    pub fn into_raw(self) -> (*mut u8, usize) {
        let raw = (self.as_mut_ptr(), self.len);
        std::mem::forget(self);
        raw
    }

    /// The buffer behind `into_raw`.
    ///
    /// # Safety
    /// The two values come from one `into_raw` and are used once.
    pub unsafe fn from_raw(start: *mut u8, len: usize) -> Self {
        Self { start: NonNull::new(start).expect("a buffer's address is never null"), len }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        pool.stats.used_bytes -= self.len as u64;
        pool.stats.cached_bytes += self.len as u64;
        pool.free.push_back(Block(self.start, self.len));
        let mut surplus = Vec::new();
        while pool.stats.cached_bytes as usize > *LIMIT {
            let Some(oldest) = pool.free.pop_front() else { break };
            pool.stats.cached_bytes -= oldest.1 as u64;
            surplus.push(oldest);
        }
        drop(pool);
        surplus.into_iter().for_each(release);
    }
}

/// A typed scratch array from the pool; its contents are whatever was there.
pub(crate) struct Scratch<T> {
    buffer: Buffer,
    items: std::marker::PhantomData<T>,
    len: usize,
}

impl<T: Real> Scratch<T> {
    /// Room for `len` numbers.
    pub fn new(len: usize) -> Self {
        Self { buffer: alloc(len * size_of::<T>()), items: std::marker::PhantomData, len }
    }

    /// Room for `len` zeros.
    pub fn zeroed(len: usize) -> Self {
        let mut scratch = Self::new(len);
        // SAFETY: the buffer has room for len numbers, all of which accept any bits.
        unsafe { std::ptr::write_bytes(scratch.ptr(), 0, len) };
        scratch.len = len;
        scratch
    }

    /// Start of the array.
    pub fn ptr(&self) -> *mut T {
        self.buffer.as_mut_ptr().cast()
    }
}

impl<T> Deref for Scratch<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: the buffer has room for len numbers; every bit pattern is a number.
        unsafe { std::slice::from_raw_parts(self.buffer.as_mut_ptr().cast(), self.len) }
    }
}

impl<T> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in deref, and the buffer is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.as_mut_ptr().cast(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back() {
        let size = 12_345_678;
        let first = alloc(size);
        let start = first.as_mut_ptr();
        drop(first);
        let hits = stats().hits;
        let again = alloc(size);
        assert_eq!(start, again.as_mut_ptr());
        assert!(stats().hits > hits && stats().used_bytes >= size as u64);
        let (p, len) = again.into_raw();
        // SAFETY: the pair comes from into_raw just above.
        drop(unsafe { Buffer::from_raw(p, len) });
        empty_cache();
    }
}
