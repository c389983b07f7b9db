//! The gradients of the router against differences of a plain forward pass in f64.

#[allow(dead_code)]
mod oracle;

use fastmoe_core::{
    Error, Float, Order, PerExpert, Routed, Router, Score, grad_route_rows, route_rows, validate_ids,
};
use proptest::prelude::*;

/// A router with what went through it, and the gradients that came back.
#[derive(Clone, Debug)]
struct Case {
    router: Router,
    experts: usize,
    logits: Vec<f64>,
    ids: Vec<i64>,
    expert_scale: Option<Vec<f64>>,
    grad_weights: Option<Vec<f64>>,
    grad_scores: Option<Vec<f64>>,
}

fn numbers(len: usize) -> impl Strategy<Value = Vec<f64>> {
    prop::collection::vec(-2.0..2.0_f64, len)
}

fn router(experts: usize) -> impl Strategy<Value = Router> {
    let choices = (1..=experts, prop::option::of(1.0..9.0_f64), prop::sample::select(&oracle::SCORES[..]));
    let order = prop::sample::select(vec![Order::ScoreTopk, Order::TopkScore]);
    (choices, order, any::<bool>(), 0.1..1.0_f64, 0.5..3.0_f64).prop_map(
        |((top_k, softcap, score), order, renormalize, renormalize_eps, scale)| Router {
            softcap,
            score,
            order,
            renormalize,
            renormalize_eps,
            scale,
            ..Router::new(top_k)
        },
    )
}

fn case() -> impl Strategy<Value = Case> {
    let sizes = (0..4_usize, 1..40_usize);
    let with_router = sizes.prop_flat_map(|(tokens, experts)| (Just((tokens, experts)), router(experts)));
    with_router.prop_flat_map(|((tokens, experts), router)| {
        let ids = prop::collection::vec(0..experts as i64, tokens * router.top_k);
        (
            numbers(tokens * experts),
            ids,
            prop::option::of(numbers(experts)),
            prop::option::of(numbers(tokens * router.top_k)),
            prop::option::of(numbers(tokens * experts)),
        )
            .prop_map(move |(logits, ids, expert_scale, grad_weights, grad_scores)| Case {
                router,
                experts,
                logits,
                ids,
                expert_scale,
                grad_weights,
                grad_scores,
            })
    })
}

impl Case {
    /// `<grad_weights, weights> + <grad_scores, scores>`, the weights of choice k multiplied by `by_choice[k]` too.
    fn loss(&self, logits: &[f64], by_choice: &[f64]) -> f64 {
        let Self { router, experts, .. } = self;
        let k = router.top_k;
        let mut loss = 0.0;
        for (t, logits) in logits.chunks(*experts).enumerate() {
            let capped: Vec<f64> =
                logits.iter().map(|&x| router.softcap.map_or(x, |cap| cap * (x / cap).tanh())).collect();
            let scores = oracle::score(router.score, &capped);
            let ids: Vec<usize> = self.ids[t * k..][..k].iter().map(|&id| id as usize).collect();
            let mut weights: Vec<f64> = match router.order {
                Order::ScoreTopk => ids.iter().map(|&id| scores[id]).collect(),
                Order::TopkScore => {
                    oracle::score(router.score, &ids.iter().map(|&id| capped[id]).collect::<Vec<_>>())
                }
            };
            if router.renormalize {
                let sum = weights.iter().sum::<f64>() + router.renormalize_eps;
                weights.iter_mut().for_each(|weight| *weight /= sum);
            }
            for (j, weight) in weights.iter().enumerate() {
                let expert_scale = self.expert_scale.as_ref().map_or(1.0, |scale| scale[ids[j]]);
                let grad = self.grad_weights.as_ref().map_or(0.0, |grad| grad[t * k + j]);
                loss += grad * weight * router.scale * (expert_scale + by_choice[t * k + j]);
            }
            if let Some(grad) = &self.grad_scores {
                loss +=
                    grad[t * experts..].iter().zip(&scores).map(|(grad, score)| grad * score).sum::<f64>();
            }
        }
        loss
    }

    /// The gradients of the logits and of what is added to the scale at each choice, computed in `F`.
    fn gradients<F: Float>(&self, scores: &[F]) -> (Vec<F>, Vec<F>) {
        let narrow = |values: &[f64]| values.iter().map(|&x| F::from_f64(x)).collect::<Vec<F>>();
        let optional = |values: &Option<Vec<f64>>| values.as_deref().map(narrow);
        let (logits, expert_scale) = (narrow(&self.logits), optional(&self.expert_scale));
        let (grad_weights, grad_scores) = (optional(&self.grad_weights), optional(&self.grad_scores));
        let routed = Routed {
            logits: &logits,
            ids: &self.ids,
            scores,
            expert_scale: expert_scale.as_deref(),
            grad_weights: grad_weights.as_deref(),
            grad_scores: grad_scores.as_deref(),
        };
        let mut grad_logits = vec![F::NAN; logits.len()];
        let mut by_choice = vec![F::NAN; self.ids.len()];
        grad_route_rows(&self.router, self.experts, &routed, &mut grad_logits, Some(&mut by_choice));
        (grad_logits, by_choice)
    }

