//! The router's decision: from logits `[T,E]` to expert ids, weights and scores.

use crate::topk::top_k;
use crate::{Error, Float, Score};
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
        match name {
            "score_topk" => Ok(Self::ScoreTopk),
            "topk_score" => Ok(Self::TopkScore),
            _ => Err(Error::Name {
                argument: "order",
                given: name.into(),
                wanted: "\"score_topk\", \"topk_score\"",
            }),
        }
    }
}

/// How experts are chosen and weighted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Router {
    /// K.
    pub top_k: usize,
    /// The score function.
    pub score: Score,
    /// Score then select, or select then score.
    pub order: Order,
    /// Divide the K weights of a token by their sum (plus 1e-20).
    pub renormalize: bool,
    /// Multiplies the weights, after renormalisation.
    pub scale: f64,
}

impl Router {
    /// Checks K against E.
    ///
    /// # Errors
    /// [`Error::TopK`] unless `1 <= K <= E`.
    pub fn check(&self, experts: usize) -> Result<(), Error> {
        if (1..=experts).contains(&self.top_k) {
            return Ok(());
        }
        Err(Error::TopK { given: self.top_k, experts })
    }
}

/// Routes rows of logits `[T,E]`: `ids [T,K]`, `weights [T,K]`, and `scores [T,E]` over all experts.
///
/// The experts of a token are ordered by key descending, then id ascending; `-0.0` equals `0.0`, and a NaN key comes
/// after every number. The key is the logit (scores grow with it, so no rounding of scores decides); with a `bias
/// [E]` it is score + bias for [`Order::ScoreTopk`] and logit + bias for [`Order::TopkScore`]. The bias never enters
/// weights or scores. NaN scores give NaN weights. [`Router::renormalize`] sums the weights in the order of the ids.
///
/// Always inlined, so that a backend can compile it once per instruction set; in f32 the results have the same bits on
/// all of them.
///
/// # Panics
/// When a slice has not the length that its shape says, or K is not in `1..=E` (see [`Router::check`]).
#[inline(always)]
pub fn route_rows<F: Float>(
    router: &Router,
    experts: usize,
    logits: &[F],
    bias: Option<&[F]>,
    ids: &mut [i64],
    weights: &mut [F],
    scores: &mut [F],
) {
    let k = router.top_k;
    assert!((1..=experts).contains(&k), "top_k must be in 1..=experts");
    let tokens = logits.len() / experts;
    assert!(
        logits.len() == tokens * experts
            && scores.len() == tokens * experts
            && ids.len() == tokens * k
            && weights.len() == tokens * k
            && bias.is_none_or(|bias| bias.len() == experts),
        "slices must have the lengths [T,E], [T,K] and [E]"
    );
    let scale = F::from_f64(router.scale);
    let mut scratch = Vec::new();
    for t in 0..tokens {
        let logits = &logits[t * experts..][..experts];
        let scores = &mut scores[t * experts..][..experts];
        let ids = &mut ids[t * k..][..k];
        let weights = &mut weights[t * k..][..k];

        scores.copy_from_slice(logits);
        router.score.apply(scores);
        let by_score = router.order == Order::ScoreTopk;
        top_k(if by_score && bias.is_some() { scores } else { logits }, bias, ids, &mut scratch);

        let source = if by_score { &*scores } else { logits };
        for (weight, &id) in weights.iter_mut().zip(&*ids) {
            *weight = source[id as usize];
        }
        if !by_score {
            router.score.apply(weights);
        }
        if router.renormalize {
            let mut sum = F::ZERO;
            for &mut weight in &mut *weights {
                sum += weight;
            }
            sum += F::from_f64(1e-20);
            for weight in &mut *weights {
                *weight = *weight / sum;
            }
        }
        for weight in weights {
            *weight = *weight * scale;
        }
    }
}
