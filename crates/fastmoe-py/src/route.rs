//! `route`: from logits to expert ids and weights.

use fastmoe_core::{Groups, Router};
use fastmoe_cpu::Route;
use pyo3::prelude::*;

use crate::backend::{Backend, buffer};
use crate::call::{at_least, compute, optional_input, threads};
use crate::element::Element;
use crate::error::Result;
use crate::tensor::{Tensor, disjoint};

#[pyfunction]
#[pyo3(signature = (
    logits, bias, expert_scale, ids, weights, scores, *,
    softcap, score, order, n_group, topk_group, group_score, group_losers,
    renormalize, renormalize_eps, scale, threads
))]
#[expect(clippy::too_many_arguments, reason = "the arguments of the Python function")]
pub fn route(
    py: Python<'_>,
    logits: &Bound<'_, PyAny>,
    bias: Option<&Bound<'_, PyAny>>,
    expert_scale: Option<&Bound<'_, PyAny>>,
    ids: &Bound<'_, PyAny>,
    weights: &Bound<'_, PyAny>,
    scores: &Bound<'_, PyAny>,
    softcap: Option<f64>,
    score: &str,
    order: &str,
    n_group: i64,
    topk_group: i64,
    group_score: &str,
    group_losers: &str,
    renormalize: bool,
    renormalize_eps: f64,
    scale: f64,
    threads: i64,
) -> Result<()> {
    let threads = self::threads(threads)?;
    let logits = Tensor::input("logits", logits)?;
    let [tokens, experts] = logits.dims("T, E")?;
    let dtype = logits.float()?;
    let wide = Element::of_weights(dtype);
    let bias = optional_input("bias", bias)?;
    let expert_scale = optional_input("expert_scale", expert_scale)?;
    for per_expert in bias.iter().chain(&expert_scale) {
        per_expert.expect(wide, &[experts], "E")?;
    }
    let ids = Tensor::output("ids", ids)?;
    let [_, top_k] = ids.dims("T, K")?;
    ids.expect(Element::I64, &[tokens, top_k], "T, K")?;
    let weights = Tensor::output("weights", weights)?;
    weights.expect(wide, &[tokens, top_k], "T, K")?;
    let scores = Tensor::output("scores", scores)?;
    scores.expect(wide, &[tokens, experts], "T, E")?;
    let inputs = [Some(&logits), bias.as_ref(), expert_scale.as_ref()];
    disjoint([&ids, &weights, &scores].map(Some), inputs)?;
    let groups = Groups {
        n_group: at_least("n_group", 1, n_group)?,
        topk_group: at_least("topk_group", 1, topk_group)?,
        score: group_score.parse()?,
        losers: group_losers.parse()?,
    };
    let router = Router {
        top_k,
        softcap,
        score: score.parse()?,
        order: order.parse()?,
        groups: Some(groups).filter(|groups| groups.n_group > 1),
        renormalize,
        renormalize_eps,
        scale,
    };
    router.check(experts)?;
    let outputs = [Some(&ids), Some(&weights), Some(&scores)];
    if let Backend::Cuda(device) = Backend::of(inputs.into_iter().chain(outputs))? {
        let problem = fastmoe_cuda::Route {
            router: &router,
            dtype: logits.cuda_float()?,
            tokens,
            experts,
            logits: logits.buffer(),
            bias: buffer(&bias),
            expert_scale: buffer(&expert_scale),
            ids: ids.buffer(),
            weights: weights.buffer(),
            scores: scores.buffer(),
        };
        // SAFETY: dtypes, shapes and separate memory were checked; torch keeps the memory for the stream.
        return device.run(py, 0, |queue| unsafe { problem.launch(queue) }.map_err(Into::into));
    }
    compute(py, || {
        let problem = Route {
            router: &router,
            tokens,
            experts,
            logits: logits.ptr(),
            bias: bias.as_ref().map(Tensor::ptr),
            expert_scale: expert_scale.as_ref().map(Tensor::ptr),
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
