//! Each rule of the plan, and each way to ask for it wrongly.

#[allow(dead_code)]
mod oracle;

use fastmoe_core::{Capacity, Drop, Error, OutOfRange, Parallel, PlanOut, PlanSpec, Serial, validate_plan};
use oracle::Plan;

struct Scoped(usize);

impl Parallel for Scoped {
    fn threads(&self) -> usize {
        self.0
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| {
            for i in (0..tasks).rev() {
                scope.spawn(move || task(i));
            }
        });
    }
}

const DROPLESS: PlanSpec =
    PlanSpec { tokens: 3, top_k: 2, experts: 3, capacity: None, out_of_range: OutOfRange::Error };
const IDS: [i64; 6] = [2, 0, 2, 1, 0, 2];
const WEIGHTS: [f32; 6] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6];

fn limited(rows: usize, drop: Drop, pad: bool) -> PlanSpec {
    PlanSpec { capacity: Some(Capacity { rows, drop, pad }), ..DROPLESS }
}

fn build(spec: &PlanSpec, ids: &[i64], weights: &[f32]) -> Result<Plan, Error> {
    let mut plan = Plan::unwritten(spec);
    spec.build(&Serial, ids, Some(weights), plan.out())?;
    Ok(plan)
}

#[test]
fn sorts_stably_by_expert() {
    let plan = build(&DROPLESS, &IDS, &WEIGHTS).unwrap();
    assert_eq!(plan.counts, [2, 1, 3]);
    assert_eq!(plan.offsets, [0, 2, 3, 6]);
    assert_eq!(plan.gather, [0, 2, 1, 0, 1, 2]);
    assert_eq!(plan.inverse, [3, 0, 4, 2, 1, 5]);
    assert_eq!(plan.sorted_weights, [0.2, 0.5, 0.4, 0.1, 0.3, 0.6]);
}

#[test]
fn an_expert_may_appear_twice_in_a_row() {
    let plan = build(&DROPLESS, &[1, 1, 0, 0, 1, 1], &WEIGHTS).unwrap();
    assert_eq!(plan.gather, [1, 1, 0, 0, 2, 2]);
    assert_eq!(plan.inverse, [2, 3, 0, 1, 4, 5]);
}

#[test]
fn drop_by_position_keeps_the_first() {
    let plan = build(&limited(2, Drop::Position, false), &IDS, &WEIGHTS).unwrap();
    assert_eq!(plan.counts, [2, 1, 2]);
    assert_eq!(plan.offsets, [0, 2, 3, 5]);
    assert_eq!(plan.gather, [0, 2, 1, 0, 1, -1]);
    assert_eq!(plan.inverse, [3, 0, 4, 2, 1, -1]);
    assert_eq!(plan.sorted_weights, [0.2, 0.5, 0.4, 0.1, 0.3, 0.0]);
}

#[test]
fn drop_by_score_keeps_the_heaviest_in_flat_order() {
    let plan = build(&limited(2, Drop::Score, false), &IDS, &WEIGHTS).unwrap();
    assert_eq!(plan.gather, [0, 2, 1, 1, 2, -1]);
    assert_eq!(plan.inverse, [-1, 0, 3, 2, 1, 4]);
}

#[test]
fn drop_by_score_breaks_ties_by_flat_index_and_drops_nan_first() {
    let spec = PlanSpec { tokens: 5, top_k: 1, experts: 1, ..limited(3, Drop::Score, false) };
    let plan = build(&spec, &[0; 5], &[f32::NAN, 1.0, 0.5, 0.5, f32::NEG_INFINITY]).unwrap();
    assert_eq!(plan.gather, [1, 2, 3, -1, -1]);
    let plan = build(&spec, &[0; 5], &[0.5, 0.5, 0.5, 0.5, 1.0]).unwrap();
    assert_eq!(plan.gather, [0, 1, 4, -1, -1]);
}

#[test]
fn padding_gives_every_expert_its_capacity() {
    let plan = build(&limited(2, Drop::Position, true), &IDS, &WEIGHTS).unwrap();
    assert_eq!(plan.counts, [2, 1, 2]);
    assert_eq!(plan.offsets, [0, 2, 4, 6]);
    assert_eq!(plan.gather, [0, 2, 1, -1, 0, 1]);
    assert_eq!(plan.inverse, [4, 0, 5, 2, 1, -1]);
    assert_eq!(plan.sorted_weights, [0.2, 0.5, 0.4, 0.0, 0.1, 0.3]);
}

