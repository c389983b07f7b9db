//! `route`: from logits to expert ids and weights.

use fastmoe_core::Router;
use fastmoe_cpu::Route;
use pyo3::prelude::*;

use crate::call::{compute, optional_input, threads};
use crate::element::Element;
use crate::error::Result;
use crate::tensor::{Tensor, disjoint};

#[pyfunction]
#[pyo3(signature = (logits, bias, ids, weights, scores, *, score, order, renormalize, scale, threads))]
#[expect(clippy::too_many_arguments, reason = "the arguments of the Python function")]
pub fn route(
    py: Python<'_>,
    logits: &Bound<'_, PyAny>,
    bias: Option<&Bound<'_, PyAny>>,
    ids: &Bound<'_, PyAny>,
    weights: &Bound<'_, PyAny>,
    scores: &Bound<'_, PyAny>,
    score: &str,
    order: &str,
    renormalize: bool,
    scale: f64,
    threads: i64,
) -> Result<()> {
    let threads = self::threads(threads)?;
    let logits = Tensor::input("logits", logits)?;
    let [tokens, experts] = logits.dims("T, E")?;
    let dtype = logits.float()?;
    let wide = Element::of_weights(dtype);
    let bias = optional_input("bias", bias)?;
    if let Some(bias) = &bias {
        bias.expect(wide, &[experts], "E")?;
    }
    let ids = Tensor::output("ids", ids)?;
    let [_, top_k] = ids.dims("T, K")?;
    ids.expect(Element::I64, &[tokens, top_k], "T, K")?;
    let weights = Tensor::output("weights", weights)?;
    weights.expect(wide, &[tokens, top_k], "T, K")?;
    let scores = Tensor::output("scores", scores)?;
    scores.expect(wide, &[tokens, experts], "T, E")?;
    disjoint([&ids, &weights, &scores].map(Some), [Some(&logits), bias.as_ref()])?;
    let router = Router { top_k, score: score.parse()?, order: order.parse()?, renormalize, scale };
    router.check(experts)?;
    compute(py, || {
        let problem = Route {
            router: &router,
            tokens,
            experts,
            logits: logits.ptr(),
            bias: bias.as_ref().map(Tensor::ptr),
            ids: ids.ptr_mut().cast(),
            weights: weights.ptr_mut(),
            scores: scores.ptr_mut(),
            threads: threads.0,
        };
        // SAFETY: dtypes, shapes and separate memory were checked above.
        unsafe { fastmoe_cpu::route(dtype, &problem) }
        Ok(())
    })
}
