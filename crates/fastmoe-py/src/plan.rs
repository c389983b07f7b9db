//! `plan`: the stable sort of the routed rows by expert.

use fastmoe_core::{Capacity, ExpertId, Float, OutOfRange, PlanOut, PlanSpec};
use fastmoe_cpu::Threads;
use fastmoe_cuda::Queue;
use pyo3::prelude::*;

use crate::backend::{Backend, buffer};
use crate::call::{at_least, compute, optional_input, optional_output, threads};
use crate::element::{Element, Scalar};
use crate::error::{Error, Result};
use crate::tensor::{Tensor, wrong_dtype};

#[pyfunction]
#[pyo3(signature = (
    ids, weights, counts, offsets, gather, inverse, sorted_weights, *,
    num_experts, capacity, drop, pad, out_of_range, threads
))]
pub fn plan(
    py: Python<'_>,
    ids: &Bound<'_, PyAny>,
    weights: Option<&Bound<'_, PyAny>>,
    counts: &Bound<'_, PyAny>,
    offsets: &Bound<'_, PyAny>,
    gather: &Bound<'_, PyAny>,
    inverse: &Bound<'_, PyAny>,
    sorted_weights: Option<&Bound<'_, PyAny>>,
    num_experts: i64,
    capacity: Option<i64>,
    drop: &str,
    pad: bool,
    out_of_range: &str,
    threads: i64,
) -> Result<()> {
    let threads = self::threads(threads)?;
    let experts = at_least("num_experts", 1, num_experts)?;
    let capacity = capacity.map(|rows| at_least("capacity", 0, rows)).transpose()?;
    if pad && capacity.is_none() {
        return Err(Error::wrong_value("pad", "True", "False without a capacity"));
    }
    let drop = drop.parse()?;
    let ids = Tensor::input("ids", ids)?;
    let [tokens, top_k] = ids.dims("T, K")?;
    let spec = PlanSpec {
        tokens,
        top_k,
        experts,
        capacity: capacity.map(|rows| Capacity { rows, drop, pad }),
        out_of_range: out_of_range.parse()?,
    };
    let mut plan = NewPlan {
        spec,
        ids,
        weights: optional_input("weights", weights)?,
        counts: Tensor::output("counts", counts)?,
        offsets: Tensor::output("offsets", offsets)?,
        gather: Tensor::output("gather", gather)?,
        inverse: Tensor::output("inverse", inverse)?,
        sorted_weights: optional_output("sorted_weights", sorted_weights)?,
    };
    plan.check()?;
    if let Backend::Cuda(device) = Backend::of(plan.inputs(), plan.outputs())? {
        let sort = plan.on_device()?;
        return device.run(py, sort.scratch(), |queue| plan.launch(&sort, queue));
    }
    compute(py, || plan.build(threads))
}

/// A plan to make of ids, and where it goes.
pub struct NewPlan {
    pub spec: PlanSpec,
    pub ids: Tensor,
    pub weights: Option<Tensor>,
    pub counts: Tensor,
    pub offsets: Tensor,
    pub gather: Tensor,
    pub inverse: Tensor,
    pub sorted_weights: Option<Tensor>,
}

impl NewPlan {
    fn inputs(&self) -> [Option<&Tensor>; 2] {
        [Some(&self.ids), self.weights.as_ref()]
    }

    fn outputs(&self) -> [Option<&Tensor>; 5] {
        let Self { counts, offsets, gather, inverse, sorted_weights, .. } = self;
        [Some(counts), Some(offsets), Some(gather), Some(inverse), sorted_weights.as_ref()]
    }

