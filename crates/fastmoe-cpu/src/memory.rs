//! A pool of aligned buffers that are used again instead of being given back to the system.
//!
//! Fresh memory costs a page fault every 4 KiB, more than the arithmetic of a weight gradient; memory that
//! comes back from the last step is already mapped.

use crate::error::Error;
use crate::math::Real;
use memmap2::{MmapOptions, MmapRaw};
use std::collections::VecDeque;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut, RangeInclusive};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

const PAGE: usize = 4 << 10;
/// Buffers from this size on ask the system for pages of this size.
const HUGE: usize = 2 << 20;

/// A page-aligned block of memory, filled with whatever was there, at first zeros; dropping it puts it back into the
/// pool.
#[derive(Debug)]
pub struct Buffer(ManuallyDrop<MmapRaw>);

/// What the pool holds and how often it served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes waiting to be used again.
    pub cached_bytes: usize,
    /// Bytes in use.
    pub used_bytes: usize,
    /// Requests served from the pool.
    pub hits: usize,
    /// Requests that needed new memory.
    pub misses: usize,
}

#[derive(Default)]
struct Pool {
    /// Those that came back last are the last.
    free: VecDeque<MmapRaw>,
    /// Where blocks start that are in use and still as the system gave them.
    unwritten: Vec<usize>,
    stats: Stats,
}

fn pool() -> MutexGuard<'static, Pool> {
    static POOL: LazyLock<Mutex<Pool>> = LazyLock::new(Mutex::default);
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// At most this much waits in the pool: half of the machine's memory, or `FASTMOE_CACHE_MB`.
static LIMIT: LazyLock<Result<usize, Error>> =
    LazyLock::new(|| limit(std::env::var("FASTMOE_CACHE_MB").ok().as_deref()));

fn limit(given: Option<&str>) -> Result<usize, Error> {
    match given.filter(|text| !text.is_empty()) {
        None => Ok(physical_memory() / 2),
        Some(text) => match text.parse::<usize>() {
            Ok(mib) => Ok(mib.saturating_mul(1 << 20)),
            Err(_) => Err(Error::CacheSize { given: text.to_owned() }),
        },
    }
}

fn physical_memory() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text.split_whitespace().nth(1).and_then(|v| v.parse::<usize>().ok());
    kib.map_or(8 << 30, |kib| kib << 10)
}

/// Memory of the system's own, not of the C library's heap, which may keep what is given back to it.
fn fresh(len: usize, bytes: usize) -> Option<MmapRaw> {
    let block = MmapRaw::from(MmapOptions::new().len(len).map_anon().ok()?);
    #[cfg(target_os = "linux")]
    if len >= HUGE {
        // Advice that may be refused. The end is left out: a huge page of which little is used would cost its whole size.
        let _ = block.advise_range(memmap2::Advice::HugePage, 0, bytes - bytes % HUGE);
    }
    Some(block)
}

/// Takes `bytes` from the pool, or new memory where no waiting block fits.
///
/// # Errors
/// [`Error::OutOfMemory`], [`Error::CacheSize`].
pub fn alloc(bytes: usize) -> Result<Buffer, Error> {
    take_or_map(bytes).map(|(buffer, _)| buffer)
}

/// As `alloc`, for a caller who sees to it that nobody writes before `take_unwritten` is asked.
///
/// # Errors
/// As `alloc`.
pub fn alloc_unwritten(bytes: usize) -> Result<Buffer, Error> {
    let (buffer, is_new) = take_or_map(bytes)?;
    if is_new {
        pool().unwritten.push(buffer.as_mut_ptr().addr());
    }
    Ok(buffer)
}

/// Whether the block that starts here came from `alloc_unwritten` and is new: all of it is zeros, and none of it mapped.
/// Whoever asks may write; others are told no.
pub fn take_unwritten(start: *const u8) -> bool {
    pool().forget_unwritten(start)
}

/// A block, and whether it is new.
fn take_or_map(bytes: usize) -> Result<(Buffer, bool), Error> {
    LIMIT.clone()?;
    let out_of_memory = Error::OutOfMemory { bytes };
    let len = bytes.max(1).checked_next_multiple_of(if bytes >= HUGE { HUGE } else { PAGE });
    let len = len.ok_or_else(|| out_of_memory.clone())?;
    let outgrown = {
        let mut pool = pool();
        if let Some(block) = pool.take(len..=len + len / 8) {
            pool.stats.hits += 1;
            pool.stats.used_bytes += block.len();
            return Ok((Buffer(ManuallyDrop::new(block)), false));
        }
        // Sizes that follow the routing vary from step to step: a block that has just become too small is replaced.
        pool.take(len - len / 8..=len)
    };
    drop(outgrown);
    // The memory that is missing may be waiting for a request of another size.
    let retry = || {
        empty_cache();
        fresh(len, bytes)
    };
    let block = fresh(len, bytes).or_else(retry).ok_or(out_of_memory)?;
    let mut pool = pool();
    pool.stats.misses += 1;
    pool.stats.used_bytes += block.len();
    Ok((Buffer(ManuallyDrop::new(block)), true))
}

/// Gives all waiting memory back to the system.
pub fn empty_cache() {
    let blocks = {
        let mut pool = pool();
        pool.stats.cached_bytes = 0;
        std::mem::take(&mut pool.free)
    };
    drop(blocks);
}

/// The pool's counters.
pub fn stats() -> Stats {
    pool().stats
}

