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
    /// As many as rows, or none.
    weights: &'a mut [F],
}

impl<F: Float> Run<'_, F> {
    /// The row that now holds the token; `None` when the run is full.
    #[inline(always)]
    fn push(&mut self, token: i32, weight: Option<&F>) -> Option<i32> {
        let left = self.gather.len();
        *self.gather.next()? = token;
        if let Some(&weight) = weight {
            let row = self.weights.len() - left;
            self.weights[row] = weight;
        }
        Some(self.end - left as i32)
    }
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
                let weight = if WEIGHTED { weights.next() } else { None };
                let run = id.expert(runs.len()).map(|expert| &mut runs[expert]);
                *inverse = run.and_then(|run| run.push(token, weight)).unwrap_or(-1);
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
    let Layout { top_k, experts, out_of_range, .. } = *layout;
    let tokens = ids.len() / top_k;
    let chunks = (ids.len() / ROWS_PER_CHUNK.max(8 * experts)).clamp(1, par.threads().max(1));
    let chunk_rows = tokens.div_ceil(chunks).max(1) * top_k;
    let sorted_weights = out.sorted_weights.unwrap_or_default();
    let weights = weights.filter(|_| !sorted_weights.is_empty()).unwrap_or_default();
    let weights = weights.chunks(chunk_rows).chain(std::iter::repeat(&[][..]));

    let mut chunks: Vec<_> = ids
        .chunks(chunk_rows)
        .zip(out.inverse.chunks_mut(chunk_rows))
        .zip(weights)
        .enumerate()
        .map(|(i, ((ids, inverse), weights))| {
            Mutex::new(Chunk {
                first_token: i * chunk_rows / top_k,
                ids,
                weights,
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
    let mut counted: Vec<_> =
        chunks.iter_mut().map(|chunk| chunk.get_mut().unwrap_or_else(PoisonError::into_inner)).collect();
    let mut bad = counted.iter().filter_map(|chunk| Some(chunk.first_token * top_k + chunk.first_bad?));
    match bad.next() {
        Some(flat) if out_of_range == OutOfRange::Error => return Err(flat),
        _ => {}
    }
    share_rows(layout, &mut counted, out.counts, out.offsets, out.gather, sorted_weights);

    run(&chunks, &|chunk| chunk.fill(top_k));
    Ok(())
}

/// Cuts the sorted rows into runs, expert by expert and within an expert chunk by chunk.
fn share_rows<'a, I, F: Float>(
    layout: &Layout,
    chunks: &mut [&mut Chunk<'a, I, F>],
    counts: &mut [i32],
    offsets: &mut [i32],
    mut gather: &'a mut [i32],
    mut sorted_weights: &'a mut [F],
) {
    let mut row = 0;
    offsets[0] = 0;
    for expert in 0..layout.experts {
        let mut kept = 0;
        for chunk in &mut *chunks {
            let rows = (chunk.counts[expert] as usize).min(layout.limit - kept);
            kept += rows;
            chunk.runs.push(Run {
                end: (row + kept) as i32,
                gather: take(&mut gather, rows).iter_mut(),
                weights: take(&mut sorted_weights, rows),
            });
        }
        let owned = layout.padded_to.unwrap_or(kept);
        take(&mut gather, owned - kept).fill(-1);
        take(&mut sorted_weights, owned - kept).fill(F::ZERO);
        row += owned;
        counts[expert] = kept as i32;
        offsets[expert + 1] = row as i32;
    }
    gather.fill(-1);
    sorted_weights.fill(F::ZERO);
}

/// Cuts the first `n` elements off; nothing where there are none to write.
fn take<'a, T>(rest: &mut &'a mut [T], n: usize) -> &'a mut [T] {
    rest.split_off_mut(..n).unwrap_or_default()
}
