//! `plan`: the stable sort of the routed rows by expert.

use fastmoe_core::{Capacity, ExpertId, Float, OutOfRange, PlanOut, PlanSpec};
use fastmoe_cpu::Threads;
use pyo3::prelude::*;

use crate::backend::{Backend, Device, buffer};
use crate::call::{at_least, compute, optional_input, optional_output, threads};
use crate::element::{Element, Scalar};
use crate::error::{Error, Result};
use crate::tensor::{Tensor, disjoint};

#[pyfunction]
#[pyo3(signature = (
    ids, weights, counts, offsets, gather, inverse, sorted_weights, *,
    num_experts, capacity, drop, pad, out_of_range, threads
))]
#[expect(clippy::too_many_arguments, reason = "the arguments of the Python function")]
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
        return Err(Error::Value("pad: expected False without a capacity, got True".to_owned()));
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
    let weights = optional_input("weights", weights)?;
    if let Some(weights) = &weights {
        weights.expect_shape(&[tokens, top_k], "T, K")?;
    }
    let plan = Plan {
        counts: Tensor::output("counts", counts)?,
        offsets: Tensor::output("offsets", offsets)?,
        gather: Tensor::output("gather", gather)?,
        inverse: Tensor::output("inverse", inverse)?,
        sorted_weights: optional_output("sorted_weights", sorted_weights)?,
    };
    plan.counts.expect(Element::I32, &[experts], "E")?;
    plan.offsets.expect(Element::I32, &[experts + 1], "E+1")?;
    plan.gather.expect(Element::I32, &[spec.rows()], if pad { "E*C" } else { "T*K" })?;
    plan.inverse.expect(Element::I32, &[tokens, top_k], "T, K")?;
    if let Some(sorted) = &plan.sorted_weights {
        sorted.expect_shape(&[spec.rows()], "rows of gather")?;
    }
    let outputs = [&plan.counts, &plan.offsets, &plan.gather, &plan.inverse].map(Some);
    let outputs = outputs.into_iter().chain([plan.sorted_weights.as_ref()]);
    let inputs = [Some(&ids), weights.as_ref()];
    disjoint(outputs.clone(), inputs)?;
    if let Backend::Cuda(device) = Backend::of(inputs.into_iter().chain(outputs))? {
        return on_device(py, device, &spec, &ids, &weights, &plan);
    }

    let build = match (ids.element(), weights.as_ref().map(Tensor::element)) {
        (Element::I64, None | Some(Element::F32)) => build::<i64, f32>,
        (Element::I32, None | Some(Element::F32)) => build::<i32, f32>,
        (Element::I64, Some(Element::F64)) => build::<i64, f64>,
        (Element::I32, Some(Element::F64)) => build::<i32, f64>,
        (Element::I64 | Element::I32, Some(given)) => {
            let given = given.name();
            return Err(Error::Type(format!("weights: expected dtype float32 or float64, got {given}")));
        }
        (given, _) => {
            let given = given.name();
            return Err(Error::Type(format!("ids: expected dtype int64 or int32, got {given}")));
        }
    };
    compute(py, || build(&spec, threads, &ids, weights.as_ref(), plan))
}

struct Plan {
    counts: Tensor,
    offsets: Tensor,
    gather: Tensor,
    inverse: Tensor,
    sorted_weights: Option<Tensor>,
}

/// On a device ids out of range are dropped, and reported where the process checks for them.
fn on_device(
    py: Python<'_>,
    device: Device,
    spec: &PlanSpec,
    ids: &Tensor,
    weights: &Option<Tensor>,
    plan: &Plan,
) -> Result<()> {
    for weights in weights.iter().chain(&plan.sorted_weights) {
        weights.expect_element(Element::F32)?;
    }
    let wide_ids = match ids.element() {
        Element::I64 => true,
        Element::I32 => false,
        given => {
            return Err(Error::Type(format!("ids: expected dtype int64 or int32, got {}", given.name())));
        }
    };
    spec.check_request(weights.is_some(), plan.sorted_weights.is_some())?;
    let problem = fastmoe_cuda::Plan {
        spec,
        wide_ids,
        ids: ids.buffer(),
        weights: buffer(weights),
        counts: plan.counts.buffer(),
        offsets: plan.offsets.buffer(),
        gather: plan.gather.buffer(),
        inverse: plan.inverse.buffer(),
        sorted_weights: buffer(&plan.sorted_weights),
        check: fastmoe_cuda::checks() && spec.out_of_range == OutOfRange::Error,
    };
    // SAFETY: dtypes, shapes and separate memory were checked; torch keeps the memory for the stream.
    match device.run(py, problem.scratch(), |queue| Ok(unsafe { problem.launch(queue)? }))? {
        None => Ok(()),
        Some((row, given)) => {
            let (token, slot, experts) = (row / spec.top_k, row % spec.top_k, spec.experts);
            Err(fastmoe_core::Error::ExpertId { token, slot, given, experts }.into())
        }
    }
}

fn build<I: ExpertId + Scalar, F: Float + Scalar>(
    spec: &PlanSpec,
    threads: Threads,
    ids: &Tensor,
    weights: Option<&Tensor>,
    mut plan: Plan,
) -> Result<()> {
    let out = PlanOut {
        counts: plan.counts.slice_mut()?,
        offsets: plan.offsets.slice_mut()?,
        gather: plan.gather.slice_mut()?,
        inverse: plan.inverse.slice_mut()?,
        sorted_weights: plan.sorted_weights.as_mut().map(Tensor::slice_mut::<F>).transpose()?,
    };
    let weights = weights.map(Tensor::slice::<F>).transpose()?;
    Ok(spec.build::<I, F>(&threads, ids.slice()?, weights, out)?)
}