#[test]
fn a_capacity_of_zero_drops_everything() {
    let plan = build(&limited(0, Drop::Score, false), &IDS, &WEIGHTS).unwrap();
    assert_eq!((plan.counts, plan.gather, plan.inverse), (vec![0; 3], vec![-1; 6], vec![-1; 6]));
}

#[test]
fn no_tokens_make_an_empty_plan() {
    let spec = PlanSpec { tokens: 0, ..limited(2, Drop::Score, true) };
    let plan = build(&spec, &[], &[]).unwrap();
    assert_eq!((plan.counts, plan.offsets, plan.gather), (vec![0; 3], vec![0, 2, 4, 6], vec![-1; 6]));
    let spec = PlanSpec { tokens: 0, ..DROPLESS };
    assert_eq!(build(&spec, &[], &[]).unwrap().offsets, [0; 4]);
}

#[test]
fn threads_do_not_change_the_plan() {
    let (tokens, top_k, experts) = (30_000, 4, 37);
    let ids: Vec<i64> = (0..tokens as i64 * 4).map(|i| (i * i / 7 + i % 11) % 38).collect();
    let weights: Vec<f32> =
        (0..tokens as u32 * 4).map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as f32).collect();
    let capacities = [None, Some((3000, Drop::Position, false)), Some((3100, Drop::Score, true))];
    for capacity in capacities {
        let capacity = capacity.map(|(rows, drop, pad)| Capacity { rows, drop, pad });
        let spec = PlanSpec { tokens, top_k, experts, capacity, out_of_range: OutOfRange::Drop };
        let wanted = oracle::plan(&spec, &ids, &weights);
        for threads in [1, 2, 7] {
            let mut plan = Plan::unwritten(&spec);
            spec.build(&Scoped(threads), &ids, Some(&weights), plan.out()).unwrap();
            assert!(plan == wanted, "{threads} threads, {capacity:?}");
        }
    }
}

#[test]
fn the_first_bad_id_is_named_whichever_thread_finds_it() {
    let (tokens, top_k) = (40_000, 2);
    let mut ids = vec![0_i64; tokens * top_k];
    ids[79_999] = -5;
    ids[50_001] = 4;
    for drop in [Drop::Position, Drop::Score] {
        let spec = PlanSpec { tokens, top_k, experts: 4, ..limited(9, drop, false) };
        let mut plan = Plan::unwritten(&spec);
        let error = spec.build(&Scoped(4), &ids, Some(&vec![1.0; ids.len()]), plan.out()).unwrap_err();
        assert_eq!(error, Error::ExpertId { token: 25_000, slot: 1, given: 4, experts: 4 });
        assert_eq!(error.to_string(), "ids[25000, 1]: got 4, wanted an expert id from 0 to 3");
    }
}

#[test]
fn ids_out_of_range_are_dropped_on_request() {
    let spec = PlanSpec { out_of_range: OutOfRange::Drop, ..DROPLESS };
    let plan = build(&spec, &[2, -1, 3, i64::MIN, i64::MAX, 0], &WEIGHTS).unwrap();
    assert_eq!(plan.counts, [1, 0, 1]);
    assert_eq!(plan.gather, [2, 0, -1, -1, -1, -1]);
    assert_eq!(plan.inverse, [1, -1, -1, -1, -1, 0]);
    assert_eq!(plan.sorted_weights, [0.6, 0.1, 0.0, 0.0, 0.0, 0.0]);
}

#[test]
fn weights_may_be_f64_or_absent() {
    let mut plan = Plan::unwritten(&DROPLESS);
    DROPLESS.build::<_, f32>(&Serial, &IDS, None, PlanOut { sorted_weights: None, ..plan.out() }).unwrap();
    assert_eq!(plan.gather, [0, 2, 1, 0, 1, 2]);

    let mut sorted = [0.0_f64; 6];
    let Plan { counts, offsets, gather, inverse, .. } = &mut plan;
    let out = PlanOut { counts, offsets, gather, inverse, sorted_weights: Some(&mut sorted) };
    DROPLESS.build(&Serial, &IDS, Some(&WEIGHTS.map(f64::from)), out).unwrap();
    assert_eq!(sorted, [1, 4, 3, 0, 2, 5].map(|row: usize| f64::from(WEIGHTS[row])));
}

