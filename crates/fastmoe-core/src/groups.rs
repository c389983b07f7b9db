//! Group-limited selection: the experts of a token come from its best groups alone (DeepSeek-V2, arXiv:2405.04434,
//! section 2.2.2; DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

use crate::error::named;
use crate::topk::top_k;
use crate::{Error, Float};
use std::str::FromStr;

/// What a group is worth, from the keys of its experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// The largest key (DeepSeek-V2); NaN in a group of nothing else.
    Max,
    /// The sum of the two largest keys (DeepSeek-V3); NaN where fewer than two are numbers.
    Top2,
}

impl FromStr for GroupScore {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        named("group_score", name, &[("top2", Self::Top2), ("max", Self::Max)])
    }
}

/// The key of the experts of all other groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupLosers {
    /// `-inf` (DeepSeek-V3).
    NegInfinity,
    /// 0, which a negative key of a winner loses against (DeepSeek-V2, Mistral 4).
    Zero,
}

impl FromStr for GroupLosers {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        named("group_losers", name, &[("-inf", Self::NegInfinity), ("zero", Self::Zero)])
    }
}

/// A limit on the groups that a token may choose from. Group g holds the experts `g * E/n_group..(g + 1) * E/n_group`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Into how many equal groups the experts are divided.
    pub n_group: usize,
    /// How many groups stay: by score descending, then group id ascending, NaN last.
    pub topk_group: usize,
    /// What decides between groups.
    pub score: GroupScore,
    /// What becomes of the others.
    pub losers: GroupLosers,
}

/// Memory kept from row to row.
pub(crate) struct Scratch<F> {
    scores: Vec<F>,
    best: Vec<i64>,
    sort: Vec<(F, u32)>,
}

impl<F> Default for Scratch<F> {
    fn default() -> Self {
        Self { scores: vec![], best: vec![], sort: vec![] }
    }
}

impl Groups {
    /// Checks the groups against E and K.
    pub(crate) fn check(&self, experts: usize, top_k: usize) -> Result<(), Error> {
        let Self { n_group, topk_group, .. } = *self;
        let wrong = |argument, given, wanted| Err(Error::Groups { argument, given, wanted });
        if n_group == 0 || !experts.is_multiple_of(n_group) {
            return wrong("n_group", n_group, format!("a divisor of {experts}, the number of experts"));
        }
        if !(1..=n_group).contains(&topk_group) {
            return wrong("topk_group", topk_group, format!("1 to {n_group}, the number of groups"));
        }
        let size = experts / n_group;
        if self.score == GroupScore::Top2 && size < 2 {
            return wrong("n_group", n_group, "groups of at least 2 experts for group_score='top2'".into());
        }
        if top_k > topk_group * size {
            let wanted = format!("1 to {}, the experts in topk_group groups", topk_group * size);
            return wrong("top_k", top_k, wanted);
        }
        Ok(())
    }

    /// Overwrites the keys of the experts outside the best groups.
    #[inline(always)]
    pub(crate) fn limit<F: Float>(&self, keys: &mut [F], scratch: &mut Scratch<F>) {
        let size = keys.len() / self.n_group;
        let Scratch { scores, best, sort } = scratch;
        scores.clear();
        scores.extend(keys.chunks_exact(size).map(|group| self.score(group)));
        best.resize(self.topk_group, 0);
        top_k(scores, None, best, sort);
        let loser = match self.losers {
            GroupLosers::NegInfinity => F::NEG_INFINITY,
            GroupLosers::Zero => F::ZERO,
        };
        for (g, group) in (0..).zip(keys.chunks_exact_mut(size)) {
            if !best.contains(&g) {
                group.fill(loser);
            }
        }
    }

    #[inline(always)]
    fn score<F: Float>(&self, group: &[F]) -> F {
        let better = |a: F, b: F| a > b || b.is_nan();
        let (mut first, mut second) = (F::NAN, F::NAN);
        for &key in group {
            if better(key, first) {
                (first, second) = (key, first);
            } else if better(key, second) {
                second = key;
            }
        }
        match self.score {
            GroupScore::Max => first,
            GroupScore::Top2 => first + second,
        }
    }
}
