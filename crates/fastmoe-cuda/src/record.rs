//! What a call would launch on a device that need not be there: the choices of this crate, written down instead of run.

use crate::driver::{Device, Driver, Kernel, Region, Stream};
use crate::{Buffer, Error, Gpu, Mlp, MlpGrads, Plan, Queue, Result, Sizes, limits};
use fastmoe_core::{OutOfRange, PlanSpec, Update};
use std::cell::RefCell;
use std::collections::HashMap;

/// A launch that was asked for.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The kernel's entry point.
    pub kernel: String,
    /// The size of the grid.
    pub blocks: u32,
    /// Every tensor that the kernel is given.
    pub memory: Vec<Region>,
}

/// The launches of the expert MLP with its routing plan: the forward pass and, in training, the backward pass with all
/// gradients.
///
/// # Errors
/// [`Error::TooLarge`] for sizes that the kernels cannot count.
pub fn mlp_launches(
    device: Device,
    sizes: Sizes,
    top_k: usize,
    biased: bool,
    train: bool,
) -> Result<Vec<Launch>> {
    let Sizes { tokens, rows, hidden, intermediate, experts, math, .. } = sizes;
    limits::rows("T (tokens)", tokens)?;
    limits::rows("T*K (routed rows)", rows)?;
    limits::rows("E (experts)", experts)?;
    limits::columns("H (hidden size)", hidden)?;
    limits::columns("I (intermediate size)", intermediate)?;
    let float = |name, elements: usize| pretended(name, elements.saturating_mul(math.dtype.bytes()));
    let bias = |name, columns| if biased { float(name, experts * columns) } else { Buffer::default() };
    let index = |name, elements: usize| pretended(name, 4 * elements);
    let mlp = Mlp {
        sizes,
        top_k,
        x: float("x", tokens * hidden),
        w1: float("w1", (experts * sizes.up()).saturating_mul(hidden)),
        b1: bias("b1", sizes.up()),
        w2: float("w2", (experts * hidden).saturating_mul(intermediate)),
        b2: bias("b2", hidden),
        weights: index("weights", tokens * top_k),
        offsets: index("offsets", experts + 1),
        gather: index("gather", rows),
        inverse: index("inverse", tokens * top_k),
    };
    let spec = PlanSpec { tokens, top_k, experts, capacity: None, out_of_range: OutOfRange::Drop };
    let plan = Plan {
        spec: &spec,
        wide_ids: true,
        ids: pretended("ids", 8 * tokens * top_k),
        weights: Buffer::default(),
        counts: index("counts", experts),
        offsets: mlp.offsets,
        gather: mlp.gather,
        inverse: mlp.inverse,
        sorted_weights: Buffer::default(),
        check: false,
    };
    let pre_activation = if train { float("hidden", rows * sizes.up()) } else { Buffer::default() };
    let like = |name, tensor: Buffer| Buffer { name, ..tensor };
    let grads = MlpGrads {
        x: like("grad_x", mlp.x),
        weights: like("grad_weights", mlp.weights),
        w1: (like("grad_w1", mlp.w1), Update::Write),
        b1: like("grad_b1", mlp.b1),
        w2: (like("grad_w2", mlp.w2), Update::Write),
        b2: like("grad_b2", mlp.b2),
    };
    record(device, |mut queue| {
        // SAFETY: nothing is launched.
        unsafe {
            plan.launch(&mut queue)?;
            mlp.forward(&mut queue, float("out", tokens * hidden), pre_activation)?;
            if train {
                mlp.backward(&mut queue, pre_activation, float("grad_out", tokens * hidden), &grads)?;
            }
        }
        Ok(())
    })
}

/// Memory that nobody looks into.
fn pretended(name: &'static str, bytes: usize) -> Buffer {
    Buffer { name, address: 1 << 40, bytes }
}

