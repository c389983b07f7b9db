//! `route`: from logits to expert ids and weights, and back.

use fastmoe_core::{Groups, Router, validate_ids};
use fastmoe_cpu::{Route, RouteGrad};
use pyo3::prelude::*;

use crate::backend::{Backend, buffer, check_ids};
use crate::call::{at_least, checked, compute, optional_input, optional_output, threads};
use crate::element::Element;
use crate::error::Result;
use crate::tensor::Tensor;

#[pyfunction]
#[pyo3(signature = (
    logits, bias, expert_scale, ids, weights, scores, *,
    softcap, score, order, n_group, topk_group, group_score, group_losers,
    renormalize, renormalize_eps, scale, threads
))]
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
    let bias = checked(optional_input("bias", bias)?, wide, &[experts], "E")?;
    let expert_scale = checked(optional_input("expert_scale", expert_scale)?, wide, &[experts], "E")?;
    let ids = Tensor::output("ids", ids)?;
    let [_, top_k] = ids.dims("T, K")?;
    ids.expect(Element::I64, &[tokens, top_k], "T, K")?;
    let weights = Tensor::output("weights", weights)?;
    weights.expect(wide, &[tokens, top_k], "T, K")?;
    let scores = Tensor::output("scores", scores)?;
    scores.expect(wide, &[tokens, experts], "T, E")?;
    let inputs = [Some(&logits), bias.as_ref(), expert_scale.as_ref()];
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
    if let Backend::Cuda(device) = Backend::of(inputs, outputs)? {
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
            threads,
        };
        // SAFETY: dtypes, shapes and separate memory were checked above.
        Ok(unsafe { fastmoe_cpu::route(dtype, &problem) }?)
    })
}

#[pyfunction]
#[pyo3(signature = (
    logits, expert_scale, ids, scores, grad_weights, grad_scores, grad_logits, grad_expert_scale, *,
    softcap, score, order, renormalize, renormalize_eps, scale, threads
))]
pub fn route_backward(
    py: Python<'_>,
    logits: &Bound<'_, PyAny>,
    expert_scale: Option<&Bound<'_, PyAny>>,
    ids: &Bound<'_, PyAny>,
    scores: &Bound<'_, PyAny>,
    grad_weights: Option<&Bound<'_, PyAny>>,
    grad_scores: Option<&Bound<'_, PyAny>>,
    grad_logits: &Bound<'_, PyAny>,
    grad_expert_scale: Option<&Bound<'_, PyAny>>,
    softcap: Option<f64>,
    score: &str,
    order: &str,
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
    let ids = Tensor::input("ids", ids)?;
    let [_, top_k] = ids.dims("T, K")?;
    ids.expect(Element::I64, &[tokens, top_k], "T, K")?;
    let scores = Tensor::input("scores", scores)?;
    scores.expect(wide, &[tokens, experts], "T, E")?;
    let expert_scale = checked(optional_input("expert_scale", expert_scale)?, wide, &[experts], "E")?;
    let grad_weights =
        checked(optional_input("grad_weights", grad_weights)?, wide, &[tokens, top_k], "T, K")?;
    let grad_scores = checked(optional_input("grad_scores", grad_scores)?, wide, &[tokens, experts], "T, E")?;
    let grad_logits = Tensor::output("grad_logits", grad_logits)?;
    grad_logits.expect(dtype, &[tokens, experts], "T, E")?;
    let grad_expert_scale = optional_output("grad_expert_scale", grad_expert_scale)?;
    let grad_expert_scale = checked(grad_expert_scale, wide, &[experts], "E")?;
    let inputs = [Some(&logits), Some(&ids), Some(&scores)].into_iter().chain([
        expert_scale.as_ref(),
        grad_weights.as_ref(),
        grad_scores.as_ref(),
    ]);
    let outputs = [Some(&grad_logits), grad_expert_scale.as_ref()];
    let router = Router {
        softcap,
        score: score.parse()?,
        order: order.parse()?,
        renormalize,
        renormalize_eps,
        scale,
        ..Router::new(top_k)
    };
    router.check(experts)?;
    if let Backend::Cuda(device) = Backend::of(inputs, outputs)? {
        let problem = fastmoe_cuda::RouteGrad {
            router: &router,
            dtype: logits.cuda_float()?,
            tokens,
            experts,
            logits: logits.buffer(),
            ids: ids.buffer(),
            scores: scores.buffer(),
            expert_scale: buffer(&expert_scale),
            grad_weights: buffer(&grad_weights),
            grad_scores: buffer(&grad_scores),
            grad_logits: grad_logits.buffer(),
            grad_expert_scale: buffer(&grad_expert_scale),
        };
        return device.run(py, problem.scratch(), |queue| {
            check_ids(queue, &ids, top_k, experts)?;
            // SAFETY: dtypes, shapes and separate memory were checked; torch keeps the memory for the stream.
            unsafe { problem.launch(queue) }.map_err(Into::into)
        });
    }
    compute(py, || {
        let ids = ids.slice()?;
        validate_ids(ids, top_k, experts)?;
        let problem = RouteGrad {
            router: &router,
            tokens,
            experts,
            logits: logits.ptr(),
            ids,
            scores: scores.ptr(),
            expert_scale: expert_scale.as_ref().map(Tensor::ptr),
            grad_weights: grad_weights.as_ref().map(Tensor::ptr),
            grad_scores: grad_scores.as_ref().map(Tensor::ptr),
            grad_logits: grad_logits.ptr_mut(),
            grad_expert_scale: grad_expert_scale.as_ref().map(Tensor::ptr_mut),
            threads,
        };
        // SAFETY: dtypes, shapes, separate memory and every id were checked.
        Ok(unsafe { fastmoe_cpu::route_backward(dtype, &problem) }?)
    })
}
