//! What kernels of warpgroups are given: tensor maps of operands that are not gathered and of results, and whole clusters.

use fastmoe_core::Update;
use fastmoe_cuda::driver::{Device, Driver, Kernel, MapSpec, Region, Stream, TensorMap};
use fastmoe_cuda::{
    Buffer, DType, Factor, Gpu, GradWeight, Math, Mlp, MlpGrads, Product, Queue, Result, Sizes,
};
use std::collections::HashMap;
use std::sync::Mutex;

/// A tensor's name, its first column, width, height and depth, the height of a box, and whether L2 fetches two boxes.
type Map = Option<(&'static str, usize, [usize; 3], u32, bool)>;

/// A kernel and its maps: of operands A and B, of two that it reads beside them, of three results.
type Launch = (String, [Map; 7]);

#[derive(Default)]
struct State {
    kernels: Vec<String>,
    specs: Vec<MapSpec>,
    launches: Vec<Launch>,
}

/// Of three multiprocessors, which makes a pair of blocks. The n-th map has n in its first word.
#[derive(Default)]
struct Hopper(Mutex<State>);

impl Driver for Hopper {
    fn version(&self) -> Result<i32> {
        Ok(0)
    }

    fn device_count(&self) -> Result<i32> {
        Ok(1)
    }

    fn device(&self, _: i32) -> Result<Device> {
        let (name, capability, shared_per_block) = ("Hopper".to_owned(), (9, 0), 227 << 10);
        Ok(Device { name, capability, multiprocessors: 3, shared_per_block })
    }

    fn load(&self, _: i32) -> Result<HashMap<&'static str, Kernel>> {
        Ok(HashMap::new())
    }

    fn kernel(&self, name: &str) -> Result<Kernel> {
        let kernels = &mut self.0.lock().unwrap().kernels;
        kernels.push(name.to_owned());
        Ok(Kernel { function: kernels.len() - 1, threads: 0, shared: 0 })
    }

    fn tensor_map(&self, _: i32, spec: &MapSpec) -> Result<TensorMap> {
        let specs = &mut self.0.lock().unwrap().specs;
        specs.push(*spec);
        let mut map = TensorMap::NONE;
        map.0[0] = specs.len() as u64;
        Ok(map)
    }

    unsafe fn launch(
        &self,
        _: i32,
        _: Stream,
        kernel: Kernel,
        blocks: u32,
        params: &[u8],
        memory: &[Region],
    ) -> Result<()> {
        let State { kernels, specs, launches } = &mut *self.0.lock().unwrap();
        let kernel = kernels[kernel.function].clone();
        if !kernel.contains("_wgmma_") {
            launches.push((kernel, [None; 7]));
            return Ok(());
        }
        assert!((params.as_ptr() as usize).is_multiple_of(64), "maps are aligned");
        let map = |index: usize| {
            let words = params[128 * index..][..128].chunks_exact(8);
            let words: Vec<_> = words.map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect();
            assert_eq!(words[1..], [0; 15]);
            let MapSpec { address, sizes, pitch, box_height, two_boxes } =
                specs[words[0].checked_sub(1)? as usize];
            let [width, height, depth] = sizes;
            let holds =
                |region: &&Region| (region.start..region.start + region.bytes).contains(&(address as usize));
            let tensor = memory.iter().find(holds).unwrap();
            assert_eq!(tensor.bytes, 2 * pitch * height * depth, "{}", tensor.name);
            let first = (address as usize - tensor.start) / 2;
            assert!(first + width <= pitch, "{}", tensor.name);
            Some((tensor.name, first, sizes, box_height, two_boxes))
        };
        let maps = std::array::from_fn(map);
        let first = u64::from_ne_bytes(params[7 * 128..][..8].try_into().unwrap());
        assert_eq!(first as usize, memory[0].start, "the parameters are behind the maps");
        assert_eq!(blocks, 2);
        launches.push((kernel, maps));
        Ok(())
    }

    unsafe fn set_word(&self, _: i32, _: Stream, _: u64, _: i32) -> Result<()> {
        Ok(())
    }

    unsafe fn read(&self, _: i32, _: Stream, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
}

fn launched(call: impl FnOnce(&mut Queue<'_>) -> Result<()>) -> Vec<Launch> {
    let driver: &'static Hopper = Box::leak(Box::default());
    let gpu = Gpu::load(driver, 0).unwrap();
    let scratch = Buffer { name: "scratch", address: 1 << 40, bytes: 1 << 40 };
    call(&mut Queue { gpu: &gpu, stream: Stream(0), scratch }).unwrap();
    std::mem::take(&mut driver.0.lock().unwrap().launches)
}

const BF16: Math = Math { dtype: DType::Bf16, tf32: false };

fn buffer(name: &'static str, address: u64, elements: usize) -> Buffer {
    Buffer { name, address: address << 30, bytes: 2 * elements }
}

const TOKENS: usize = 64;
const HIDDEN: usize = 256;
const INTERMEDIATE: usize = 320;
const EXPERTS: usize = 2;
const TOP_K: usize = 2;
const ROWS: usize = TOKENS * TOP_K;

/// Of results `[R, width]`, or of so many columns from the first on.
fn rows(name: &'static str, first: usize, width: usize) -> Map {
    Some((name, first, [width, ROWS, 1], 16, false))
}

#[derive(Clone, Copy)]
struct Layer {
    transposed: bool,
    gated: bool,
    interleaved: bool,
    keeps_hidden: bool,
    /// Of x, the routing weights, w1 and w2.
    wants: [bool; 4],
    update: Update,
}

const LAYER: Layer = Layer {
    transposed: false,
    gated: true,
    interleaved: false,
    keeps_hidden: true,
    wants: [true; 4],
    update: Update::Write,
};

impl Layer {
    /// The launches of warpgroups, forward and backward.
    fn launches(self) -> Vec<Launch> {
        let Self { transposed, gated, interleaved, keeps_hidden, wants, update } = self;
        let up = if gated { 2 * INTERMEDIATE } else { INTERMEDIATE };
        let sizes = Sizes {
            math: BF16,
            tokens: TOKENS,
            rows: ROWS,
            hidden: HIDDEN,
            intermediate: INTERMEDIATE,
            experts: EXPERTS,
            activation: (0, gated),
            transposed,
            interleaved,
        };
        let mlp = Mlp {
            sizes,
            top_k: TOP_K,
            x: buffer("x", 1, TOKENS * HIDDEN),
            w1: buffer("w1", 2, EXPERTS * up * HIDDEN),
            b1: Buffer::default(),
            w2: buffer("w2", 3, EXPERTS * INTERMEDIATE * HIDDEN),
            b2: Buffer::default(),
            weights: buffer("weights", 4, 2 * ROWS),
            offsets: buffer("offsets", 5, 2 * (EXPERTS + 1)),
            gather: buffer("gather", 6, 2 * ROWS),
            inverse: buffer("inverse", 7, 2 * ROWS),
        };
        let when = |wanted, buffer| if wanted { buffer } else { Buffer::default() };
        let hidden = buffer("hidden", 8, ROWS * up);
        let [x, weights, w1, w2] = wants;
        let grads = MlpGrads {
            x: when(x, buffer("grad_x", 9, TOKENS * HIDDEN)),
            weights: when(weights, buffer("grad_weights", 10, 2 * ROWS)),
            w1: (when(w1, buffer("grad_w1", 11, EXPERTS * up * HIDDEN)), update),
            w2: (when(w2, buffer("grad_w2", 12, EXPERTS * INTERMEDIATE * HIDDEN)), update),
            ..MlpGrads::default()
        };
        let (out, grad_out) = (buffer("out", 13, TOKENS * HIDDEN), buffer("grad_out", 14, TOKENS * HIDDEN));
        let all = launched(|queue| {
            // SAFETY: nothing runs.
            unsafe {
                mlp.forward(queue, out, when(keeps_hidden, hidden))?;
                mlp.backward(queue, hidden, grad_out, &grads)
            }
        });
        all.into_iter().filter(|(kernel, _)| kernel.contains("_wgmma_")).collect()
    }

    /// The maps of the kernel of this name, beside those of operands.
    fn maps_of(self, kernel: &str) -> [Map; 5] {
        let launches = self.launches();
        let (_, [_, _, maps @ ..]) = launches.iter().find(|(name, _)| name.starts_with(kernel)).unwrap();
        *maps
    }
}

#[test]
fn maps_are_of_weights_of_rows_in_place_and_of_results() {
    let act = Some(("act", 0, [320, 128, 1], 64, true));
    let [grad_hidden, grad_hidden_across] =
        [true, false].map(|along_inner| Some(("grad_hidden", 0, [640, 128, 1], 64, along_inner)));
    let scaled_act = Some(("scaled_act", 0, [320, 128, 1], 64, false));
    let w1 = |sizes, box_height, along_inner| Some(("w1", 0, sizes, box_height, along_inner));
    let w2 = |sizes, box_height, along_inner| Some(("w2", 0, sizes, box_height, along_inner));
    let result =
        |name, sizes, box_height| [None, None, Some((name, 0, sizes, box_height, false)), None, None];
    let [y, grad_rows] = ["y", "grad_rows"].map(|name| result(name, [256, 128, 1], 16));
    let halves = |name| [rows(name, 0, 320), rows(name, 320, 320)];
    let ([gate, up], [grad_gate, grad_up]) = (halves("hidden"), halves("grad_hidden"));
    let up_results = [None, None, gate, up, rows("act", 0, 320)];
    let of_grad_hidden = [gate, up, grad_gate, grad_up, rows("scaled_act", 0, 320)];
    let all = |expected: [(&str, [Map; 2], [Map; 5]); 6]| {
        expected.map(|(name, [a, b], [c, d, e, f, g])| (name.to_owned(), [a, b, c, d, e, f, g]))
    };
    let expected = all([
        ("up_wgmma_bf16_128x256_nt", [None, w1([256, 640, 2], 128, true)], up_results),
        ("gemm_wgmma_bf16_128x256_nt", [act, w2([320, 256, 2], 128, true)], y),
        ("grad_hidden_wgmma_bf16_128x256_nn", [None, w2([320, 256, 2], 64, false)], of_grad_hidden),
        ("grad_weight_wgmma_bf16_128x256_a", [None, scaled_act], result("grad_w2", [320, 256, 2], 16)),
        (
            "grad_weight_wgmma_bf16_128x256_b",
            [None, grad_hidden_across],
            result("grad_w1", [256, 640, 2], 64),
        ),
        ("gemm_wgmma_bf16_128x256_nn", [grad_hidden, w1([256, 640, 2], 64, false)], grad_rows),
    ]);
    assert_eq!(LAYER.launches(), expected);
    let transposed = all([
        ("up_wgmma_bf16_128x256_nn", [None, w1([640, 256, 2], 64, false)], up_results),
        ("gemm_wgmma_bf16_128x256_nn", [act, w2([256, 320, 2], 64, false)], y),
        ("grad_hidden_wgmma_bf16_128x256_nt", [None, w2([256, 320, 2], 128, true)], of_grad_hidden),
        ("grad_weight_wgmma_bf16_128x256_b", [None, scaled_act], result("grad_w2", [256, 320, 2], 64)),
        (
            "grad_weight_wgmma_bf16_128x256_a",
            [None, grad_hidden_across],
            result("grad_w1", [640, 256, 2], 16),
        ),
        ("gemm_wgmma_bf16_128x256_nt", [grad_hidden, w1([640, 256, 2], 128, true)], grad_rows),
    ]);
    assert_eq!(Layer { transposed: true, ..LAYER }.launches(), transposed);
}

#[test]
fn hidden_states_that_are_no_halves_have_one_map() {
    let act = rows("act", 0, 320);
    let scaled_act = rows("scaled_act", 0, 320);
    for (layer, width) in [
        (Layer { interleaved: true, ..LAYER }, 640),
        (Layer { gated: false, ..LAYER }, 320),
        (Layer { gated: false, interleaved: true, ..LAYER }, 320),
    ] {
        let [hidden, grad_hidden] = ["hidden", "grad_hidden"].map(|name| rows(name, 0, width));
        assert_eq!(layer.maps_of("up"), [None, None, hidden, None, act]);
        assert_eq!(layer.maps_of("grad_hidden"), [hidden, None, grad_hidden, None, scaled_act]);
    }
}

#[test]
fn results_that_are_not_wanted_have_no_map() {
    let act = rows("act", 0, 320);
    let scaled_act = rows("scaled_act", 0, 320);
    for (interleaved, width) in [(false, 320), (true, 640)] {
        let layer = Layer { interleaved, ..LAYER };
        let half = |name| [rows(name, 0, width), rows(name, 320, 320).filter(|_| !interleaved)];
        let ([gate, up], [grad_gate, grad_up]) = (half("hidden"), half("grad_hidden"));
        assert_eq!(Layer { keeps_hidden: false, ..layer }.maps_of("up"), [None, None, None, None, act]);
        for (wants, results) in [
            ([true, false, false, false], [grad_gate, grad_up, None]),
            ([false, true, false, false], [None, None, None]),
            ([false, false, true, false], [grad_gate, grad_up, None]),
            ([false, false, false, true], [None, None, scaled_act]),
        ] {
            let [first, second, third] = results;
            let expected = [gate, up, first, second, third];
            assert_eq!(Layer { wants, ..layer }.maps_of("grad_hidden"), expected, "{wants:?}");
        }
    }
}

#[test]
fn sums_that_are_added_to_have_no_map() {
    for update in [Update::Add, Update::AddWide] {
        assert_eq!(Layer { update, ..LAYER }.maps_of("grad_weight"), [None; 5]);
    }
}

#[test]
fn factors_of_which_neither_is_gathered_have_one_map() {
    let factor = |name, address, columns| Factor {
        rows: buffer(name, address, 100 * columns),
        gather: Buffer::default(),
        columns,
    };
    let problem = GradWeight {
        math: BF16,
        tokens: 100,
        rows: 100,
        experts: 2,
        offsets: buffer("offsets", 1, 6),
        a: factor("left", 2, 264),
        b: factor("right", 3, 256),
        out: (buffer("out", 4, 2 * 264 * 256), Update::Write),
    };
    // SAFETY: nothing runs.
    let launches = launched(|queue| unsafe { problem.launch(queue) });
    let left = Some(("left", 0, [264, 100, 1], 64, false));
    let out = Some(("out", 0, [256, 264, 2], 64, false));
    let maps = [None, left, None, None, out, None, None];
    assert_eq!(launches, [("grad_weight_wgmma_bf16_128x256_b".to_owned(), maps)]);
}

/// A map cannot be of no elements.
#[test]
fn an_empty_inner_dimension_takes_no_warpgroups() {
    let product = Product {
        math: BF16,
        rows: 128,
        inner: 0,
        columns: 512,
        experts: 2,
        transposed: false,
        a: buffer("a", 1, 0),
        offsets: buffer("offsets", 2, 6),
        w: Buffer::default(),
        bias: Buffer::default(),
        y: buffer("y", 3, 128 * 512),
    };
    // SAFETY: nothing runs.
    let launches = launched(|queue| unsafe { product.launch(queue) });
    assert_eq!(launches, [("gemm_bf16_64x128_any".to_owned(), [None; 7])]);
}
