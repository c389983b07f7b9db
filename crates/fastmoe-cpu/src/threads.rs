//! Who does the work: torch's own OpenMP threads where torch has loaded them, else rayon.
//!
//! A second set of threads would fight the spinning workers of torch's pool for the same cores. A process that was
//! forked after its parent had worked in parallel gets threads of its own from rayon: those of the pools that it
//! inherits do not exist, and waiting for them would never end.

use fastmoe_core::Parallel;
use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, Once, PoisonError};

/// At most this many threads.
#[derive(Clone, Copy, Debug)]
pub struct Threads(pub(crate) usize);

/// More than any machine has. An OpenMP library ends the process when it cannot start all threads that it is asked for.
const MOST: usize = 1024;

impl Parallel for Threads {
    fn threads(&self) -> usize {
        self.0
    }
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.for_each(tasks, task);
    }
}

type GompParallel = unsafe extern "C" fn(unsafe extern "C" fn(*mut c_void), *mut c_void, u32, u32);

/// Address of `GOMP_parallel` in the OpenMP library that torch has loaded into this process, or 0.
static GOMP: AtomicUsize = AtomicUsize::new(0);

/// How many forks lie between the first parallel work and this process.
static FORKS: AtomicUsize = AtomicUsize::new(0);

/// Looks for torch's OpenMP library; to be called again once torch has been imported.
pub fn find_openmp() {
    if let Some(function) = find_gomp() {
        GOMP.store(function as usize, Ordering::Relaxed);
    }
}

fn gomp() -> Option<GompParallel> {
    static SEARCHED: Once = Once::new();
    SEARCHED.call_once(|| {
        count_forks();
        find_openmp();
    });
    if FORKS.load(Ordering::Relaxed) > 0 {
        return None;
    }
    let address = GOMP.load(Ordering::Relaxed);
    // SAFETY: an address other than 0 was stored by `find_openmp` from a function of this type.
    (address != 0).then(|| unsafe { std::mem::transmute::<usize, GompParallel>(address) })
}

fn count_forks() {
    unsafe extern "C" {
        fn pthread_atfork(
            prepare: Option<extern "C" fn()>,
            parent: Option<extern "C" fn()>,
            child: Option<extern "C" fn()>,
        ) -> i32;
    }
    extern "C" fn forked() {
        FORKS.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the signature is that of POSIX; `forked` only touches an atomic, as a child of many threads may, and
    // this library is never unloaded. Without memory for the handler a child works as if there were no forks.
    unsafe { pthread_atfork(None, None, Some(forked)) };
}

#[cfg(target_os = "linux")]
fn find_gomp() -> Option<GompParallel> {
    use libloading::os::unix::{Library, RTLD_LAZY};
    const RTLD_NOLOAD: i32 = 4;
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let libraries = maps.lines().filter_map(|line| {
        let path = &line[line.find('/')?..];
        path.rsplit('/').next()?.starts_with("libgomp").then_some(path)
    });
    // Others may have brought one of their own, as scikit-learn does.
    let path = libraries.max_by_key(|path| path.contains("/torch"))?;
    // SAFETY: the library is already loaded (NOLOAD), so no initialiser runs; it is never unloaded because
    // the handle is forgotten; GOMP_parallel has had this signature since OpenMP 4.0 support in gcc 4.9.
    unsafe {
        let library = Library::open(Some(path), RTLD_LAZY | RTLD_NOLOAD).ok()?;
        let function = *library.get::<GompParallel>(b"GOMP_parallel\0").ok()?;
        std::mem::forget(library);
        Some(function)
    }
}

#[cfg(not(target_os = "linux"))]
fn find_gomp() -> Option<GompParallel> {
    None
}

/// Name of the pool in use.
pub(crate) fn pool_name() -> &'static str {
    if gomp().is_some() { "openmp" } else { "rayon" }
}

impl Threads {
    /// One thread at least, and no more than there is a use for.
    pub fn new(most: usize) -> Self {
        Self(most.clamp(1, MOST))
    }

    /// Calls `task(0..tasks)`, each once, in any order, and returns when all are done.
    ///
    /// A panic in a task is raised again here, after the others have ended.
    pub fn for_each(self, tasks: usize, task: impl Fn(usize) + Sync) {
        let threads = self.0.min(tasks);
        if threads <= 1 {
            (0..tasks).for_each(task);
            return;
        }
        let next = AtomicUsize::new(0);
        let panic: Mutex<Option<Box<dyn Any + Send>>> = Mutex::new(None);
        let worker = || {
            let run = || {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= tasks {
                        break;
                    }
                    task(i);
                }
            };
            if let Err(cause) = catch_unwind(AssertUnwindSafe(run)) {
                next.store(tasks, Ordering::Relaxed);
                *panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(cause);
            }
        };
        match gomp() {
            Some(parallel) => run_on_openmp(parallel, threads, &worker),
            None => match own_pool() {
                Some(pool) => pool.scope(|scope| {
                    for _ in 1..threads {
                        scope.spawn(|_| worker());
                    }
                    worker();
                }),
                None => worker(),
            },
        }
        if let Some(cause) = panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(cause);
        }
    }
}

fn run_on_openmp(parallel: GompParallel, threads: usize, worker: &(dyn Fn() + Sync)) {
    unsafe extern "C" fn enter(worker: *mut c_void) {
        // SAFETY: `worker` points to the fat reference below, which outlives the parallel region.
        unsafe { (*worker.cast::<&(dyn Fn() + Sync)>())() }
    }
    let mut worker = worker;
    // SAFETY: GOMP_parallel calls `enter` with our pointer on its team and returns when all have ended; the
    // worker catches panics, so none crosses the C frames.
    unsafe { parallel(enter, (&raw mut worker).cast(), threads as u32, 0) }
}

/// Threads of this process alone, as many as the machine has; `None` where the system starts no more.
fn own_pool() -> Option<&'static rayon::ThreadPool> {
    static POOL: Mutex<Option<(usize, &'static rayon::ThreadPool)>> = Mutex::new(None);
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let forks = FORKS.load(Ordering::Relaxed);
    if pool.is_none_or(|(of, _)| of != forks) {
        let built = rayon::ThreadPoolBuilder::new().thread_name(|i| format!("fastmoe-{i}")).build().ok()?;
        *pool = Some((forks, Box::leak(Box::new(built))));
    }
    pool.map(|(_, pool)| pool)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        let seen: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
        Threads::new(3).for_each(seen.len(), |i| {
            seen[i].fetch_add(1, Ordering::Relaxed);
        });
        assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 1));
    }

    #[test]
    #[should_panic(expected = "task 5")]
    fn a_panic_reaches_the_caller() {
        Threads::new(2).for_each(10, |i| assert!(i != 5, "task 5"));
    }
}
