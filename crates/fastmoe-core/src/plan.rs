//! The routing plan: which rows each expert computes, and where each token finds its rows again.

use crate::capacity::unseat_lowest;
use crate::error::named;
use crate::sort::{Layout, sort_by_expert};
use crate::{Capacity, Drop, Error, Float, Parallel};
use std::str::FromStr;

/// An integer type that expert ids come in: `i32` or `i64`.
pub trait ExpertId: Copy + Send + Sync {
    /// The id as it is reported.
    fn to_i64(self) -> i64;
    /// The expert, when the id is in `0..experts`.
    fn expert(self, experts: usize) -> Option<usize>;
}

impl ExpertId for i32 {
    #[inline(always)]
    fn to_i64(self) -> i64 {
        self.into()
    }

    #[inline(always)]
    fn expert(self, experts: usize) -> Option<usize> {
        i64::from(self).expert(experts)
    }
}

impl ExpertId for i64 {
    #[inline(always)]
    fn to_i64(self) -> i64 {
        self
    }

    #[inline(always)]
    fn expert(self, experts: usize) -> Option<usize> {
        ((self as u64) < experts as u64).then_some(self as usize)
    }
}

/// What happens to an id outside `0..E`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutOfRange {
    /// The plan is refused with [`Error::ExpertId`].
    Error,
    /// The row is dropped.
    Drop,
}

impl FromStr for OutOfRange {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        named("out_of_range", name, &[("error", Self::Error), ("drop", Self::Drop)])
    }
}

/// The plan to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanSpec {
    /// T.
    pub tokens: usize,
    /// K.
    pub top_k: usize,
    /// E.
    pub experts: usize,
    /// The limit per expert; `None` drops nothing.
    pub capacity: Option<Capacity>,
    /// What happens to ids that are no expert.
    pub out_of_range: OutOfRange,
}

/// Where the plan is written; every element is.
#[derive(Debug)]
pub struct PlanOut<'a, F> {
    /// `[E]` rows kept per expert.
    pub counts: &'a mut [i32],
    /// `[E+1]` expert e owns the sorted rows `offsets[e]..offsets[e+1]`; with padding exactly C each.
    pub offsets: &'a mut [i32],
    /// `[rows()]` token that feeds each sorted row, -1 in unused rows.
    pub gather: &'a mut [i32],
    /// `[T*K]` sorted row of each (t, k), -1 where dropped.
    pub inverse: &'a mut [i32],
    /// `[rows()]` routing weights in sorted order, 0 in unused rows.
    pub sorted_weights: Option<&'a mut [F]>,
}

impl PlanSpec {
    /// Length of `gather`: `E*C` with padding, else `R = T*K` (saturating).
    pub fn rows(&self) -> usize {
        match self.capacity {
            Some(Capacity { rows, pad: true, .. }) => self.experts.saturating_mul(rows),
            _ => self.tokens.saturating_mul(self.top_k),
        }
    }

    /// Sorts the rows by expert, stably (within an expert by flat index), in time linear in R.
    ///
    /// `ids [T,K]` may name an expert twice in a row; `weights [T,K]` are needed for [`Drop::Score`] and for
    /// `sorted_weights`. The result does not depend on the number of threads.
    ///
    /// # Errors
    /// [`Error::TopK`], [`Error::Length`], [`Error::TooManyRows`], [`Error::MissingWeights`] for a wrong request;
    /// [`Error::ExpertId`] for the first id outside `0..E`. What `out` then holds is unspecified.
    pub fn build<I: ExpertId, F: Float>(
        &self,
        par: &dyn Parallel,
        ids: &[I],
        weights: Option<&[F]>,
        out: PlanOut<'_, F>,
    ) -> Result<(), Error> {
        self.check(ids, weights, &out)?;
        let layout = Layout {
            top_k: self.top_k,
            experts: self.experts,
            limit: self.capacity.map_or(usize::MAX, |capacity| capacity.rows),
            padded_to: self.capacity.filter(|capacity| capacity.pad).map(|capacity| capacity.rows),
            out_of_range: self.out_of_range,
        };
        let sorted = match (self.capacity, weights) {
            (Some(Capacity { rows, drop: Drop::Score, .. }), Some(by)) => {
                unseat_lowest(par, &layout, rows, ids, by).and_then(|seated| {
                    let layout = Layout { out_of_range: OutOfRange::Drop, ..layout };
                    sort_by_expert(par, &layout, &seated, weights, out)
                })
            }
            _ => sort_by_expert(par, &layout, ids, weights, out),
        };
        sorted.map_err(|flat| Error::ExpertId {
            token: flat / self.top_k,
            slot: flat % self.top_k,
            given: ids[flat].to_i64(),
            experts: self.experts,
        })
    }

    /// Whether such a plan can be made, with or without weights given and sorted weights wanted.
    ///
    /// # Errors
    /// [`Error::TopK`], [`Error::TooManyRows`], [`Error::MissingWeights`].
    pub fn check_request(&self, has_weights: bool, wants_weights: bool) -> Result<(), Error> {
        self.check_size()?;
        self.check_weights(has_weights, wants_weights)
    }

    fn check_size(&self) -> Result<(), Error> {
        if self.top_k == 0 {
            return Err(Error::TopK { given: 0, experts: self.experts });
        }
        let routed = self.tokens.saturating_mul(self.top_k);
        for (argument, given) in [("tokens * top_k", routed), ("num_experts * capacity", self.rows())] {
            if given > i32::MAX as usize {
                return Err(Error::TooManyRows { argument, given });
            }
        }
        Ok(())
    }

    fn check_weights(&self, has_weights: bool, wants_weights: bool) -> Result<(), Error> {
        let by_score = self.capacity.is_some_and(|capacity| capacity.drop == Drop::Score);
        match (by_score, wants_weights) {
            (true, _) if !has_weights => Err(Error::MissingWeights { needed_by: "drop='score'" }),
            (_, true) if !has_weights => Err(Error::MissingWeights { needed_by: "sorted_weights" }),
            _ => Ok(()),
        }
    }

    fn check<I, F>(&self, ids: &[I], weights: Option<&[F]>, out: &PlanOut<'_, F>) -> Result<(), Error> {
        self.check_size()?;
        let routed = self.tokens * self.top_k;
        let lengths = [
            ("ids", ids.len(), routed),
            ("weights", weights.map_or(routed, <[F]>::len), routed),
            ("counts", out.counts.len(), self.experts),
            ("offsets", out.offsets.len(), self.experts + 1),
            ("gather", out.gather.len(), self.rows()),
            ("inverse", out.inverse.len(), routed),
            ("sorted_weights", out.sorted_weights.as_ref().map_or(self.rows(), |w| w.len()), self.rows()),
        ];
        for (argument, given, wanted) in lengths {
            if given != wanted {
                return Err(Error::Length { argument, given, wanted });
            }
        }
        self.check_weights(weights.is_some(), out.sorted_weights.is_some())
    }
}