impl Pool {
    fn forget_unwritten(&mut self, start: *const u8) -> bool {
        let found = self.unwritten.iter().position(|&at| at == start.addr());
        found.map(|i| self.unwritten.swap_remove(i)).is_some()
    }

    /// The smallest waiting block with one of these lengths.
    fn take(&mut self, lengths: RangeInclusive<usize>) -> Option<MmapRaw> {
        let fits = |(_, block): &(usize, &MmapRaw)| lengths.contains(&block.len());
        let (best, _) = self.free.iter().enumerate().filter(fits).min_by_key(|(_, block)| block.len())?;
        let block = self.free.remove(best)?;
        self.stats.cached_bytes -= block.len();
        Some(block)
    }
}

impl Buffer {
    /// Start of the block.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.0.as_mut_ptr()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let limit = LIMIT.as_ref().copied().unwrap_or(0);
        // SAFETY: this is the buffer's end, after which nobody uses it.
        let block = unsafe { ManuallyDrop::take(&mut self.0) };
        let mut surplus = Vec::new();
        let mut pool = pool();
        pool.forget_unwritten(block.as_ptr());
        pool.stats.used_bytes -= block.len();
        pool.stats.cached_bytes += block.len();
        pool.free.push_back(block);
        while pool.stats.cached_bytes > limit
            && let Some(oldest) = pool.free.pop_front()
        {
            pool.stats.cached_bytes -= oldest.len();
            surplus.push(oldest);
        }
        drop(pool);
    }
}

/// A typed scratch array from the pool; its contents are whatever was there.
pub(crate) struct Scratch<T> {
    buffer: Buffer,
    numbers: std::marker::PhantomData<T>,
    len: usize,
}

impl<T: Real> Scratch<T> {
    /// Room for `len` numbers; throws [`Error::OutOfMemory`].
    pub fn new(len: usize) -> Self {
        let buffer = alloc(len.saturating_mul(size_of::<T>())).unwrap_or_else(|error| error.throw());
        Self { buffer, numbers: std::marker::PhantomData, len }
    }

    /// Room for `len` zeros.
    pub fn zeroed(len: usize) -> Self {
        let mut scratch = Self::new(len);
        scratch.fill(T::ZERO);
        scratch
    }

    /// Start of the array.
    pub fn ptr(&self) -> *mut T {
        self.buffer.as_mut_ptr().cast()
    }
}

impl<T: Real> Deref for Scratch<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: the buffer has room for len numbers, all of it has been written, and any bits are a number.
        unsafe { std::slice::from_raw_parts(self.ptr(), self.len) }
    }
}

impl<T: Real> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in deref, and the buffer is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All tests of a process share the pool; these empty it.
    static TURN: Mutex<()> = Mutex::new(());

    #[test]
    fn memory_comes_back() {
        let _turn = TURN.lock();
        let size = 12_345_678;
        let first = alloc(size).unwrap();
        let start = first.as_mut_ptr();
        drop(first);
        let again = alloc(size).unwrap();
        assert_eq!(start, again.as_mut_ptr());
        assert!(stats().hits > 0 && stats().used_bytes >= size);
    }

    #[test]
    fn memory_is_zero_at_first() {
        for len in [PAGE, 64 << 10, HUGE] {
            let block = fresh(len, len).unwrap();
            assert!(block.as_ptr().addr().is_multiple_of(PAGE));
            // SAFETY: the block has so many bytes.
            let bytes = unsafe { std::slice::from_raw_parts(block.as_ptr(), block.len()) };
            assert!(bytes.iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn only_a_new_block_is_unwritten_and_only_once() {
        let _turn = TURN.lock();
        empty_cache();
        let size = 23_456_789;
        let new = alloc_unwritten(size).unwrap();
        let start = new.as_mut_ptr();
        assert!(take_unwritten(start) && !take_unwritten(start));
        drop(new);
        let again = alloc_unwritten(size).unwrap();
        assert_eq!(again.as_mut_ptr(), start);
        assert!(!take_unwritten(start));
        let other = alloc(size).unwrap();
        assert!(!take_unwritten(other.as_mut_ptr()));
        let never_asked = alloc_unwritten(size).unwrap();
        let start = never_asked.as_mut_ptr();
        drop(never_asked);
        assert!(!take_unwritten(start));
    }

    #[test]
    fn what_no_system_has_is_an_error_and_not_counted() {
        let _turn = TURN.lock();
        for bytes in [usize::MAX, isize::MAX as usize, 1 << 60] {
            assert_eq!(alloc(bytes).unwrap_err(), Error::OutOfMemory { bytes });
        }
        assert!(stats().used_bytes < 1 << 60);
        let error = crate::error::catch(|| Scratch::<f64>::new(usize::MAX / 4).len()).unwrap_err();
        assert_eq!(error, Error::OutOfMemory { bytes: usize::MAX });
    }

    #[test]
    fn the_limit_is_a_number_of_mebibytes() {
        assert_eq!(limit(Some("3")), Ok(3 << 20));
        assert_eq!(limit(Some("0")), Ok(0));
        assert_eq!(limit(Some("99999999999999999")), Ok(usize::MAX));
        assert_eq!(limit(Some("")), limit(None));
        for given in ["2GB", "-1", "1.5"] {
            let error = limit(Some(given)).unwrap_err().to_string();
            assert_eq!(error, format!("FASTMOE_CACHE_MB: got '{given}', wanted a whole number of MiB"));
        }
    }
}
