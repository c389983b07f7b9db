//! What is launched, and what is refused, on a driver that only writes down the kernels.

use fastmoe_core::{
    Capacity, Drop, GroupLosers, GroupScore, Groups, Order, OutOfRange, PlanSpec, Router, Score,
};
use fastmoe_cuda::driver::{Device, Driver, Kernel, Region, Stream};
use fastmoe_cuda::{Buffer, DType, Error, Gpu, Math, Plan, Product, Queue, Result, Route, RouteGrad};
use std::collections::HashMap;
use std::sync::Mutex;

const NAMES: [&str; 8] = [
    "plan_small_i64",
    "plan_count_i64",
    "plan_scan",
    "plan_scatter_i64",
    "plan_seat",
    "route_f32",
    "grad_route_f32",
    "grad_expert_scale",
];

#[derive(Default)]
struct Recorder(Mutex<Vec<&'static str>>);

impl Driver for Recorder {
    fn version(&self) -> Result<i32> {
        Ok(0)
    }

    fn device_count(&self) -> Result<i32> {
        Ok(1)
    }

    fn device(&self, _: i32) -> Result<Device> {
        let (name, capability) = ("recorder".to_owned(), (8, 0));
        Ok(Device { name, capability, multiprocessors: 3, shared_per_block: 163 << 10 })
    }

    fn load(&self, _: i32) -> Result<HashMap<&'static str, Kernel>> {
        let kernel = |(function, name)| (name, Kernel { function, threads: 128, shared: 0 });
        Ok(NAMES.into_iter().enumerate().map(kernel).collect())
    }

    unsafe fn launch(&self, _: i32, _: Stream, kernel: Kernel, _: u32, _: &[u8], _: &[Region]) -> Result<()> {
        self.0.lock().unwrap().push(NAMES[kernel.function]);
        Ok(())
    }

    unsafe fn set_word(&self, _: i32, _: Stream, _: u64, _: i32) -> Result<()> {
        Ok(())
    }

    unsafe fn read(&self, _: i32, _: Stream, _: u64, into: &mut [u8]) -> Result<()> {
        into.fill(0);
        Ok(())
    }
}

/// What a call launches.
fn launched(call: impl FnOnce(&mut Queue<'_>) -> Result<()>) -> Result<Vec<&'static str>> {
    let recorder: &'static Recorder = Box::leak(Box::default());
    let gpu = Gpu::load(recorder, 0)?;
    let scratch = Buffer { name: "scratch", address: 1 << 20, bytes: 1 << 30 };
    call(&mut Queue { gpu: &gpu, stream: Stream(0), scratch })?;
    Ok(std::mem::take(&mut recorder.0.lock().unwrap()))
}

fn plan(tokens: usize, experts: usize, capacity: Option<Capacity>) -> Result<Vec<&'static str>> {
    let spec = PlanSpec { tokens, top_k: 2, experts, capacity, out_of_range: OutOfRange::Drop };
    let none = Buffer::default();
    let plan = Plan {
        spec: &spec,
        wide_ids: true,
        ids: none,
        weights: none,
        counts: none,
        offsets: none,
        gather: none,
        inverse: none,
        sorted_weights: none,
        check: false,
    };
    // SAFETY: nothing runs.
    launched(|queue| unsafe { plan.launch(queue).map(|_| ()) })
}

#[test]
fn small_plans_are_made_in_one_launch() {
    let three = ["plan_count_i64", "plan_scan", "plan_scatter_i64"];
    assert_eq!(plan(2048, 1024, None).unwrap(), ["plan_small_i64"]);
    assert_eq!(plan(2049, 1024, None).unwrap(), three);
    assert_eq!(plan(1, 1025, None).unwrap(), three);
    let capacity = |rows, drop, pad| Some(Capacity { rows, drop, pad });
    assert_eq!(plan(8, 4, capacity(3, Drop::Score, false)).unwrap(), ["plan_small_i64", "plan_seat"]);
    assert_eq!(plan(8, 4, capacity(5000, Drop::Position, true)).unwrap(), three);
}

fn route(experts: usize, groups: bool) -> Result<Vec<&'static str>> {
    let group = Groups { n_group: 2, topk_group: 1, score: GroupScore::Max, losers: GroupLosers::Zero };
    let router = Router {
        top_k: 1,
        softcap: None,
        score: Score::Softmax,
        order: Order::ScoreTopk,
        groups: groups.then_some(group),
        renormalize: true,
        renormalize_eps: 0.0,
        scale: 1.0,
    };
    let none = Buffer::default();
    let route = Route {
        router: &router,
        dtype: DType::F32,
        tokens: 5,
        experts,
        logits: none,
        bias: none,
        expert_scale: none,
        ids: none,
        weights: none,
        scores: none,
    };
    // SAFETY: nothing runs.
    launched(|queue| unsafe { route.launch(queue) })
}

