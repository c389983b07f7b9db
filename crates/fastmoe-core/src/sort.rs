//! The stable counting sort of rows by expert, parallel over chunks of tokens.
//!
//! Each chunk counts its rows per expert; a scan over (expert, chunk) gives every chunk its own run of sorted rows in
//! each expert, cut out of the output as a slice; each chunk then fills its runs in flat order. A run that is full
//! because of the capacity drops what comes after.

use crate::plan::{ExpertId, OutOfRange, PlanOut};
use crate::{Float, Parallel};
use std::slice::IterMut;
use std::sync::{Mutex, PoisonError};

/// Fewer rows than this are not worth a thread.
const ROWS_PER_CHUNK: usize = 16 * 1024;

/// The shape of the sorted rows.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    pub top_k: usize,
    pub experts: usize,
    /// The most rows that an expert keeps.
    pub limit: usize,
    /// The rows that every expert owns, used or not.
    pub padded_to: Option<usize>,
    pub out_of_range: OutOfRange,
}

/// The sorted rows that one chunk fills for one expert.
struct Run<'a, F> {
    /// The row after the last one.
    end: i32,
    gather: IterMut<'a, i32>,
    weights: IterMut<'a, F>,
}

struct Chunk<'a, I, F> {
    first_token: usize,
    ids: &'a [I],
    /// As many as ids, or none.
    weights: &'a [F],
    inverse: &'a mut [i32],
    counts: Vec<u32>,
    runs: Vec<Run<'a, F>>,
    first_bad: Option<usize>,
}

impl<I: ExpertId, F: Float> Chunk<'_, I, F> {
    fn count(&mut self) {
        let counts = &mut self.counts[..];
        for (i, id) in self.ids.iter().enumerate() {
            match id.expert(counts.len()) {
                Some(expert) => counts[expert] += 1,
                None if self.first_bad.is_none() => self.first_bad = Some(i),
                None => {}
            }
        }
    }

    fn fill(&mut self, top_k: usize) {
        if self.weights.is_empty() { self.fill_runs::<false>(top_k) } else { self.fill_runs::<true>(top_k) }
    }

    fn fill_runs<const WEIGHTED: bool>(&mut self, top_k: usize) {
        let runs = &mut self.runs[..];
        let mut weights = self.weights.iter();
        let slots = self.ids.chunks_exact(top_k).zip(self.inverse.chunks_exact_mut(top_k));
        for (token, (ids, inverse)) in (self.first_token as i32..).zip(slots) {
            for (id, inverse) in ids.iter().zip(inverse) {
                *inverse = -1;
                let weight = if WEIGHTED { weights.next() } else { None };
                let Some(expert) = id.expert(runs.len()) else { continue };
                let run = &mut runs[expert];
                let left = run.gather.len() as i32;
                let Some(fed_by) = run.gather.next() else { continue };
                *fed_by = token;
                *inverse = run.end - left;
                if let Some(&weight) = weight
                    && let Some(sorted) = run.weights.next()
                {
                    *sorted = weight;
                }
            }
        }
    }
}

/// Writes the plan; the lengths have been checked. `Err` is the flat index of the first id that is no expert.
pub(crate) fn sort_by_expert<I: ExpertId, F: Float>(
    par: &dyn Parallel,
    layout: &Layout,
    ids: &[I],
    weights: Option<&[F]>,
    out: PlanOut<'_, F>,
) -> Result<(), usize> {
    let Layout { top_k, experts, limit, padded_to, out_of_range } = *layout;
    let tokens = ids.len() / top_k;
    let chunks = (ids.len() / ROWS_PER_CHUNK.max(8 * experts)).clamp(1, par.threads().max(1));
    let chunk_rows = tokens.div_ceil(chunks).max(1) * top_k;
    let mut sorted_weights = out.sorted_weights.unwrap_or_default();
    let weights = weights.filter(|_| !sorted_weights.is_empty()).unwrap_or_default();

    let mut chunks: Vec<_> = ids
        .chunks(chunk_rows)
        .zip(out.inverse.chunks_mut(chunk_rows))
        .enumerate()
        .map(|(i, (ids, inverse))| {
            Mutex::new(Chunk {
                first_token: i * chunk_rows / top_k,
                ids,
                weights: weights
                    .get(i * chunk_rows..)
                    .map_or(&[][..], |rest| &rest[..rest.len().min(chunk_rows)]),
                inverse,
                counts: vec![0; experts],
                runs: Vec::with_capacity(experts),
                first_bad: None,
            })
        })
        .collect();
    let run = |chunks: &[Mutex<Chunk<'_, I, F>>], work: &(dyn Fn(&mut Chunk<'_, I, F>) + Sync)| {
        par.run(chunks.len(), &|i| work(&mut chunks[i].lock().unwrap_or_else(PoisonError::into_inner)));
    };

    run(&chunks, &|chunk| chunk.count());
    let mut chunks_mut: Vec<_> =
        chunks.iter_mut().map(|chunk| chunk.get_mut().unwrap_or_else(PoisonError::into_inner)).collect();
    if out_of_range == OutOfRange::Error {
        for chunk in &chunks_mut {
            if let Some(bad) = chunk.first_bad {
                return Err(chunk.first_token * top_k + bad);
            }
        }
    }

    let mut gather = out.gather;
    let mut row = 0;
    out.offsets[0] = 0;
    for expert in 0..experts {
        let mut kept = 0;
        for chunk in &mut chunks_mut {
            let rows = (chunk.counts[expert] as usize).min(limit - kept);
            kept += rows;
            chunk.runs.push(Run {
                end: (row + kept) as i32,
                gather: take(&mut gather, rows).iter_mut(),
                weights: take(&mut sorted_weights, rows).iter_mut(),
            });
        }
        out.counts[expert] = kept as i32;
        let owned = padded_to.unwrap_or(kept);
        take(&mut gather, owned - kept).fill(-1);
        take(&mut sorted_weights, owned - kept).fill(F::ZERO);
        row += owned;
        out.offsets[expert + 1] = row as i32;
    }
    gather.fill(-1);
    sorted_weights.fill(F::ZERO);

    run(&chunks, &|chunk| chunk.fill(top_k));
    Ok(())
}

/// Cuts the first `n` elements off; nothing where there are none to write.
fn take<'a, T>(rest: &mut &'a mut [T], n: usize) -> &'a mut [T] {
    rest.split_off_mut(..n).unwrap_or_default()
}
