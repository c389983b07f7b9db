//! The plain statement of what the crate does, and the comparisons with it that property tests and fuzz targets share:
//! any bytes make a case.

use fastmoe_core::{
    Capacity, Drop, Error, GroupLosers, GroupScore, Groups, Order, OutOfRange, PerExpert, PlanOut, PlanSpec,
    Router, Score, Serial, route_rows, validate_plan,
};
use std::cmp::Ordering;

/// A plan with its own memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub counts: Vec<i32>,
    pub offsets: Vec<i32>,
    pub gather: Vec<i32>,
    pub inverse: Vec<i32>,
    pub sorted_weights: Vec<f32>,
}

impl Plan {
    /// A plan full of values that no plan holds.
    pub fn unwritten(spec: &PlanSpec) -> Self {
        let rows = spec.rows();
        Self {
            counts: vec![-7; spec.experts],
            offsets: vec![-7; spec.experts + 1],
            gather: vec![-7; rows],
            inverse: vec![-7; spec.tokens * spec.top_k],
            sorted_weights: vec![-7.0; rows],
        }
    }

    pub fn out(&mut self) -> PlanOut<'_, f32> {
        PlanOut {
            counts: &mut self.counts,
            offsets: &mut self.offsets,
            gather: &mut self.gather,
            inverse: &mut self.inverse,
            sorted_weights: Some(&mut self.sorted_weights),
        }
    }
}

/// Larger first, NaN last, then the lower index.
fn best_first(values: &[f32]) -> impl Fn(&usize, &usize) -> Ordering {
    |&a, &b| {
        let key = |i: usize| if values[i].is_nan() { (1, 0.0) } else { (0, -values[i]) };
        key(a).partial_cmp(&key(b)).expect("no NaN in a key").then(a.cmp(&b))
    }
}

/// The plan by definition, expert after expert.
pub fn plan(spec: &PlanSpec, ids: &[i64], weights: &[f32]) -> Plan {
    let mut plan = Plan {
        counts: vec![],
        offsets: vec![0],
        gather: vec![],
        inverse: vec![-1; ids.len()],
        sorted_weights: vec![],
    };
    for expert in 0..spec.experts {
        let mut rows: Vec<usize> = (0..ids.len()).filter(|&row| ids[row] == expert as i64).collect();
        if let Some(capacity) = spec.capacity {
            if capacity.drop == Drop::Score {
                rows.sort_by(best_first(weights));
            }
            rows.truncate(capacity.rows);
            rows.sort();
        }
        plan.counts.push(rows.len() as i32);
        for row in rows {
            plan.inverse[row] = plan.gather.len() as i32;
            plan.gather.push((row / spec.top_k) as i32);
            plan.sorted_weights.push(weights[row]);
        }
        if let Some(Capacity { rows, pad: true, .. }) = spec.capacity {
            plan.gather.resize((expert + 1) * rows, -1);
            plan.sorted_weights.resize((expert + 1) * rows, 0.0);
        }
        plan.offsets.push(plan.gather.len() as i32);
    }
    plan.gather.resize(spec.rows(), -1);
    plan.sorted_weights.resize(spec.rows(), 0.0);
    plan
}

/// Bytes read as small choices; zeros once they are used up.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn below(&mut self, n: usize) -> usize {
        let byte = self.0.split_off_first().copied().unwrap_or_default();
        usize::from(byte) % n
    }

    /// A coarse number, so that ties are common, or one of the odd ones.
    fn float(&mut self) -> f32 {
        match self.below(256) {
            250 => f32::NAN,
            251 => f32::INFINITY,
            252 => f32::NEG_INFINITY,
            253 => -0.0,
            254 => f32::MAX,
            255 => f32::MIN_POSITIVE / 4.0,
            byte => (byte as f32 - 125.0) / 16.0 + self.below(2) as f32 * 1e-3,
        }
    }
}

