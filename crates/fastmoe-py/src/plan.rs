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
    plan.fill(py, &spec, threads, &ids, &weights)
}

/// Where a plan goes.
pub struct Plan {
    pub counts: Tensor,
    pub offsets: Tensor,
    pub gather: Tensor,
    pub inverse: Tensor,
    pub sorted_weights: Option<Tensor>,
}

impl Plan {
    /// Sorts the routed rows of `ids` into it.
    pub fn fill(
        mut self,
        py: Python<'_>,
        spec: &PlanSpec,
        threads: Threads,
        ids: &Tensor,
        weights: &Option<Tensor>,
    ) -> Result<()> {
        let padded = spec.capacity.is_some_and(|capacity| capacity.pad);
        self.counts.expect(Element::I32, &[spec.experts], "E")?;
        self.offsets.expect(Element::I32, &[spec.experts + 1], "E+1")?;
        self.gather.expect(Element::I32, &[spec.rows()], if padded { "E*C" } else { "T*K" })?;
        self.inverse.expect(Element::I32, &[spec.tokens, spec.top_k], "T, K")?;
        if let Some(sorted) = &self.sorted_weights {
            sorted.expect_shape(&[spec.rows()], "rows of gather")?;
        }
        let outputs = [&self.counts, &self.offsets, &self.gather, &self.inverse].map(Some);
        let outputs = outputs.into_iter().chain([self.sorted_weights.as_ref()]);
        let inputs = [Some(ids), weights.as_ref()];
        disjoint(outputs.clone(), inputs)?;
        if let Backend::Cuda(device) = Backend::of(inputs.into_iter().chain(outputs))? {
            return self.fill_on(py, device, spec, ids, weights);
        }
        let build = match (ids.element(), weights.as_ref().map(Tensor::element)) {
            (Element::I64, None | Some(Element::F32)) => Self::build::<i64, f32>,
            (Element::I32, None | Some(Element::F32)) => Self::build::<i32, f32>,
            (Element::I64, Some(Element::F64)) => Self::build::<i64, f64>,
            (Element::I32, Some(Element::F64)) => Self::build::<i32, f64>,
            (Element::I64 | Element::I32, Some(given)) => {
                let given = given.name();
                return Err(Error::Type(format!("weights: expected dtype float32 or float64, got {given}")));
            }
            (given, _) => return Err(not_ids(given)),
        };
        compute(py, || build(&mut self, spec, threads, ids, weights))
    }

    /// On a device ids out of range are dropped, and reported where the process checks for them.
    fn fill_on(
        &self,
        py: Python<'_>,
        device: Device,
        spec: &PlanSpec,
        ids: &Tensor,
        weights: &Option<Tensor>,
    ) -> Result<()> {
        for weights in weights.iter().chain(&self.sorted_weights) {
            weights.expect_element(Element::F32)?;
        }
        let wide_ids = match ids.element() {
            Element::I64 => true,
            Element::I32 => false,
            given => return Err(not_ids(given)),
        };
        spec.check_request(weights.is_some(), self.sorted_weights.is_some())?;
        let problem = fastmoe_cuda::Plan {
            spec,
            wide_ids,
            ids: ids.buffer(),
            weights: buffer(weights),
            counts: self.counts.buffer(),
            offsets: self.offsets.buffer(),
            gather: self.gather.buffer(),
            inverse: self.inverse.buffer(),
            sorted_weights: buffer(&self.sorted_weights),
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
        &mut self,
        spec: &PlanSpec,
        threads: Threads,
        ids: &Tensor,
        weights: &Option<Tensor>,
    ) -> Result<()> {
        let out = PlanOut {
            counts: self.counts.slice_mut()?,
            offsets: self.offsets.slice_mut()?,
            gather: self.gather.slice_mut()?,
            inverse: self.inverse.slice_mut()?,
            sorted_weights: self.sorted_weights.as_mut().map(Tensor::slice_mut::<F>).transpose()?,
        };
        let weights = weights.as_ref().map(Tensor::slice::<F>).transpose()?;
        Ok(spec.build::<I, F>(&threads, ids.slice()?, weights, out)?)
    }
}

fn not_ids(given: Element) -> Error {
    Error::Type(format!("ids: expected dtype int64 or int32, got {}", given.name()))
}