fn record(device: Device, work: impl FnOnce(Queue<'_>) -> Result<()>) -> Result<Vec<Launch>> {
    LAUNCHES.take();
    let gpu = Gpu::without_kernels(&Recorder, device);
    let scratch = Buffer { bytes: usize::MAX, ..pretended("scratch", 0) };
    work(Queue { gpu: &gpu, stream: Stream(0), scratch })?;
    Ok(LAUNCHES.take())
}

thread_local! {
    /// Of the recording in progress; the last kernel may be one that was looked up and is about to be launched.
    static LAUNCHES: RefCell<Vec<Launch>> = const { RefCell::new(Vec::new()) };
}

/// Runs nothing.
pub(crate) struct Recorder;

impl Driver for Recorder {
    fn version(&self) -> Result<i32> {
        Ok(0)
    }

    fn device_count(&self) -> Result<i32> {
        Ok(0)
    }

    fn device(&self, device: i32) -> Result<Device> {
        Err(Error::NoDevice { device, count: 0 })
    }

    fn load(&self, _: i32) -> Result<HashMap<&'static str, Kernel>> {
        Ok(HashMap::new())
    }

    fn kernel(&self, name: &str) -> Result<Kernel> {
        let launch = Launch { kernel: name.to_owned(), blocks: 0, memory: vec![] };
        LAUNCHES.with_borrow_mut(|launches| launches.push(launch));
        Ok(Kernel { function: 0, threads: 0, shared: 0 })
    }

    unsafe fn launch(
        &self,
        _: i32,
        _: Stream,
        _: Kernel,
        blocks: u32,
        _: &[u8],
        memory: &[Region],
    ) -> Result<()> {
        LAUNCHES.with_borrow_mut(|launches| {
            let launch = launches.last_mut().expect("a kernel is looked up before it is launched");
            launch.blocks = blocks;
            launch.memory = memory.iter().filter(|region| region.start != 0).copied().collect();
        });
        Ok(())
    }

    unsafe fn set_word(&self, _: i32, _: Stream, _: u64, _: i32) -> Result<()> {
        Ok(())
    }

    unsafe fn read(&self, _: i32, _: Stream, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Math};

    fn launches(shared_per_block: u32, tokens: usize, train: bool) -> Vec<Launch> {
        let device =
            Device { name: "test".to_owned(), capability: (8, 0), multiprocessors: 100, shared_per_block };
        let sizes = Sizes {
            math: Math { dtype: DType::Bf16, tf32: false },
            tokens,
            rows: 2 * tokens,
            hidden: 1024,
            intermediate: 512,
            experts: 8,
            activation: (0, true),
            transposed: false,
            interleaved: false,
        };
        mlp_launches(device, sizes, 2, false, train).unwrap()
    }

    fn names(launches: &[Launch]) -> Vec<&str> {
        launches.iter().map(|launch| launch.kernel.as_str()).collect()
    }

    #[test]
    fn forward_and_backward_are_those_of_a_call() {
        let forward = launches(163 << 10, 4096, false);
        assert_eq!(
            names(&forward)[3..],
            ["up_bf16_128x256_nt", "gemm_bf16_128x256_nt", "combine_bf16"],
            "behind the three kernels of the plan"
        );
        let train = launches(163 << 10, 4096, true);
        assert_eq!(names(&train)[..6], names(&forward));
        assert!(names(&train).contains(&"grad_hidden_bf16_128x256_nn"));
        assert_eq!(train.len(), 13);
    }

    #[test]
    fn tiles_follow_shared_memory_and_rows() {
        assert!(names(&launches(99 << 10, 4096, false)).contains(&"up_bf16_128x128_nt"));
        assert!(names(&launches(163 << 10, 16, false)).contains(&"up_bf16_32x128_nt"));
    }

    #[test]
    fn launches_know_their_memory() {
        let forward = launches(163 << 10, 4096, false);
        let up = forward.iter().find(|launch| launch.kernel.starts_with("up")).unwrap();
        let bytes: Vec<_> = up.memory.iter().map(|region| (region.name, region.bytes)).collect();
        let (x, w1, act) = (4096 * 1024 * 2, 8 * 1024 * 1024 * 2, 8192 * 512 * 2);
        assert_eq!(bytes, [("x", x), ("gather", 4 * 8192), ("offsets", 36), ("w1", w1), ("act", act)]);
        assert_eq!(up.blocks, 100, "one of these tiles a multiprocessor");
    }
}