/// Builds the plan that the bytes describe and compares it with the definition.
pub fn plan_agrees(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let top_k = 1 + choices.below(6);
    let experts = 1 + choices.below(20);
    let capacity = (choices.below(3) > 0).then(|| Capacity {
        rows: choices.below(8),
        drop: [Drop::Position, Drop::Score][choices.below(2)],
        pad: choices.below(2) == 1,
    });
    let out_of_range = [OutOfRange::Error, OutOfRange::Drop][choices.below(2)];
    let ids_beyond = choices.below(2) * 2;
    let tokens = choices.0.len() / top_k / 3;
    let spec = PlanSpec { tokens, top_k, experts, capacity, out_of_range };
    let rows = tokens * top_k;
    let ids: Vec<i64> =
        (0..rows).map(|_| choices.below(experts + ids_beyond) as i64 - (ids_beyond / 2) as i64).collect();
    let weights: Vec<f32> = (0..rows).map(|_| choices.float()).collect();

    let mut built = Plan::unwritten(&spec);
    let result = spec.build(&Serial, &ids, Some(&weights), built.out());
    let bad = ids.iter().position(|&id| !(0..experts as i64).contains(&id));
    if let (Some(flat), OutOfRange::Error) = (bad, out_of_range) {
        let (token, slot) = (flat / top_k, flat % top_k);
        assert_eq!(result, Err(Error::ExpertId { token, slot, given: ids[flat], experts }));
        return;
    }
    assert_eq!(result, Ok(()));
    let wanted = plan(&spec, &ids, &weights);
    let bits = |weights: &[f32]| weights.iter().map(|w| w.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&built.sorted_weights), bits(&wanted.sorted_weights));
    built.sorted_weights.clone_from(&wanted.sorted_weights);
    assert_eq!(
        (&built.counts, &built.offsets, &built.gather, &built.inverse),
        (&wanted.counts, &wanted.offsets, &wanted.gather, &wanted.inverse)
    );
    assert_eq!(validate_plan(tokens, top_k, experts, &built.offsets, &built.gather, &built.inverse), Ok(()));

    let narrow: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let mut again = Plan::unwritten(&spec);
    spec.build(&Serial, &narrow, Some(&weights), again.out()).expect("the same ids in 32 bits");
    assert_eq!(again.inverse, built.inverse);
}

/// Whether every index of a plan stays inside what it points into, and every row belongs to the token that names it.
fn is_sound(tokens: usize, top_k: usize, experts: usize, plan: &Plan) -> bool {
    let Plan { offsets, gather, inverse, .. } = plan;
    let shaped = offsets.len() == experts + 1 && inverse.len() == tokens * top_k;
    let rise = || offsets[0] == 0 && offsets.is_sorted() && offsets[experts] as usize <= gather.len();
    let tokens_exist = || gather.iter().all(|&token| (-1..tokens as i32).contains(&token));
    let of_token = |flat: usize, row: i32| gather[row as usize] == (flat / top_k) as i32;
    let owned = |(flat, &row)| row == -1 || (0..offsets[experts]).contains(&row) && of_token(flat, row);
    shaped && rise() && tokens_exist() && inverse.iter().enumerate().all(owned)
}

/// Builds the plan that the bytes describe, changes a few numbers of it, and has it validated.
pub fn validation_agrees(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let (tokens, top_k, experts) = (choices.below(5), 1 + choices.below(3), 1 + choices.below(4));
    let capacity = (choices.below(2) == 1).then(|| Capacity {
        rows: choices.below(4),
        drop: Drop::Position,
        pad: choices.below(2) == 1,
    });
    let spec = PlanSpec { tokens, top_k, experts, capacity, out_of_range: OutOfRange::Drop };
    let ids: Vec<i64> = (0..tokens * top_k).map(|_| choices.below(experts + 1) as i64).collect();
    let mut plan = plan(&spec, &ids, &vec![0.0; ids.len()]);
    for _ in 0..choices.below(4) {
        let part = match choices.below(3) {
            0 => &mut plan.offsets,
            1 => &mut plan.gather,
            _ => &mut plan.inverse,
        };
        match choices.below(8) {
            0 => part.push(0),
            1 => drop(part.pop()),
            _ if part.is_empty() => {}
            _ => {
                let at = choices.below(part.len());
                part[at] =
                    [choices.below(16) as i32 - 2, i32::MIN, i32::MAX][choices.below(9).saturating_sub(6)];
            }
        }
    }
    let validated = validate_plan(tokens, top_k, experts, &plan.offsets, &plan.gather, &plan.inverse);
    assert_eq!(validated.is_ok(), is_sound(tokens, top_k, experts, &plan), "{validated:?} {plan:?}");
}

pub const SCORES: [Score; 3] = [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus];

