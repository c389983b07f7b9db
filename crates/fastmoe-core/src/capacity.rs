//! At most C rows per expert: which rows stay.

use crate::error::named;
use crate::float::best_first;
use crate::plan::{ExpertId, PlanOut};
use crate::sort::{Layout, sort_by_expert};
use crate::{Error, Float, Parallel};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

/// Which rows an expert keeps when more than its capacity come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drop {
    /// The first ones by flat index.
    Position,
    /// Those of highest routing weight; among equal weights the lower flat index, NaN after every number.
    Score,
}

impl FromStr for Drop {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        named("drop", name, &[("position", Self::Position), ("score", Self::Score)])
    }
}

/// A limit on the rows of each expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// C, the most rows that an expert keeps; 0 drops everything.
    pub rows: usize,
    /// Which rows stay.
    pub drop: Drop,
    /// Give every expert exactly C sorted rows, the unused ones at its end.
    pub pad: bool,
}

/// The ids with -1 in place of every id whose row loses its seat to rows of higher weight.
///
/// `Err` is the flat index of the first id that is not an expert, when those are not to be dropped.
pub(crate) fn unseat_lowest<I: ExpertId, F: Float>(
    par: &dyn Parallel,
    layout: &Layout,
    capacity: usize,
    ids: &[I],
    weights: &[F],
) -> Result<Vec<i32>, usize> {
    let rows = ids.len();
    let mut counts = vec![0; layout.experts];
    let mut offsets = vec![0; layout.experts + 1];
    let mut by_expert = vec![0; rows];
    let mut kept = vec![0; rows];
    // With one slot per token the token that feeds a row is its flat index.
    let every_row = Layout { top_k: 1, limit: usize::MAX, padded_to: None, ..*layout };
    let out = PlanOut::<F> {
        counts: &mut counts,
        offsets: &mut offsets,
        gather: &mut by_expert,
        inverse: &mut kept,
        sorted_weights: None,
    };
    sort_by_expert(par, &every_row, ids, None, out)?;

    let mut rest = &mut by_expert[..];
    let groups: Vec<Mutex<&mut [i32]>> =
        counts.iter().filter_map(|&n| rest.split_off_mut(..n as usize)).map(Mutex::new).collect();
    par.run(groups.len(), &|e| {
        let mut group = groups[e].lock().unwrap_or_else(PoisonError::into_inner);
        if group.len() > capacity {
            let key = |&row: &i32| (weights[row as usize], row as u32);
            group.select_nth_unstable_by(capacity, |a, b| best_first(key(a), key(b)));
        }
    });
    for (kept, id) in kept.iter_mut().zip(ids) {
        *kept = id.expert(layout.experts).map_or(-1, |e| e as i32);
    }
    for group in groups {
        let group = group.into_inner().unwrap_or_else(PoisonError::into_inner);
        for &row in group.iter().skip(capacity) {
            kept[row as usize] = -1;
        }
    }
    Ok(kept)
}
