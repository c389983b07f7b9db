//! The sizes that the kernels can count.

use crate::{Error, Result};

/// Along rows: kernels count in 32 bits, and step past an end before they see it.
const ROWS: usize = 1 << 30;
/// Along a row: kernels count its bytes in 32 bits, also those of a gate row and an up row together.
const COLUMNS: usize = 1 << 27;

pub(crate) fn at_most(limit: usize, what: &'static str, given: usize) -> Result<i32> {
    match i32::try_from(given) {
        Ok(size) if given <= limit => Ok(size),
        _ => Err(Error::TooLarge { what, given, limit }),
    }
}

/// A number of rows, tokens, experts or tiles as kernels take it.
pub(crate) fn rows(what: &'static str, given: usize) -> Result<i32> {
    at_most(ROWS, what, given)
}

/// A number of columns as kernels take it.
pub(crate) fn columns(what: &'static str, given: usize) -> Result<i32> {
    at_most(COLUMNS, what, given)
}
