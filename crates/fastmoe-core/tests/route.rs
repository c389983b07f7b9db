//! Each rule of the router, and the same bits on every instruction set.

#[allow(dead_code)]
mod oracle;

use fastmoe_core::{Error, GroupLosers, GroupScore, Groups, Order, PerExpert, Router, Score, route_rows};

const NAN: f32 = f32::NAN;
const INF: f32 = f32::INFINITY;

struct Routed {
    ids: Vec<i64>,
    weights: Vec<f32>,
    scores: Vec<f32>,
}

const NOTHING: PerExpert<'_, f32> = PerExpert { bias: None, scale: None };

fn softmax(top_k: usize) -> Router {
    Router::new(top_k)
}

fn route(router: &Router, logits: &[f32], bias: Option<&[f32]>) -> Routed {
    let mut routed = Routed {
        ids: vec![-7; router.top_k],
        weights: vec![-7.0; router.top_k],
        scores: vec![-7.0; logits.len()],
    };
    let Routed { ids, weights, scores } = &mut routed;
    route_rows(router, logits.len(), logits, PerExpert { bias, ..NOTHING }, ids, weights, scores);
    routed
}

#[test]
fn experts_come_by_score_then_id() {
    assert_eq!(route(&softmax(3), &[1.0, 2.0, 2.0, 0.0, 2.0], None).ids, [1, 2, 4]);
    assert_eq!(route(&softmax(3), &[0.0, -0.0, 0.0, -1.0], None).ids, [0, 1, 2]);
    assert_eq!(route(&softmax(5), &[1.0; 5], None).ids, [0, 1, 2, 3, 4]);
}

#[test]
fn ties_at_the_bound_go_to_the_lower_ids_for_any_number_of_them() {
    for experts in [8, 16, 17, 64, 100, 256] {
        for top_k in [1, 2, 8, 9, 16, 17, 40].into_iter().filter(|&k| k <= experts) {
            let ids = route(&softmax(top_k), &vec![0.5; experts], None).ids;
            assert_eq!(ids, (0..top_k as i64).collect::<Vec<_>>(), "E {experts}, K {top_k}");
        }
    }
}