#[test]
fn groups_want_experts_that_the_kernel_keeps() {
    assert_eq!(route(1024, true).unwrap(), ["route_f32"]);
    assert_eq!(route(5000, false).unwrap(), ["route_f32"]);
    let error = route(1026, true).unwrap_err();
    assert_eq!(error.to_string(), "E (experts) that are in groups: got 1026, wanted at most 1024 on a GPU");
}

#[test]
fn the_gradient_of_the_scale_is_a_launch_of_its_own_with_scratch_memory() {
    let router = Router::new(2);
    let none = Buffer::default();
    let grad = |tokens, wants_scale| {
        let problem = RouteGrad {
            router: &router,
            dtype: DType::F32,
            tokens,
            experts: 8,
            logits: none,
            ids: none,
            scores: none,
            expert_scale: none,
            grad_weights: none,
            grad_scores: none,
            grad_logits: none,
            grad_expert_scale: if wants_scale { Buffer { address: 1, ..none } } else { none },
        };
        // SAFETY: nothing runs.
        (problem.scratch(), launched(|queue| unsafe { problem.launch(queue) }).unwrap())
    };
    assert_eq!(grad(100, false), (0, vec!["grad_route_f32"]));
    assert_eq!(grad(100, true), (1024, vec!["grad_route_f32", "grad_expert_scale"]));
    assert_eq!(grad(0, true), (0, vec!["grad_expert_scale"]));
}

#[test]
fn sizes_that_the_kernels_cannot_count_are_refused() {
    let refused = |rows, inner, columns, experts| {
        let none = Buffer::default();
        let math = Math { dtype: DType::Bf16, tf32: false };
        let (a, offsets, w, bias, y) = (none, none, none, none, none);
        let product =
            Product { math, rows, inner, columns, experts, transposed: false, a, offsets, w, bias, y };
        // SAFETY: nothing runs.
        match launched(|queue| unsafe { product.launch(queue) }) {
            Err(Error::TooLarge { what, .. }) => what,
            other => panic!("{other:?}"),
        }
    };
    let huge = 1 << 31;
    assert_eq!(refused(huge, 8, 8, 8), "sorted rows");
    assert_eq!(refused(8, huge, 8, 8), "K (columns of the rows)");
    assert_eq!(refused(8, 8, huge, 8), "N (columns of the result)");
    assert_eq!(refused(8, 8, 8, huge), "E (experts)");
    assert_eq!(refused(1 << 29, 8, 1 << 26, 8), "tiles of the result");
    assert!(matches!(plan(huge, 8, None), Err(Error::TooLarge { .. })));
}

#[test]
fn no_experts_leave_only_unused_rows() {
    let none = Buffer::default();
    let math = Math { dtype: DType::Bf16, tf32: false };
    let (a, offsets, w, bias, y) = (none, none, none, none, none);
    let product = Product {
        math,
        rows: 7,
        inner: 8,
        columns: 8,
        experts: 0,
        transposed: false,
        a,
        offsets,
        w,
        bias,
        y,
    };
    // SAFETY: nothing runs.
    let missing = launched(|queue| unsafe { product.launch(queue) }).unwrap_err();
    assert!(matches!(missing, Error::NoKernel { .. }), "{missing:?}");
}
