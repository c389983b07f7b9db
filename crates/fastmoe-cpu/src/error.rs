//! What can go wrong in this backend, whose callers have checked their arguments.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// `FASTMOE_CPU_ISA` names no instruction set of this machine.
    #[error("FASTMOE_CPU_ISA: got '{given}', wanted one of {available}")]
    Isa {
        /// The name given.
        given: String,
        /// The instruction sets of this machine.
        available: String,
    },
    /// `FASTMOE_CACHE_MB` is no number.
    #[error("FASTMOE_CACHE_MB: got '{given}', wanted a whole number of MiB")]
    CacheSize {
        /// The text given.
        given: String,
    },
    /// The system has no memory left.
    #[error("out of memory: {bytes} bytes are more than the system has left")]
    OutOfMemory {
        /// How many were asked for.
        bytes: usize,
    },
}

impl Error {
    /// Leaves parallel work, however deep inside, for the [`catch`] around it.
    pub(crate) fn throw(self) -> ! {
        resume_unwind(Box::new(self))
    }
}

/// What `work` returns, or what it has thrown; other panics go on.
pub(crate) fn catch<T>(work: impl FnOnce() -> T) -> Result<T, Error> {
    // What a broken call leaves behind are numbers in its outputs, which are then unspecified.
    catch_unwind(AssertUnwindSafe(work)).map_err(|cause: Box<dyn Any + Send>| {
        match cause.downcast::<Error>() {
            Ok(error) => *error,
            Err(panic) => resume_unwind(panic),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Threads;

    #[test]
    fn what_a_thread_throws_is_caught_around_all_of_them() {
        let error = Error::OutOfMemory { bytes: 7 };
        let broken = catch(|| {
            Threads::new(3).for_each(10, |i| {
                if i == 5 {
                    error.clone().throw()
                }
            })
        });
        assert_eq!(broken, Err(error));
        assert_eq!(catch(|| 1), Ok(1));
    }

    #[test]
    #[should_panic(expected = "a defect")]
    fn panics_are_not_caught() {
        let _ = catch(|| panic!("a defect"));
    }
}