#[test]
fn logits_decide_where_scores_round_to_the_same() {
    let routed = route(&softmax(2), &[0.0, -200.0, -150.0, -300.0], None);
    assert_eq!(routed.ids, [0, 2]);
    assert_eq!(routed.scores, [1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn nan_is_chosen_last_and_minus_infinity_is_a_number() {
    let routed = route(&softmax(4), &[NAN, -INF, 3.0, NAN, -INF], None);
    assert_eq!(routed.ids, [2, 1, 4, 0]);
    assert!(routed.weights.iter().chain(&routed.scores).all(|x| x.is_nan()));

    let sigmoid = Router { score: Score::Sigmoid, ..softmax(3) };
    let routed = route(&sigmoid, &[NAN, INF, -INF, 0.0], None);
    assert_eq!((routed.ids, routed.weights), (vec![1, 3, 2], vec![1.0, 0.5, 0.0]));
    assert!(routed.scores[0].is_nan());
}

#[test]
fn infinite_logits_score_nan_under_softmax() {
    assert!(route(&softmax(1), &[INF, 0.0], None).scores.iter().all(|x| x.is_nan()));
    assert!(route(&softmax(1), &[-INF, -INF], None).scores.iter().all(|x| x.is_nan()));
    assert_eq!(route(&softmax(1), &[-INF, 0.0], None).scores, [0.0, 1.0]);
}

#[test]
fn one_expert_takes_all() {
    let routed = route(&softmax(1), &[-3.0], None);
    assert_eq!((routed.ids, routed.weights, routed.scores), (vec![0], vec![1.0], vec![1.0]));
}

#[test]
fn bias_selects_but_does_not_weigh() {
    let logits = [0.0, 1.0, 2.0];
    let bias = [10.0, 0.0, -10.0];
    for order in [Order::ScoreTopk, Order::TopkScore] {
        let sigmoid = Router { score: Score::Sigmoid, order, ..softmax(2) };
        let routed = route(&sigmoid, &logits, Some(&bias));
        assert_eq!(routed.ids, [0, 1]);
        assert_eq!(routed.weights, [0.5, routed.scores[1]]);
    }
    // Scores differ by less than the bias, logits by more.
    let bias = [1.5, 0.0, 0.0];
    let by_logit = Router { order: Order::TopkScore, ..softmax(1) };
    assert_eq!(route(&softmax(1), &logits, Some(&bias)).ids, [0]);
    assert_eq!(route(&by_logit, &logits, Some(&bias)).ids, [2]);
}

#[test]
fn topk_score_weighs_the_chosen_alone() {
    let router = Router { order: Order::TopkScore, ..softmax(2) };
    let routed = route(&router, &[1.0, 5.0, 1.0, 5.0], None);
    assert_eq!((routed.ids, routed.weights), (vec![1, 3], vec![0.5, 0.5]));
    assert_eq!(routed.scores.iter().sum::<f32>(), 1.0);
}

#[test]
fn renormalised_weights_sum_to_the_scale() {
    let router = Router { renormalize: true, scale: 2.5, ..softmax(3) };
    let routed = route(&router, &[0.3, -1.0, 2.0, 0.0, 0.7], None);
    assert!((routed.weights.iter().sum::<f32>() - 2.5).abs() < 1e-6);
    let nothing = Router { score: Score::Sigmoid, ..router };
    assert_eq!(route(&nothing, &[-INF; 4], None).weights, [0.0; 3]);
}

#[test]
fn scores_are_accurate() {
    let logits: Vec<f32> = (0..300).map(|i| ((i * 7919) % 1000) as f32 / 128.0 - 4.0).collect();
    let wide: Vec<f64> = logits.iter().copied().map(f64::from).collect();
    for score in oracle::SCORES {
        let routed = route(&Router { score, ..softmax(1) }, &logits, None);
        for (&given, wanted) in routed.scores.iter().zip(oracle::score(score, &wide)) {
            assert!((f64::from(given) / wanted - 1.0).abs() < 6e-7, "{score:?}: {given} for {wanted}");
        }
    }
}

#[test]
fn f64_keeps_its_precision() {
    let logits = [0.1_f64, 0.1 + 1e-12, -2.0];
    let (mut ids, mut weights, mut scores) = ([0; 2], [0.0; 2], [0.0; 3]);
    let per_expert = PerExpert { bias: None, scale: None };
    route_rows(&softmax(2), 3, &logits, per_expert, &mut ids, &mut weights, &mut scores);
    assert_eq!(ids, [1, 0]);
    let sum: f64 = logits.iter().map(|x| x.exp()).sum();
    assert!((weights[1] - 0.1_f64.exp() / sum).abs() < 1e-15);
}

#[test]
fn no_tokens_are_routed_to_nothing() {
    route_rows(&softmax(2), 4, &[], NOTHING, &mut [], &mut [], &mut []);
}

#[test]
fn top_k_must_be_one_to_all_experts() {
    assert_eq!(softmax(4).check(4), Ok(()));
    assert_eq!(softmax(0).check(4), Err(Error::TopK { given: 0, experts: 4 }));
    assert_eq!(
        softmax(5).check(4).unwrap_err().to_string(),
        "top_k: got 5, wanted 1 to 4, the number of experts"
    );
    assert!(softmax(1).check(0).is_err());
}

#[test]
fn names_parse() {
    assert_eq!("softmax".parse(), Ok(Score::Softmax));
    assert_eq!("sigmoid".parse(), Ok(Score::Sigmoid));
    assert_eq!("sqrt_softplus".parse(), Ok(Score::SqrtSoftplus));
    assert_eq!("score_topk".parse(), Ok(Order::ScoreTopk));
    assert_eq!("topk_score".parse(), Ok(Order::TopkScore));
    assert_eq!(
        "tanh".parse::<Score>().unwrap_err().to_string(),
        "score: got 'tanh', wanted one of 'softmax', 'sigmoid', 'sqrt_softplus'"
    );
    assert_eq!(
        "both".parse::<Order>().unwrap_err().to_string(),
        "order: got 'both', wanted one of 'score_topk', 'topk_score'"
    );
    assert_eq!("top2".parse(), Ok(GroupScore::Top2));
    assert_eq!("max".parse(), Ok(GroupScore::Max));
    assert_eq!("-inf".parse(), Ok(GroupLosers::NegInfinity));
    assert_eq!("zero".parse(), Ok(GroupLosers::Zero));
    assert_eq!(
        "sum".parse::<GroupScore>().unwrap_err().to_string(),
        "group_score: got 'sum', wanted one of 'top2', 'max'"
    );
    assert_eq!(
        "nan".parse::<GroupLosers>().unwrap_err().to_string(),
        "group_losers: got 'nan', wanted one of '-inf', 'zero'"
    );
}

const GROUPS: Groups =
    Groups { n_group: 3, topk_group: 1, score: GroupScore::Top2, losers: GroupLosers::NegInfinity };

fn grouped(top_k: usize, groups: Groups) -> Router {
    Router { score: Score::Sigmoid, groups: Some(groups), ..softmax(top_k) }
}

#[test]
fn groups_are_worth_the_sum_of_two_or_the_largest() {
    let logits = [3.0, -3.0, 1.0, 1.0, 0.0, 0.0];
    let by_max = Groups { score: GroupScore::Max, ..GROUPS };
    assert_eq!(route(&grouped(2, GROUPS), &logits, None).ids, [2, 3]);
    assert_eq!(route(&grouped(2, by_max), &logits, None).ids, [0, 1]);
    // The bias counts for groups too, and equal groups stand by id.
    assert_eq!(route(&grouped(2, GROUPS), &logits, Some(&[0.0, 0.0, 0.0, 0.0, 9.0, 0.0])).ids, [4, 5]);
    assert_eq!(route(&grouped(2, GROUPS), &[0.0; 6], None).ids, [0, 1]);
    assert_eq!(route(&grouped(2, GROUPS), &[NAN, 9.0, NAN, NAN, -9.0, -8.0], None).ids, [5, 4]);
}

#[test]
fn experts_of_other_groups_lose_by_minus_infinity_or_zero() {
    let logits = [1.0, -1.0, 0.0, 0.0, 0.0, 0.0];
    let bias = [0.0, -5.0, -2.0, -2.0, -2.0, -2.0];
    let by_zero = Groups { losers: GroupLosers::Zero, score: GroupScore::Max, ..GROUPS };
    let never = Groups { score: GroupScore::Max, ..GROUPS };
    assert_eq!(route(&grouped(2, never), &logits, Some(&bias)).ids, [0, 1]);
    let routed = route(&grouped(2, by_zero), &logits, Some(&bias));
    assert_eq!((routed.ids, routed.weights[1]), (vec![0, 2], 0.5));
}

#[test]
fn soft_capped_logits_take_the_place_of_the_logits() {
    let router = Router { softcap: Some(2.0), score: Score::Sigmoid, ..softmax(2) };
    let routed = route(&router, &[INF, 1.0, -INF], None);
    let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
    assert_eq!(routed.ids, [0, 1]);
    for (given, wanted) in routed.scores.iter().zip([2.0, 2.0 * 0.5_f32.tanh(), -2.0].map(sigmoid)) {
        assert!((given - wanted).abs() < 1e-6, "given {given}, wanted {wanted}");
    }
}

#[test]
fn weights_of_an_expert_have_a_scale() {
    let mut routed = Routed { ids: vec![0; 2], weights: vec![0.0; 2], scores: vec![0.0; 3] };
    let Routed { ids, weights, scores } = &mut routed;
    let router =
        Router { renormalize: true, renormalize_eps: 0.5, scale: 4.0, score: Score::Sigmoid, ..softmax(2) };
    let per_expert = PerExpert { scale: Some(&[1.0, 2.0, 3.0]), ..NOTHING };
    route_rows(&router, 3, &[0.0, -INF, 0.0], per_expert, ids, weights, scores);
    assert_eq!((routed.ids, routed.weights), (vec![0, 2], vec![4.0 * 0.5 / 1.5, 3.0 * (4.0 * (0.5 / 1.5))]));
}

#[test]
fn numbers_out_of_range_are_refused() {
    let refused = |router: Router| router.check(6).unwrap_err().to_string();
    let groups = |n_group, topk_group| Groups { n_group, topk_group, ..GROUPS };
    assert_eq!(
        refused(Router { softcap: Some(0.0), ..softmax(1) }),
        "softcap: got 0, wanted a finite number of more than 0"
    );
    assert_eq!(
        refused(Router { renormalize_eps: -1.0, ..softmax(1) }),
        "renormalize_eps: got -1, wanted a finite number of at least 0"
    );
    for (router, message) in [
        (grouped(1, groups(0, 1)), "n_group: got 0, wanted a divisor of 6, the number of experts"),
        (grouped(1, groups(4, 1)), "n_group: got 4, wanted a divisor of 6, the number of experts"),
        (grouped(1, groups(3, 4)), "topk_group: got 4, wanted 1 to 3, the number of groups"),
        (
            grouped(1, groups(6, 2)),
            "n_group: got 6, wanted groups of at least 2 experts for group_score='top2'",
        ),
        (grouped(3, groups(3, 1)), "top_k: got 3, wanted 1 to 2, the experts in topk_group groups"),
    ] {
        assert_eq!(refused(router), message);
    }
    assert_eq!(grouped(2, GROUPS).check(6), Ok(()));
}

#[cfg(target_arch = "x86_64")]
mod same_bits {
    use super::*;

    #[target_feature(enable = "avx2,fma")]
    fn avx2(router: &Router, logits: &[f32]) -> Routed {
        inlined(router, logits)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn avx512(router: &Router, logits: &[f32]) -> Routed {
        inlined(router, logits)
    }

    #[inline(always)]
    fn inlined(router: &Router, logits: &[f32]) -> Routed {
        let (experts, k) = (45, router.top_k);
        let tokens = logits.len() / experts;
        let mut routed = Routed {
            ids: vec![0; tokens * k],
            weights: vec![0.0; tokens * k],
            scores: vec![0.0; logits.len()],
        };
        let Routed { ids, weights, scores } = &mut routed;
        route_rows(router, experts, logits, NOTHING, ids, weights, scores);
        routed
    }

    #[test]
    fn on_every_instruction_set() {
        let logits: Vec<f32> =
            (0_u32..45 * 200).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e6).collect();
        for top_k in [3, 12, 20] {
            let groups = Groups { n_group: 5, topk_group: 3, ..GROUPS };
            for (score, softcap, groups) in [
                (Score::Softmax, None, None),
                (Score::Sigmoid, Some(30.0), None),
                (Score::SqrtSoftplus, None, Some(groups)),
            ] {
                let router = Router { score, softcap, groups, renormalize: true, ..softmax(top_k) };
                let portable = inlined(&router, &logits);
                let bits = |routed: &Routed| {
                    let floats =
                        routed.weights.iter().chain(&routed.scores).map(|x| x.to_bits()).collect::<Vec<_>>();
                    (routed.ids.clone(), floats)
                };
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: the machine has the features.
                    assert!(bits(&portable) == bits(&unsafe { avx2(&router, &logits) }));
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the machine has the features.
                    assert!(bits(&portable) == bits(&unsafe { avx512(&router, &logits) }));
                }
            }
        }
    }
}
