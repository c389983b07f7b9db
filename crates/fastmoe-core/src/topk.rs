//! The K best experts of one token: key descending, then expert id ascending, NaN last.

use crate::Float;
use crate::float::best_first;

/// Writes the ids of the `ids.len()` largest keys `values[j] + bias[j]`; `ids.len() <= values.len()`.
///
/// `scratch` is used only above 16 ids and keeps its allocation from row to row.
#[inline(always)]
pub(crate) fn top_k<F: Float>(
    values: &[F],
    bias: Option<&[F]>,
    ids: &mut [i64],
    scratch: &mut Vec<(F, u32)>,
) {
    by_sort(values, bias, ids, scratch);
}

#[inline(always)]
fn by_sort<F: Float>(values: &[F], bias: Option<&[F]>, ids: &mut [i64], scratch: &mut Vec<(F, u32)>) {
    scratch.clear();
    match bias {
        None => scratch.extend(values.iter().copied().zip(0..)),
        Some(bias) => scratch.extend(values.iter().zip(bias).map(|(&v, &b)| v + b).zip(0..)),
    }
    scratch.select_nth_unstable_by(ids.len() - 1, |&a, &b| best_first(a, b));
    let best = &mut scratch[..ids.len()];
    best.sort_unstable_by(|&a, &b| best_first(a, b));
    for (id, &(_, expert)) in ids.iter_mut().zip(best.iter()) {
        *id = i64::from(expert);
    }
}
