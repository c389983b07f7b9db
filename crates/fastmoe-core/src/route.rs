//! The router's decision: from logits `[T,E]` to expert ids, weights and scores.

use crate::error::named;
use crate::score::{soft_cap, sum};
use crate::topk::top_k;
use crate::{Error, Float, Groups, Score, groups};
use std::str::FromStr;

/// Whether scores or the selection come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Scores over all experts, then the top K of them; the weights are their scores.
    ScoreTopk,
    /// The top K logits, then scores over those K alone.
    TopkScore,
}

impl FromStr for Order {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        named("order", name, &[("score_topk", Self::ScoreTopk), ("topk_score", Self::TopkScore)])
    }
}

/// How experts are chosen and weighted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Router {
    /// K.
    pub top_k: usize,
    /// Replaces every logit by `softcap * tanh(logit / softcap)` before anything else (Laguna).
    pub softcap: Option<f64>,
    /// The score function.
    pub score: Score,
    /// Score then select, or select then score.
    pub order: Order,
    /// The groups that experts are chosen from.
    pub groups: Option<Groups>,
    /// Divide the K weights of a token by their sum plus `renormalize_eps`.
    pub renormalize: bool,
    /// Keeps a sum of zero from dividing.
    pub renormalize_eps: f64,
    /// Multiplies the weights, after renormalisation.
    pub scale: f64,
}

impl Router {
    /// Softmax over all experts, then the top K of them: the other rules are set by struct update.
    pub fn new(top_k: usize) -> Self {
        Self {
            top_k,
            softcap: None,
            score: Score::Softmax,
            order: Order::ScoreTopk,
            groups: None,
            renormalize: false,
            renormalize_eps: 1e-20,
            scale: 1.0,
        }
    }

    /// Checks the numbers among themselves and against E.
    ///
    /// # Errors
    /// [`Error::TopK`] unless `1 <= K <= E`; [`Error::Number`] for a softcap that is not finite and positive, or an eps
    /// that is negative or not finite; [`Error::Groups`] unless `n_group` divides E, `1 <= topk_group <= n_group`, K
    /// experts fit into `topk_group` groups, and a group holds two where their sum is its score.
    pub fn check(&self, experts: usize) -> Result<(), Error> {
        if !(1..=experts).contains(&self.top_k) {
            return Err(Error::TopK { given: self.top_k, experts });
        }
        let eps = self.renormalize_eps;
        if !(eps >= 0.0 && eps.is_finite()) {
            let wanted = "a finite number of at least 0";
            return Err(Error::Number { argument: "renormalize_eps", given: eps, wanted });
        }
        if let Some(given) = self.softcap.filter(|&cap| !(cap > 0.0 && cap.is_finite())) {
            return Err(Error::Number {
                argument: "softcap",
                given,
                wanted: "a finite number of more than 0",
            });
        }
        self.groups.map_or(Ok(()), |groups| groups.check(experts, self.top_k))
    }

    /// From the scores, or logits, of the chosen of one token to their weights.
    #[inline(always)]
    fn weigh<F: Float>(&self, ids: &[i64], expert_scale: Option<&[F]>, weights: &mut [F]) {
        if self.order == Order::TopkScore {
            self.score.apply(weights);
        }
        if self.renormalize {
            let total = sum(weights.iter().copied()) + F::from_f64(self.renormalize_eps);
            for weight in &mut *weights {
                *weight = *weight / total;
            }
        }
        let scale = F::from_f64(self.scale);
        for weight in &mut *weights {
            *weight = *weight * scale;
        }
        if let Some(expert_scale) = expert_scale {
            for (weight, &id) in weights.iter_mut().zip(ids) {
                *weight = *weight * expert_scale[id as usize];
            }
        }
    }
}

/// What the router knows of every expert, `[E]` each.
#[derive(Clone, Copy, Debug)]
pub struct PerExpert<'a, F> {
    /// Added for the choice of experts only.
    pub bias: Option<&'a [F]>,
    /// Multiplies the weights of an expert, last of all (Gemma 4).
    pub scale: Option<&'a [F]>,
}

/// Routes rows of logits `[T,E]`: `ids [T,K]`, `weights [T,K]`, and `scores [T,E]` over all experts.
///
/// 1. The logits are soft-capped where the router says so; from here on these are the logits.
/// 2. The scores are those of all logits of a token.
/// 3. The experts of a token are ordered by key descending, then id ascending; `-0.0` equals `0.0`, and a NaN key comes
///    after every number. The key is the logit (scores grow with it, so no rounding of scores decides). With a bias or
///    with groups it is the score for [`Order::ScoreTopk`] and the logit for [`Order::TopkScore`], plus the bias;
///    groups then overwrite the keys of the experts outside the best ones. The first K are chosen.
/// 4. The weights are the scores of the chosen for [`Order::ScoreTopk`], or the scores of their logits alone for
///    [`Order::TopkScore`]. With [`Router::renormalize`] they are divided by (their sum in the order of the ids, plus
///    the eps). They are multiplied by [`Router::scale`], then by [`PerExpert::scale`].
///
/// The bias never enters weights or scores. NaN scores give NaN weights.
///
/// Always inlined, so that a backend can compile it once per instruction set; in f32 the results have the same bits on
/// all of them.
///
/// # Panics
/// When a slice has not the length that its shape says, or the router does not pass [`Router::check`].
#[inline(always)]
pub fn route_rows<F: Float>(
    router: &Router,
    experts: usize,
    logits: &[F],
    per_expert: PerExpert<'_, F>,
    ids: &mut [i64],
    weights: &mut [F],
    scores: &mut [F],
) {
    assert_eq!(router.check(experts), Ok(()));
    let k = router.top_k;
    let tokens = logits.len() / experts;
    let PerExpert { bias, scale: expert_scale } = per_expert;
    assert!(
        logits.len() == tokens * experts
            && scores.len() == tokens * experts
            && ids.len() == tokens * k
            && weights.len() == tokens * k
            && [bias, expert_scale].into_iter().flatten().all(|values| values.len() == experts),
        "slices must have the lengths [T,E], [T,K] and [E]"
    );
    let by_score = router.order == Order::ScoreTopk;
    let (mut capped, mut keys, mut sort) = (vec![], vec![], vec![]);
    let mut group_scratch = groups::Scratch::default();
    for t in 0..tokens {
        let mut logits = &logits[t * experts..][..experts];
        let scores = &mut scores[t * experts..][..experts];
        let ids = &mut ids[t * k..][..k];
        let weights = &mut weights[t * k..][..k];

        if let Some(cap) = router.softcap {
            capped.clear();
            capped.extend_from_slice(logits);
            soft_cap(&mut capped, F::from_f64(cap));
            logits = &capped;
        }
        scores.copy_from_slice(logits);
        router.score.apply(scores);
        let source = if by_score { &*scores } else { logits };

        if let Some(groups) = &router.groups {
            keys.clear();
            match bias {
                None => keys.extend_from_slice(source),
                Some(bias) => keys.extend(source.iter().zip(bias).map(|(&value, &bias)| value + bias)),
            }
            groups.limit(&mut keys, &mut group_scratch);
            top_k(&keys, None, ids, &mut sort);
        } else {
            top_k(if bias.is_some() { source } else { logits }, bias, ids, &mut sort);
        }

        for (weight, &id) in weights.iter_mut().zip(&*ids) {
            *weight = source[id as usize];
        }
        router.weigh(ids, expert_scale, weights);
    }
}