/// Routes the logits that the bytes describe and compares ids, weights and scores with the definition.
pub fn route_agrees(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let n_group = 1 + choices.below(6);
    let size = 1 + choices.below(80 / n_group);
    let experts = n_group * size;
    let groups = (choices.below(2) == 1).then(|| Groups {
        n_group,
        topk_group: 1 + choices.below(n_group),
        score: if size > 1 { [GroupScore::Top2, GroupScore::Max][choices.below(2)] } else { GroupScore::Max },
        losers: [GroupLosers::NegInfinity, GroupLosers::Zero][choices.below(2)],
    });
    let router = Router {
        top_k: 1 + choices.below(groups.map_or(experts, |groups| groups.topk_group * size)),
        softcap: [None, Some(4.0)][choices.below(2)],
        score: SCORES[choices.below(3)],
        order: [Order::ScoreTopk, Order::TopkScore][choices.below(2)],
        groups,
        renormalize: choices.below(2) == 1,
        renormalize_eps: [1e-20, 0.0, 0.25][choices.below(3)],
        scale: [1.0, 2.5][choices.below(2)],
    };
    let k = router.top_k;
    let mut per_expert = || -> Option<Vec<f32>> {
        (choices.below(2) == 1).then(|| (0..experts).map(|_| choices.float()).collect())
    };
    let (bias, scale) = (per_expert(), per_expert());
    let tokens = (choices.0.len() / experts).min(16);
    let logits: Vec<f32> = (0..tokens * experts).map(|_| choices.float()).collect();
    let mut ids = vec![-7; tokens * k];
    let mut weights = vec![-7.0; tokens * k];
    let mut scores = vec![-7.0; tokens * experts];
    let per_expert = PerExpert { bias: bias.as_deref(), scale: scale.as_deref() };
    route_rows(&router, experts, &logits, per_expert, &mut ids, &mut weights, &mut scores);

    for t in 0..tokens {
        let scores = &scores[t * experts..][..experts];
        let ids: Vec<usize> = ids[t * k..][..k].iter().map(|&id| id as usize).collect();
        let by_score = router.order == Order::ScoreTopk;
        let logits = &logits[t * experts..][..experts];
        let capped: Vec<f64> = logits.iter().map(|&x| soft_cap(router.softcap, x.into())).collect();

        close(scores, &score(router.score, &capped));
        let keys: Vec<f32> = if bias.is_none() && groups.is_none() {
            logits.to_vec()
        } else {
            let source = if by_score { scores } else { logits };
            let bias = bias.iter().flatten().chain(std::iter::repeat(&0.0));
            let mut keys: Vec<f32> = source.iter().zip(bias).map(|(v, b)| v + b).collect();
            if let Some(groups) = &groups {
                limit(groups, &mut keys);
            }
            keys
        };
        // Soft-capping rounds, so that the keys above are not those of the router where they are logits.
        if router.softcap.is_none() || by_score && (bias.is_some() || groups.is_some()) {
            let mut wanted: Vec<usize> = (0..experts).collect();
            wanted.sort_by(best_first(&keys));
            wanted.truncate(k);
            assert_eq!(ids, wanted, "keys {keys:?}");
        }

        let mut chosen: Vec<f64> = if by_score {
            ids.iter().map(|&id| f64::from(scores[id])).collect()
        } else {
            score(router.score, &ids.iter().map(|&id| capped[id]).collect::<Vec<_>>())
        };
        if router.renormalize {
            let sum = chosen.iter().sum::<f64>() + router.renormalize_eps;
            chosen.iter_mut().for_each(|weight| *weight /= sum);
        }
        for (weight, &id) in chosen.iter_mut().zip(&ids) {
            *weight *= router.scale * scale.as_ref().map_or(1.0, |scale| f64::from(scale[id]));
        }
        close(&weights[t * k..][..k], &chosen);
    }
}

/// The keys with those outside the best groups overwritten.
fn limit(groups: &Groups, keys: &mut [f32]) {
    let size = keys.len() / groups.n_group;
    let worth: Vec<f32> = keys
        .chunks(size)
        .map(|group| {
            let mut order: Vec<usize> = (0..size).collect();
            order.sort_by(best_first(group));
            match groups.score {
                GroupScore::Max => group[order[0]],
                GroupScore::Top2 => group[order[0]] + group[order[1]],
            }
        })
        .collect();
    let mut order: Vec<usize> = (0..groups.n_group).collect();
    order.sort_by(best_first(&worth));
    for &loser in &order[groups.topk_group..] {
        keys[loser * size..][..size].fill(match groups.losers {
            GroupLosers::NegInfinity => f32::NEG_INFINITY,
            GroupLosers::Zero => 0.0,
        });
    }
}

fn soft_cap(cap: Option<f64>, x: f64) -> f64 {
    cap.map_or(x, |cap| cap * (x / cap).tanh())
}

/// Scores in f64.
pub fn score(score: Score, logits: &[f64]) -> Vec<f64> {
    let logits = logits.iter().copied();
    match score {
        Score::Sigmoid => logits.map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        Score::SqrtSoftplus => logits.map(|x| (x.max(0.0) + (-x.abs()).exp().ln_1p()).sqrt()).collect(),
        Score::Softmax => {
            let max = logits.clone().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.clone().map(|x| (x - max).exp()).sum();
            logits.map(|x| (x - max).exp() / sum).collect()
        }
    }
}

/// Equal but for rounding, that of `x - max` above all: half an ulp of a distance up to 32 is 1e-6.
fn close(given: &[f32], wanted: &[f64]) {
    for (&given, &wanted) in given.iter().zip(wanted) {
        let error = (f64::from(given) - wanted).abs();
        let fits = error <= 5e-6 * wanted.abs() + 1e-18 || given == wanted as f32;
        assert!(fits || given.is_nan() && wanted.is_nan(), "given {given}, wanted {wanted}");
    }
}
