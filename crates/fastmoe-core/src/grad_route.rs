//! Through the router backwards: from the gradients of weights `[T,K]` and scores `[T,E]` to those of the logits and of
//! the scale that each expert has.

use crate::score::{softmax_backward, sum};
use crate::{Float, Order, Router, Score};

/// What [`crate::route_rows`] was given and what it returned, with the gradients that came back.
#[derive(Clone, Copy, Debug)]
pub struct Routed<'a, F> {
    /// `[T,E]`.
    pub logits: &'a [F],
    /// `[T,K]`, each in `0..E` (see [`crate::validate_ids`]).
    pub ids: &'a [i64],
    /// `[T,E]`.
    pub scores: &'a [F],
    /// `[E]`, or ones.
    pub expert_scale: Option<&'a [F]>,
    /// `[T,K]`, or zeros.
    pub grad_weights: Option<&'a [F]>,
    /// `[T,E]`, or zeros.
    pub grad_scores: Option<&'a [F]>,
}

/// Writes the gradient of the logits `[T,E]` and, where asked for, what each choice `[T,K]` adds to the gradient of the
/// scale of its expert.
///
/// The choice of experts has no gradient. Per token, with `s_k` the weight of choice k before it was renormalised and
/// scaled, `n` the sum of the K plus the eps (1 without [`Router::renormalize`]), and `g_k` the gradient of its weight:
///
/// 1. Choice k adds `g_k * scale * s_k / n` to the gradient of its expert's scale.
/// 2. `h_k = g_k * scale * expert_scale`; with renormalisation it becomes `(h_k - sum_j h_j s_j / n) / n`.
/// 3. Where `s` is a softmax of the chosen alone, `s_k (h_k - sum_j h_j s_j)` are gradients of logits; else `h_k` is
///    added to the gradient of the score of expert k.
/// 4. The gradients of the scores go through [`Router::score`], and all through [`Router::softcap`]. Scores without a
///    gradient pass on zeros, also where they are NaN.
///
/// Always inlined, so that a backend can compile it once per instruction set; in f32 the results have the same bits on
/// all of them.
///
/// # Panics
/// When a slice has not the length that its shape says, an id is no expert, or the router does not pass
/// [`Router::check`].
#[inline(always)]
pub fn grad_route_rows<F: Float>(
    router: &Router,
    experts: usize,
    routed: &Routed<'_, F>,
    grad_logits: &mut [F],
    mut by_choice: Option<&mut [F]>,
) {
    assert_eq!(router.check(experts), Ok(()));
    let k = router.top_k;
    let tokens = routed.logits.len() / experts;
    let Routed { logits, ids, scores, expert_scale, grad_weights, grad_scores } = *routed;
    let has = |values: Option<&[F]>, len| values.is_none_or(|values| values.len() == len);
    assert!(
        [logits, scores, grad_logits].map(<[F]>::len) == [tokens * experts; 3]
            && ids.len() == tokens * k
            && has(grad_weights, tokens * k)
            && has(by_choice.as_deref(), tokens * k)
            && has(grad_scores, tokens * experts)
            && has(expert_scale, experts),
        "slices must have the lengths [T,E], [T,K] and [E]"
    );
    let of_chosen_alone = router.order == Order::TopkScore && router.score == Score::Softmax;
    let reaches_scores = grad_scores.is_some() || grad_weights.is_some() && !of_chosen_alone;
    let (mut tanh, mut capped, mut chosen, mut grad_chosen) = (vec![], vec![], vec![], vec![]);
    for t in 0..tokens {
        let (row, choices) = (t * experts..(t + 1) * experts, t * k..(t + 1) * k);
        let (mut logits, scores) = (&logits[row.clone()], &scores[row.clone()]);
        let grad = &mut grad_logits[row.clone()];
        let ids = &ids[choices.clone()];

        if let Some(cap) = router.softcap.map(F::from_f64) {
            tanh.clear();
            tanh.extend(logits.iter().map(|&x| (x / cap).tanh()));
            capped.clear();
            capped.extend(tanh.iter().map(|&x| x * cap));
            logits = &capped;
        }
        match grad_scores {
            Some(grad_scores) => grad.copy_from_slice(&grad_scores[row]),
            None => grad.fill(F::ZERO),
        }
        chosen.clear();
        grad_chosen.clear();
        if let Some(grad_weights) = grad_weights {
            let source = if of_chosen_alone { logits } else { scores };
            chosen.extend(ids.iter().map(|&id| source[id as usize]));
            if of_chosen_alone {
                router.score.apply(&mut chosen);
            }
            let scale = F::from_f64(router.scale);
            grad_chosen.extend(grad_weights[choices.clone()].iter().map(|&grad| grad * scale));
        }
        let by_choice = by_choice.as_deref_mut().map(|by_choice| &mut by_choice[choices]);
        router.weigh_backward(ids, expert_scale, &chosen, &mut grad_chosen, by_choice);
        if of_chosen_alone {
            softmax_backward(&mut grad_chosen, &chosen);
        }

        let add_choices = |grad: &mut [F]| {
            for (&id, &of_choice) in ids.iter().zip(&grad_chosen) {
                grad[id as usize] += of_choice;
            }
        };
        if !of_chosen_alone {
            add_choices(grad);
        }
        if reaches_scores {
            router.score.apply_backward(grad, scores, logits);
        }
        if of_chosen_alone {
            add_choices(grad);
        }
        if router.softcap.is_some() {
            for (grad, &tanh) in grad.iter_mut().zip(&tanh) {
                *grad = *grad * (F::ONE - tanh * tanh);
            }
        }
    }
}

impl Router {
    /// From the gradients of the scaled weights of one token to those of the scores that they were made of; none of both
    /// where the weights have no gradient.
    #[inline(always)]
    fn weigh_backward<F: Float>(
        &self,
        ids: &[i64],
        expert_scale: Option<&[F]>,
        chosen: &[F],
        grad_chosen: &mut [F],
        by_choice: Option<&mut [F]>,
    ) {
        let mut total = F::ONE;
        if self.renormalize {
            total = sum(chosen.iter().copied()) + F::from_f64(self.renormalize_eps);
        }
        if let Some(by_choice) = by_choice {
            by_choice.fill(F::ZERO);
            for ((by_choice, &grad), &score) in by_choice.iter_mut().zip(&*grad_chosen).zip(chosen) {
                *by_choice = grad * (score / total);
            }
        }
        if let Some(expert_scale) = expert_scale {
            for (grad, &id) in grad_chosen.iter_mut().zip(ids) {
                *grad = *grad * expert_scale[id as usize];
            }
        }
        if self.renormalize {
            let inner = sum(grad_chosen.iter().zip(chosen).map(|(&grad, &score)| grad * score)) / total;
            for grad in grad_chosen {
                *grad = (*grad - inner) / total;
            }
        }
    }
}