    /// Fails unless shapes and dtypes are those of the spec.
    fn check(&self) -> Result<()> {
        let Self { spec, ids, weights, counts, offsets, gather, inverse, sorted_weights } = self;
        let padded = spec.capacity.is_some_and(|capacity| capacity.pad);
        let slots = [spec.tokens, spec.top_k];
        ids.expect_shape(&slots, "T, K")?;
        if let Some(weights) = weights {
            weights.expect_shape(&slots, "T, K")?;
        }
        counts.expect(Element::I32, &[spec.experts], "E")?;
        offsets.expect(Element::I32, &[spec.experts + 1], "E+1")?;
        gather.expect(Element::I32, &[spec.rows()], if padded { "E*C" } else { "T*K" })?;
        inverse.expect(Element::I32, &slots, "T, K")?;
        if let Some(sorted) = sorted_weights {
            sorted.expect_shape(&[spec.rows()], "rows of gather")?;
        }
        Ok(())
    }

    /// The problem of the CUDA backend, of a checked plan.
    pub fn on_device(&self) -> Result<fastmoe_cuda::Plan<'_>> {
        let Self { spec, ids, weights, sorted_weights, .. } = self;
        for weights in weights.iter().chain(sorted_weights) {
            weights.expect_element(Element::F32)?;
        }
        let wide_ids = match ids.element() {
            Element::I64 => true,
            Element::I32 => false,
            given => return Err(not_ids(given)),
        };
        spec.check_request(weights.is_some(), sorted_weights.is_some())?;
        Ok(fastmoe_cuda::Plan {
            spec,
            wide_ids,
            ids: ids.buffer(),
            weights: buffer(weights),
            counts: self.counts.buffer(),
            offsets: self.offsets.buffer(),
            gather: self.gather.buffer(),
            inverse: self.inverse.buffer(),
            sorted_weights: buffer(sorted_weights),
            check: fastmoe_cuda::checks() && spec.out_of_range == OutOfRange::Error,
        })
    }

    /// Queues it. On a device ids out of range are dropped, and reported where the process checks for them.
    pub fn launch(&self, sort: &fastmoe_cuda::Plan<'_>, queue: &mut Queue<'_>) -> Result<()> {
        // SAFETY: dtypes, shapes and separate memory were checked; torch keeps the memory for the stream.
        match unsafe { sort.launch(queue)? } {
            None => Ok(()),
            Some((row, given)) => {
                let PlanSpec { top_k, experts, .. } = self.spec;
                let (token, slot) = (row / top_k, row % top_k);
                Err(fastmoe_core::Error::ExpertId { token, slot, given, experts }.into())
            }
        }
    }

    /// Sorts on the CPU.
    pub fn build(&mut self, threads: Threads) -> Result<()> {
        let build = match (self.ids.element(), self.weights.as_ref().map(Tensor::element)) {
            (Element::I64, None | Some(Element::F32)) => Self::build_of::<i64, f32>,
            (Element::I32, None | Some(Element::F32)) => Self::build_of::<i32, f32>,
            (Element::I64, Some(Element::F64)) => Self::build_of::<i64, f64>,
            (Element::I32, Some(Element::F64)) => Self::build_of::<i32, f64>,
            (Element::I64 | Element::I32, Some(given)) => {
                return Err(wrong_dtype("weights", given, "float32 or float64"));
            }
            (given, _) => return Err(not_ids(given)),
        };
        build(self, threads)
    }

    fn build_of<I: ExpertId + Scalar, F: Float + Scalar>(&mut self, threads: Threads) -> Result<()> {
        let out = PlanOut {
            counts: self.counts.slice_mut()?,
            offsets: self.offsets.slice_mut()?,
            gather: self.gather.slice_mut()?,
            inverse: self.inverse.slice_mut()?,
            sorted_weights: self.sorted_weights.as_mut().map(Tensor::slice_mut::<F>).transpose()?,
        };
        let weights = self.weights.as_ref().map(Tensor::slice::<F>).transpose()?;
        Ok(self.spec.build::<I, F>(&threads, self.ids.slice()?, weights, out)?)
    }
}

fn not_ids(given: Element) -> Error {
    wrong_dtype("ids", given, "int64 or int32")
}
