//! The K best experts of one token: key descending, then expert id ascending, NaN last.

use crate::Float;
use crate::float::best_first;
use std::hint::black_box;

/// Keys that the filter looks at together.
const LANES: usize = 16;
/// Keys that the filter may let through before a row is sorted instead.
const BUFFER: usize = 32;

/// Writes the ids of the `ids.len()` largest keys `values[j] + bias[j]`; `ids.len() <= values.len()`.
///
/// `scratch` keeps its allocation from row to row.
#[inline(always)]
pub(crate) fn top_k<F: Float>(
    values: &[F],
    bias: Option<&[F]>,
    ids: &mut [i64],
    scratch: &mut Vec<(F, u32)>,
) {
    let found = match ids.len() {
        0..=8 => by_filter::<F, 16>(values, bias, ids),
        9..=16 => by_filter::<F, 32>(values, bias, ids),
        _ => false,
    };
    if !found {
        by_sort(values, bias, ids, scratch);
    }
}

/// The K-th largest of L lane maxima is a lower bound of the K-th largest key, and few keys reach it: these are
/// collected in order of id and ranked.
///
/// False, and nothing written, in rows where less than K lanes hold a number above `-inf` or more keys reach the bound
/// than the buffer takes.
#[inline(always)]
fn by_filter<F: Float, const L: usize>(values: &[F], bias: Option<&[F]>, ids: &mut [i64]) -> bool {
    let k = ids.len();
    let mut maxima = [F::NEG_INFINITY; L];
    for at in (0..values.len()).step_by(L) {
        let keys: [F; L] = load(values, bias, at);
        for (max, key) in maxima.iter_mut().zip(keys) {
            *max = if key > *max { key } else { *max };
        }
    }
    let bound = kth_largest(&maxima, k);
    if bound == F::NEG_INFINITY {
        return false;
    }

    let mut keys = [F::NAN; BUFFER];
    let mut experts = [0; BUFFER];
    let mut found = 0;
    for at in (0..values.len()).step_by(LANES) {
        let mut reaching = 0_u32;
        for (i, key) in load::<F, LANES>(values, bias, at).into_iter().enumerate() {
            // From the top, because a shift by zero would be compiled apart from the others.
            reaching |= u32::from(key >= bound) << (31 - i);
        }
        while reaching != 0 {
            let expert = at + reaching.leading_zeros() as usize;
            reaching ^= 1 << 31 >> (expert - at);
            if found == BUFFER {
                return false;
            }
            keys[found] = bias.map_or(values[expert], |bias| values[expert] + bias[expert]);
            experts[found] = expert as u32;
            found += 1;
        }
    }

    let larger = count_larger(&keys, found);
    let mut equal_before = [0; BUFFER];
    for i in 0..found {
        let rank = larger[i] as usize % BUFFER;
        let place = rank + equal_before[rank];
        equal_before[rank] += 1;
        if let Some(id) = ids.get_mut(place) {
            *id = i64::from(experts[i]);
        }
    }
    true
}

/// The keys `at..at + L`, filled up with NaN, which never passes a bound.
#[inline(always)]
fn load<F: Float, const L: usize>(values: &[F], bias: Option<&[F]>, at: usize) -> [F; L] {
    let mut keys = chunk(values, at);
    if let Some(bias) = bias {
        for (key, bias) in keys.iter_mut().zip(chunk::<F, L>(bias, at)) {
            *key += bias;
        }
    }
    keys
}

#[inline(always)]
fn chunk<F: Float, const L: usize>(values: &[F], at: usize) -> [F; L] {
    let values = &values[at..];
    if let Some(chunk) = values.first_chunk() {
        return *chunk;
    }
    let mut chunk = [F::NAN; L];
    chunk[..values.len()].copy_from_slice(values);
    chunk
}

/// The k-th largest of L numbers: the one that most others are larger than, but less than k.
#[inline(always)]
fn kth_largest<F: Float, const L: usize>(numbers: &[F; L], k: usize) -> F {
    let larger = count_larger(numbers, black_box(L));
    let mut kth = 0;
    for (lane, &larger) in (0_u32..).zip(&larger) {
        let candidate = if larger < k as u32 { larger << 8 | lane } else { 0 };
        kth = kth.max(candidate);
    }
    numbers[(kth & 0xff) as usize % L]
}

/// For every number, how many of the first `n` are larger.
///
/// An `n` that the compiler does not know keeps the outer loop, and the inner one becomes vector code.
#[inline(always)]
fn count_larger<F: Float, const L: usize>(numbers: &[F; L], n: usize) -> [u32; L] {
    let mut larger = [0; L];
    for &other in numbers.iter().take(n) {
        for i in 0..L {
            larger[i] += u32::from(other > numbers[i]);
        }
    }
    larger
}

/// For any K: partition, then sort the best.
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
