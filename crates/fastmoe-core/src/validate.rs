//! Makes a plan from outside safe to execute.

use crate::Error;

/// Checks every index of a plan, in time linear in its length.
///
/// Afterwards each expert owns rows that exist, each row is fed by a token that exists, and each (t, k) that is not
/// dropped points at a row inside an expert that token t feeds, so that a backend never reads a row that it did not
/// compute, nor lets two tokens write one row. Two slots of a token may name one row, and a row may be named by none.
///
/// # Errors
/// The first of [`Error::Length`], [`Error::Offset`], [`Error::Gather`], [`Error::Inverse`], [`Error::Mismatch`].
pub fn validate_plan(
    tokens: usize,
    top_k: usize,
    experts: usize,
    offsets: &[i32],
    gather: &[i32],
    inverse: &[i32],
) -> Result<(), Error> {
    length("offsets", offsets.len(), experts + 1)?;
    length("inverse", inverse.len(), tokens.saturating_mul(top_k))?;
    validate_offsets(offsets, gather.len())?;
    validate_gather(gather, tokens)?;
    validate_inverse(inverse, top_k, offsets[experts] as usize)?;
    let fed_by = |row: i32| gather[row as usize];
    let mismatch = |(flat, row): (usize, i32)| row >= 0 && fed_by(row) as usize != flat / top_k;
    match inverse.iter().copied().enumerate().find(|&entry| mismatch(entry)) {
        None => Ok(()),
        Some((flat, given)) => {
            Err(Error::Mismatch { token: flat / top_k, slot: flat % top_k, given, fed_by: fed_by(given) })
        }
    }
}

/// Checks that `offsets [E+1]` start at 0, never go down and end at or before `rows`.
///
/// # Errors
/// [`Error::Length`] when empty, [`Error::Offset`] for the first bad one.
pub fn validate_offsets(offsets: &[i32], rows: usize) -> Result<(), Error> {
    let mut least = 0;
    for (index, &given) in offsets.iter().enumerate() {
        if given < least || given as usize > rows || index == 0 && given != 0 {
            let wanted = if index == 0 { "0".into() } else { format!("{least} to {rows}") };
            return Err(Error::Offset { index, given, wanted });
        }
        least = given;
    }
    if offsets.is_empty() { length("offsets", 0, 1) } else { Ok(()) }
}

/// Checks that every entry of `gather` is a token in `0..tokens` or -1.
///
/// # Errors
/// [`Error::Gather`] for the first bad one.
pub fn validate_gather(gather: &[i32], tokens: usize) -> Result<(), Error> {
    match first_outside(gather, tokens) {
        None => Ok(()),
        Some(row) => Err(Error::Gather { row, given: gather[row], tokens }),
    }
}

/// Checks that every entry of `inverse [T,K]` is a sorted row in `0..rows` or -1.
///
/// # Errors
/// [`Error::Inverse`] for the first bad one.
pub fn validate_inverse(inverse: &[i32], top_k: usize, rows: usize) -> Result<(), Error> {
    match first_outside(inverse, rows) {
        None => Ok(()),
        Some(flat) => {
            Err(Error::Inverse { token: flat / top_k, slot: flat % top_k, given: inverse[flat], rows })
        }
    }
}

/// Checks that every id of `ids [T,K]` is an expert in `0..experts`.
///
/// # Errors
/// [`Error::ExpertId`] for the first bad one.
pub fn validate_ids(ids: &[i64], top_k: usize, experts: usize) -> Result<(), Error> {
    let outside = |&id: &i64| !(0..experts as i64).contains(&id);
    match ids.iter().position(outside) {
        None => Ok(()),
        Some(flat) => {
            Err(Error::ExpertId { token: flat / top_k, slot: flat % top_k, given: ids[flat], experts })
        }
    }
}

/// Position of the first index that is neither -1 nor in `0..limit`.
fn first_outside(indices: &[i32], limit: usize) -> Option<usize> {
    let outside = |&index: &i32| index < -1 || i64::from(index) >= limit as i64;
    // Without an early exit the scan of a good plan is vector code.
    let any = indices.iter().fold(false, |any, index| any | outside(index));
    if any { indices.iter().position(outside) } else { None }
}

fn length(argument: &'static str, given: usize, wanted: usize) -> Result<(), Error> {
    if given == wanted { Ok(()) } else { Err(Error::Length { argument, given, wanted }) }
}
