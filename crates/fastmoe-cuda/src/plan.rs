//! The routing plan on the device, equal to that of `fastmoe-core` to the bit: the launches of `plan.cu`.

use crate::{Buffer, Queue, Result, limits, scratch_size};
use fastmoe_core::{Drop, PlanSpec};

/// Rows of a tile of the counting sort, and tiles that a block works at.
const TILE: usize = 512;
const TILES_OF_BLOCK: usize = 4;
/// Experts of a block of the scan.
const EXPERTS_OF_BLOCK: usize = 32;
/// Experts and rows of a plan that one block makes alone, in one launch instead of three.
const SMALL_EXPERTS: usize = 1024;
const SMALL_ROWS: usize = 4096;

/// A plan to make, and where it goes; the shapes are those of [`fastmoe_core::PlanOut`].
#[derive(Clone, Copy)]
pub struct Plan<'a> {
    /// Sizes, capacity and drops. Ids out of range are always dropped.
    pub spec: &'a PlanSpec,
    /// Whether ids are 64 bits wide, rather than 32.
    pub wide_ids: bool,
    /// `[T, K]`.
    pub ids: Buffer,
    /// `[T, K]` f32, or null.
    pub weights: Buffer,
    /// `[E]`.
    pub counts: Buffer,
    /// `[E + 1]`.
    pub offsets: Buffer,
    /// `[N]`.
    pub gather: Buffer,
    /// `[T, K]`.
    pub inverse: Buffer,
    /// `[N]` f32, or null.
    pub sorted_weights: Buffer,
    /// Whether to wait for the device and tell the first flat row whose id is out of range, and that id.
    pub check: bool,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    ids: u64,
    weights: u64,
    counts: u64,
    offsets: u64,
    gather: u64,
    inverse: u64,
    sorted_weights: u64,
    bad_row: u64,
    workspace: u64,
    rows: i32,
    top_k: i32,
    experts: i32,
    capacity: i32,
    pad: i32,
    drop_by_score: i32,
}

impl Plan<'_> {
    fn drops_by_score(&self) -> bool {
        self.spec.capacity.is_some_and(|capacity| capacity.drop == Drop::Score)
    }

    fn workspace(&self) -> usize {
        let rows = self.spec.tokens * self.spec.top_k;
        let counts = (rows.div_ceil(TILE) + 1) * self.spec.experts;
        4 * (counts + if self.drops_by_score() { rows } else { 0 })
    }

    /// Bytes of scratch memory.
    pub fn scratch(&self) -> usize {
        scratch_size(self.workspace()) + if self.check { scratch_size(4) } else { 0 }
    }

    /// # Safety
    /// The buffers have the sizes of the spec and stay until the kernels have run.
    pub unsafe fn launch(&self, queue: &mut Queue<'_>) -> Result<Option<(usize, i64)>> {
        let rows = self.spec.tokens * self.spec.top_k;
        limits::rows("sorted rows", self.spec.rows())?;
        let workspace = queue.take("workspace", self.workspace());
        let bad_row = if self.check { queue.take("bad_row", 4) } else { Buffer::default() };
        let capacity = self.spec.capacity;
        let params = Params {
            ids: self.ids.address,
            weights: self.weights.address,
            counts: self.counts.address,
            offsets: self.offsets.address,
            gather: self.gather.address,
            inverse: self.inverse.address,
            sorted_weights: self.sorted_weights.address,
            bad_row: bad_row.address,
            workspace: workspace.address,
            rows: limits::rows("T*K (routed rows)", rows)?,
            top_k: limits::rows("K (experts per token)", self.spec.top_k)?,
            experts: limits::rows("E (experts)", self.spec.experts)?,
            capacity: capacity.map_or(i32::MAX, |c| c.rows.try_into().unwrap_or(i32::MAX)),
            pad: capacity.is_some_and(|c| c.pad).into(),
            drop_by_score: self.drops_by_score().into(),
        };
        let [ids, weights] = [self.ids, self.weights].map(Buffer::read);
        let [counts, offsets] = [self.counts, self.offsets].map(Buffer::write);
        let [gather, inverse, sorted_weights] =
            [self.gather, self.inverse, self.sorted_weights].map(Buffer::write);
        let [workspace, first_bad] = [workspace, bad_row].map(Buffer::read_write);
        let blocks = rows.div_ceil(TILE).div_ceil(TILES_OF_BLOCK).max(1);
        let id = if self.wide_ids { "i64" } else { "i32" };
        // SAFETY: this is the struct of all these kernels, and as promised by the caller.
        unsafe {
            if self.check {
                queue.set_word(bad_row, i32::MAX)?;
            }
            if rows.max(self.spec.rows()) <= SMALL_ROWS && self.spec.experts <= SMALL_EXPERTS {
                let memory =
                    [ids, weights, workspace, first_bad, counts, offsets, gather, inverse, sorted_weights];
                queue.launch(&["plan_small", id], 1, &params, &memory)?;
            } else {
                let memory = [ids, workspace, first_bad];
                queue.launch(&["plan_count", id], blocks, &params, &memory)?;
                let memory = [workspace, counts];
                queue.launch(
                    &["plan_scan"],
                    self.spec.experts.div_ceil(EXPERTS_OF_BLOCK),
                    &params,
                    &memory,
                )?;
                let memory = [ids, weights, workspace, offsets, gather, inverse, sorted_weights];
                queue.launch(&["plan_scatter", id], blocks, &params, &memory)?;
            }
            if self.drops_by_score() {
                let memory = [weights, workspace, offsets, gather, inverse, sorted_weights];
                queue.launch(&["plan_seat"], self.spec.experts.max(1), &params, &memory)?;
            }
            if self.check {
                let row = match queue.read(bad_row)?[0] {
                    i32::MAX => return Ok(None),
                    row => row as usize,
                };
                let bytes = if self.wide_ids { 8 } else { 4 };
                let id = queue.read(Buffer {
                    address: self.ids.address + (row * bytes) as u64,
                    bytes,
                    ..self.ids
                })?;
                let high = id.get(1).copied().unwrap_or(id[0] >> 31);
                return Ok(Some((row, i64::from(high) << 32 | i64::from(id[0] as u32))));
            }
        }
        Ok(None)
    }
}