#[test]
fn wrong_requests_are_refused() {
    let error = |spec: &PlanSpec, ids: &[i64], weights: Option<&[f32]>| {
        let mut plan = Plan::unwritten(&PlanSpec { capacity: None, ..*spec });
        let mut out = plan.out();
        out.sorted_weights = out.sorted_weights.filter(|_| weights.is_none());
        spec.build(&Serial, ids, weights, out).unwrap_err().to_string()
    };
    assert_eq!(
        error(&PlanSpec { top_k: 0, ..DROPLESS }, &[], None),
        "top_k: got 0, wanted 1 to 3, the number of experts"
    );
    assert_eq!(error(&DROPLESS, &IDS[..5], None), "ids: got 5 elements, wanted 6");
    assert_eq!(error(&DROPLESS, &IDS, Some(&WEIGHTS[..2])), "weights: got 2 elements, wanted 6");
    assert_eq!(
        error(&DROPLESS, &IDS, None),
        "weights: got none, wanted one per routed row, because sorted_weights needs them"
    );
    assert_eq!(
        error(&limited(2, Drop::Score, false), &IDS, None),
        "weights: got none, wanted one per routed row, because drop='score' needs them"
    );
    assert_eq!(
        error(&limited(1 << 30, Drop::Position, true), &IDS, None),
        "num_experts * capacity: got 3221225472 rows, wanted less than 2^31"
    );
    let mut plan = Plan::unwritten(&DROPLESS);
    let huge = PlanSpec { tokens: 1 << 30, ..DROPLESS };
    assert_eq!(
        huge.build(&Serial, &IDS, Some(&WEIGHTS), plan.out()),
        Err(Error::TooManyRows { argument: "tokens * top_k", given: 1 << 31 })
    );
    plan.inverse.pop();
    assert_eq!(
        DROPLESS.build(&Serial, &IDS, Some(&WEIGHTS), plan.out()),
        Err(Error::Length { argument: "inverse", given: 5, wanted: 6 })
    );
}

#[test]
fn names_parse() {
    assert_eq!("position".parse(), Ok(Drop::Position));
    assert_eq!("score".parse(), Ok(Drop::Score));
    assert_eq!("error".parse(), Ok(OutOfRange::Error));
    assert_eq!("drop".parse(), Ok(OutOfRange::Drop));
    assert_eq!(
        "last".parse::<Drop>().unwrap_err().to_string(),
        "drop: got 'last', wanted one of 'position', 'score'"
    );
    assert_eq!(
        "keep".parse::<OutOfRange>().unwrap_err().to_string(),
        "out_of_range: got 'keep', wanted one of 'error', 'drop'"
    );
}

#[test]
fn a_plan_from_outside_is_checked() {
    let check = |offsets: &[i32], gather: &[i32], inverse: &[i32]| {
        validate_plan(2, 2, 2, offsets, gather, inverse).map_err(|error| error.to_string())
    };
    let (offsets, gather, inverse) = ([0, 1, 3], [1, 0, 1, -1], [1, -1, 0, 2]);
    assert_eq!(check(&offsets, &gather, &inverse), Ok(()));
    let refused = |result: Result<(), String>, message: &str| assert_eq!(result, Err(message.into()));
    refused(check(&[0, 1], &gather, &inverse), "offsets: got 2 elements, wanted 3");
    refused(check(&offsets, &gather, &inverse[1..]), "inverse: got 3 elements, wanted 4");
    refused(check(&[1, 1, 3], &gather, &inverse), "offsets[0]: got 1, wanted 0");
    refused(check(&[0, 2, 1], &gather, &inverse), "offsets[2]: got 1, wanted 2 to 4");
    refused(check(&[0, 1, 5], &gather, &inverse), "offsets[2]: got 5, wanted 1 to 4");
    refused(check(&offsets, &[1, 2, 1, -1], &inverse), "gather[1]: got 2, wanted a token below 2, or -1");
    refused(check(&offsets, &[1, 0, -2, -1], &inverse), "gather[2]: got -2, wanted a token below 2, or -1");
    refused(
        check(&offsets, &gather, &[1, -1, 0, 3]),
        "inverse[1, 1]: got 3, wanted a sorted row below 3, or -1",
    );
    refused(
        check(&offsets, &gather, &[-2, -1, 0, 2]),
        "inverse[0, 0]: got -2, wanted a sorted row below 3, or -1",
    );
    refused(
        check(&offsets, &gather, &[2, -1, 0, 2]),
        "inverse[0, 0]: got row 2, wanted a row that token 0 feeds (gather[2] is 1)",
    );
}
