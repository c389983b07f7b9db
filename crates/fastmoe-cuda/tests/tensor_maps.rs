//! What kernels of warpgroups are given: tensor maps of operands that are not gathered, and whole clusters.

use fastmoe_core::Update;
use fastmoe_cuda::driver::{Device, Driver, Kernel, MapSpec, Region, Stream, TensorMap};
use fastmoe_cuda::{
    Buffer, DType, Factor, Gpu, GradWeight, Math, Mlp, MlpGrads, Product, Queue, Result, Sizes,
};
use std::collections::HashMap;
use std::sync::Mutex;

/// A tensor's name, width, height and depth, the height of a box, and whether L2 fetches two boxes.
type Operand = Option<(&'static str, [usize; 3], u32, bool)>;

/// The kernel, its operands A and B.
type Launch = (String, [Operand; 2]);

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
        Ok(Kernel { function: kernels.len() - 1, threads: 0, shared: 0, early: false })
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
            return Ok(());
        }
        assert!((params.as_ptr() as usize).is_multiple_of(64), "maps are aligned");
        let operand = |at: usize| {
            let map = params[at..at + 128].chunks_exact(8);
            let words: Vec<_> = map.map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect();
            assert_eq!(words[1..], [0; 15]);
            let MapSpec { address, sizes, box_height, two_boxes } = specs[words[0].checked_sub(1)? as usize];
            let tensor = memory.iter().find(|region| region.start as u64 == address).unwrap();
            assert_eq!(tensor.bytes, 2 * sizes.iter().product::<usize>(), "{}", tensor.name);
            Some((tensor.name, sizes, box_height, two_boxes))
        };
        let operands = [operand(0), operand(128)];
        let first = u64::from_ne_bytes(params[256..264].try_into().unwrap());
        assert_eq!(first as usize, memory[0].start, "the parameters are behind the maps");
        assert_eq!(blocks, 2);
        launches.push((kernel, operands));
        Ok(())
    }

    unsafe fn set_word(&self, _: i32, _: Stream, _: u64, _: i32) -> Result<()> {
        Ok(())
    }

    unsafe fn read(&self, _: i32, _: Stream, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
}

/// The launches of kernels of warpgroups.
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

/// Of a gated layer, T 64, H 256, I 320, E 2, K 2: forward and backward.
fn layer(transposed: bool) -> Vec<Launch> {
    let (tokens, hidden, intermediate, experts, top_k) = (64, 256, 320, 2, 2);
    let rows = tokens * top_k;
    let sizes = Sizes {
        math: BF16,
        tokens,
        rows,
        hidden,
        intermediate,
        experts,
        activation: (0, true),
        transposed,
        interleaved: false,
    };
    let mlp = Mlp {
        sizes,
        top_k,
        x: buffer("x", 1, tokens * hidden),
        w1: buffer("w1", 2, experts * 2 * intermediate * hidden),
        b1: Buffer::default(),
        w2: buffer("w2", 3, experts * intermediate * hidden),
        b2: Buffer::default(),
        weights: buffer("weights", 4, 2 * rows),
        offsets: buffer("offsets", 5, 2 * (experts + 1)),
        gather: buffer("gather", 6, 2 * rows),
        inverse: buffer("inverse", 7, 2 * rows),
    };
    let hidden = buffer("hidden", 8, rows * 2 * intermediate);
    let grads = MlpGrads {
        x: buffer("grad_x", 9, 0),
        w1: (buffer("grad_w1", 10, 0), Update::Write),
        w2: (buffer("grad_w2", 11, 0), Update::Write),
        ..MlpGrads::default()
    };
    launched(|queue| {
        // SAFETY: nothing runs.
        unsafe {
            mlp.forward(queue, buffer("out", 12, 0), hidden)?;
            mlp.backward(queue, hidden, buffer("grad_out", 13, 0), &grads)
        }
    })
}

#[test]
fn maps_are_of_weights_and_of_rows_in_place() {
    let act = Some(("act", [320, 128, 1], 64, true));
    let [grad_hidden, grad_hidden_across] =
        [true, false].map(|along_inner| Some(("grad_hidden", [640, 128, 1], 64, along_inner)));
    let scaled_act = Some(("scaled_act", [320, 128, 1], 64, false));
    let w1 = |sizes, box_height, along_inner| Some(("w1", sizes, box_height, along_inner));
    let w2 = |sizes, box_height, along_inner| Some(("w2", sizes, box_height, along_inner));
    let expected = [
        ("up_wgmma_bf16_128x256_nt", [None, w1([256, 640, 2], 128, true)]),
        ("gemm_wgmma_bf16_128x256_nt", [act, w2([320, 256, 2], 128, true)]),
        ("grad_hidden_wgmma_bf16_128x256_nn", [None, w2([320, 256, 2], 64, false)]),
        ("grad_weight_wgmma_bf16_128x256_a", [None, scaled_act]),
        ("grad_weight_wgmma_bf16_128x256_b", [grad_hidden_across, None]),
        ("gemm_wgmma_bf16_128x256_nn", [grad_hidden, w1([256, 640, 2], 64, false)]),
    ];
    assert_eq!(layer(false), expected.map(|(name, operands)| (name.to_owned(), operands)));
    let transposed = [
        ("up_wgmma_bf16_128x256_nn", [None, w1([640, 256, 2], 64, false)]),
        ("gemm_wgmma_bf16_128x256_nn", [act, w2([256, 320, 2], 64, false)]),
        ("grad_hidden_wgmma_bf16_128x256_nt", [None, w2([256, 320, 2], 128, true)]),
        ("grad_weight_wgmma_bf16_128x256_b", [scaled_act, None]),
        ("grad_weight_wgmma_bf16_128x256_a", [None, grad_hidden_across]),
        ("gemm_wgmma_bf16_128x256_nt", [grad_hidden, w1([640, 256, 2], 128, true)]),
    ];
    assert_eq!(layer(true), transposed.map(|(name, operands)| (name.to_owned(), operands)));
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
        out: (buffer("out", 4, 0), Update::Write),
    };
    // SAFETY: nothing runs.
    let launches = launched(|queue| unsafe { problem.launch(queue) });
    let left = Some(("left", [264, 100, 1], 64, false));
    assert_eq!(launches, [("grad_weight_wgmma_bf16_128x256_b".to_owned(), [left, None])]);
}

#[test]
fn operands_without_elements_have_no_map() {
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
    assert_eq!(launches, [("gemm_wgmma_bf16_128x256_nt".to_owned(), [None, None])]);
}