    fn scores<F: Float>(&self) -> Vec<F> {
        let logits: Vec<F> = self.logits.iter().map(|&x| F::from_f64(x)).collect();
        let (mut ids, mut weights) = (vec![0; self.ids.len()], vec![F::ZERO; self.ids.len()]);
        let mut scores = logits.clone();
        let nothing = PerExpert { bias: None, scale: None };
        route_rows(&self.router, self.experts, &logits, nothing, &mut ids, &mut weights, &mut scores);
        scores
    }
}

/// `d f(values) / d values[i]` for every i.
fn differences(values: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let step = 1e-5;
    let at = |i: usize, moved: f64| {
        let mut values = values.to_vec();
        values[i] += moved;
        f(&values)
    };
    (0..values.len()).map(|i| (at(i, step) - at(i, -step)) / (2.0 * step)).collect()
}

fn assert_close(given: &[f64], wanted: &[f64], tolerance: f64) {
    let size = wanted.iter().fold(1.0_f64, |size, x| size.max(x.abs()));
    for (i, (given, wanted)) in given.iter().zip(wanted).enumerate() {
        assert!((given - wanted).abs() <= tolerance * size, "[{i}]: given {given}, wanted {wanted}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn equals_the_differences_of_the_forward(case in case()) {
        let (grad_logits, by_choice) = case.gradients(&case.scores::<f64>());
        let none = vec![0.0; case.ids.len()];
        assert_close(&grad_logits, &differences(&case.logits, |logits| case.loss(logits, &none)), 1e-7);
        assert_close(&by_choice, &differences(&none, |added| case.loss(&case.logits, added)), 1e-7);
    }

    #[test]
    fn f32_is_f64_but_for_rounding(case in case()) {
        let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
        let (grad_logits, by_choice) = case.gradients(&case.scores::<f32>());
        let (wanted_logits, wanted_choice) = case.gradients(&case.scores::<f64>());
        assert_close(&wide(grad_logits), &wanted_logits, 2e-5);
        assert_close(&wide(by_choice), &wanted_choice, 2e-5);
    }
}

const SOFTMAX_OF_CHOSEN: Router = Router {
    top_k: 2,
    softcap: None,
    score: Score::Softmax,
    order: Order::TopkScore,
    groups: None,
    renormalize: false,
    renormalize_eps: 1e-20,
    scale: 1.0,
};

fn of_nan(router: &Router, grad_scores: Option<&[f32]>) -> Vec<f32> {
    let logits = [1.0, f32::NAN, 2.0, 0.0];
    let (mut ids, mut weights, mut scores) = ([0; 2], [0.0; 2], [0.0; 4]);
    let nothing = PerExpert { bias: None, scale: None };
    route_rows(router, 4, &logits, nothing, &mut ids, &mut weights, &mut scores);
    let routed = Routed {
        logits: &logits,
        ids: &ids,
        scores: &scores,
        expert_scale: None,
        grad_weights: Some(&[1.0, -1.0]),
        grad_scores,
    };
    let mut grad = [7.0; 4];
    grad_route_rows(router, 4, &routed, &mut grad, None);
    grad.to_vec()
}

#[test]
fn nan_spreads_no_further_than_it_did_forward() {
    let grad = of_nan(&SOFTMAX_OF_CHOSEN, None);
    assert!(grad[0] < 0.0 && grad[2] > 0.0 && grad[1] == 0.0 && grad[3] == 0.0, "{grad:?}");
    assert!(of_nan(&SOFTMAX_OF_CHOSEN, Some(&[1.0; 4])).iter().all(|x| x.is_nan()));
    let sigmoid = Router { score: Score::Sigmoid, ..SOFTMAX_OF_CHOSEN };
    assert_eq!(
        of_nan(&sigmoid, None).iter().map(|x| x.is_nan()).collect::<Vec<_>>(),
        [false, true, false, false]
    );
}

#[test]
fn a_root_of_zero_has_no_slope() {
    let router = Router { score: Score::SqrtSoftplus, ..SOFTMAX_OF_CHOSEN };
    let (logits, scores) = ([-1e30, 1e30_f32], [0.0, 1e15]);
    let routed = Routed {
        logits: &logits,
        ids: &[0, 1],
        scores: &scores,
        expert_scale: None,
        grad_weights: Some(&[1.0, 2.0]),
        grad_scores: None,
    };
    let mut grad = [f32::NAN; 2];
    grad_route_rows(&router, 2, &routed, &mut grad, None);
    assert_eq!(grad, [0.0, 1e-15]);
}

#[test]
fn ids_are_experts() {
    assert_eq!(validate_ids(&[0, 3, 2, 1], 2, 4), Ok(()));
    assert_eq!(validate_ids(&[], 2, 4), Ok(()));
    for given in [-1, 4, i64::MAX, 1 << 32] {
        let wanted = Err(Error::ExpertId { token: 1, slot: 1, given, experts: 4 });
        assert_eq!(validate_ids(&[0, 3, 2, given], 2, 4), wanted);
    }
}
