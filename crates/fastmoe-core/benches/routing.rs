//! Routing on one thread, compiled for each instruction set of this machine, and the sort by expert.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fastmoe_core::{OutOfRange, PerExpert, PlanOut, PlanSpec, Router, Serial, route_rows};
use std::hint::black_box;

/// (T, E, K)
const SHAPES: [(usize, usize, usize); 4] = [(4096, 64, 8), (16384, 256, 8), (65536, 128, 8), (4096, 128, 16)];

type Route = fn(&Router, usize, &[f32], &mut [i64], &mut [f32], &mut [f32]);

/// Compiles the router for an instruction set.
macro_rules! compiled_for {
    ($name:ident, $($feature:literal),*) => {
        fn $name(
            router: &Router,
            experts: usize,
            logits: &[f32],
            ids: &mut [i64],
            weights: &mut [f32],
            scores: &mut [f32],
        ) {
            $(#[target_feature(enable = $feature)])*
            fn route(
                router: &Router,
                experts: usize,
                logits: &[f32],
                ids: &mut [i64],
                weights: &mut [f32],
                scores: &mut [f32],
            ) {
                let nothing = PerExpert { bias: None, scale: None };
                route_rows(router, experts, logits, nothing, ids, weights, scores);
            }
            // SAFETY: only called where the machine was found to have the features.
            #[allow(unused_unsafe)]
            unsafe {
                route(router, experts, logits, ids, weights, scores);
            }
        }
    };
}

compiled_for!(portable,);
#[cfg(target_arch = "x86_64")]
compiled_for!(avx2, "avx2", "fma");
#[cfg(target_arch = "x86_64")]
compiled_for!(avx512, "avx512f", "avx512bw", "avx512dq", "avx512vl", "fma");

fn instruction_sets() -> Vec<(&'static str, Route)> {
    let mut sets: Vec<(&str, Route)> = vec![("portable", portable)];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            sets.push(("avx2", avx2));
        }
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            sets.push(("avx512", avx512));
        }
    }
    sets
}

/// Numbers of a splitmix64 generator, normal enough for logits: the sum of four uniform ones.
fn logits(n: usize) -> Vec<f32> {
    let mut state = 0_u64;
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((z ^ (z >> 27)) >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| 2.0 * (uniform() + uniform() + uniform() + uniform())).collect()
}

fn routing(c: &mut Criterion) {
    let mut route_group = c.benchmark_group("route");
    route_group.sample_size(10);
    let mut ids_of = Vec::new();
    for (tokens, experts, k) in SHAPES {
        let router = Router { renormalize: true, ..Router::new(k) };
        let logits = logits(tokens * experts);
        let mut ids = vec![0; tokens * k];
        let mut weights = vec![0.0; tokens * k];
        let mut scores = vec![0.0; tokens * experts];
        route_group.throughput(Throughput::Elements(tokens as u64));
        for (name, route) in instruction_sets() {
            route_group.bench_function(BenchmarkId::new(name, format!("{tokens}x{experts}k{k}")), |b| {
                b.iter(|| route(&router, experts, black_box(&logits), &mut ids, &mut weights, &mut scores));
            });
        }
        ids_of.push(ids);
    }
    route_group.finish();

    let mut sort_group = c.benchmark_group("sort");
    for ((tokens, experts, k), ids) in SHAPES.into_iter().zip(ids_of) {
        let spec = PlanSpec { tokens, top_k: k, experts, capacity: None, out_of_range: OutOfRange::Error };
        let weights = vec![1.0_f32; tokens * k];
        let (mut counts, mut offsets) = (vec![0; experts], vec![0; experts + 1]);
        let (mut gather, mut inverse) = (vec![0; tokens * k], vec![0; tokens * k]);
        let mut sorted = vec![0.0; tokens * k];
        sort_group.throughput(Throughput::Elements((tokens * k) as u64));
        for (name, weighted) in [("ids", false), ("ids_weights", true)] {
            sort_group.bench_function(BenchmarkId::new(name, format!("{tokens}x{experts}k{k}")), |b| {
                b.iter(|| {
                    let out = PlanOut {
                        counts: &mut counts,
                        offsets: &mut offsets,
                        gather: &mut gather,
                        inverse: &mut inverse,
                        sorted_weights: weighted.then_some(&mut sorted[..]),
                    };
                    spec.build(&Serial, black_box(&ids), Some(&weights[..]), out).expect("ids are in range");
                });
            });
        }
    }
    sort_group.finish();
}

criterion_group!(benches, routing);
criterion_main!(benches);
