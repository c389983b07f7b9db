//! `mlp_forward` and `mlp_backward`: the expert MLP over a routing plan.

use fastmoe_core::Update;
use fastmoe_cpu::MlpGrads;
use pyo3::prelude::*;

use crate::backend::{Backend, buffer};
use crate::call::{compute, optional_input, optional_output, threads, update};
use crate::element::Element;
use crate::error::Result;
use crate::layer::{Layer, Layout, Problem, Rows};
use crate::tensor::Tensor;

#[pyfunction]
#[pyo3(signature = (
    x, w1, b1, w2, b2, weights, ids, offsets, gather, inverse, out, hidden,
    activation, transposed, interleaved, threads, w1_scales=None, w2_scales=None
))]
pub fn mlp_forward(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    w1: &Bound<'_, PyAny>,
    b1: Option<&Bound<'_, PyAny>>,
    w2: &Bound<'_, PyAny>,
    b2: Option<&Bound<'_, PyAny>>,
    weights: &Bound<'_, PyAny>,
    ids: Option<&Bound<'_, PyAny>>,
    offsets: Option<&Bound<'_, PyAny>>,
    gather: Option<&Bound<'_, PyAny>>,
    inverse: Option<&Bound<'_, PyAny>>,
    out: &Bound<'_, PyAny>,
    hidden: Option<&Bound<'_, PyAny>>,
    activation: &str,
    transposed: bool,
    interleaved: bool,
    threads: i64,
    w1_scales: Option<&Bound<'_, PyAny>>,
    w2_scales: Option<&Bound<'_, PyAny>>,
) -> Result<()> {
    let threads = self::threads(threads)?;
    let layout = Layout::new(activation, transposed, interleaved)?;
    let layer = Layer::new(layout, x, w1, b1, w2, b2, weights, [w1_scales, w2_scales])?;
    let scratch;
    let (packed, hidden) = match (ids, optional_output("hidden", hidden)?) {
        (None, hidden) => (None, hidden),
        (Some(_), Some(both)) => {
            let [hidden, plan] = layer.hidden_and_plan(&both)?;
            (Some(plan), Some(hidden))
        }
        (Some(_), None) => {
            let (length, place) = (layer.packed_length(), layer.x.place());
            scratch = place.scratch(py, 4 * length)?;
            // SAFETY: the scratch memory is of this size, and dropped after the plan.
            (Some(unsafe { Tensor::int32("plan", scratch.start(), length, place) }), None)
        }
    };
    let ids = optional_input("ids", ids)?;
    let mut plan = ids.zip(packed.as_ref()).map(|(ids, packed)| layer.plan(ids, packed)).transpose()?;
    let rows = match &plan {
        None => Rows::given(&layer, offsets, gather, inverse)?,
        Some(plan) => Rows::of(plan),
    };
    let problem = Problem { layer, rows };
    let sizes = problem.layer.sizes;
    let out = Tensor::output("out", out)?;
    out.expect(sizes.dtype, &[sizes.tokens, sizes.hidden], "T, H")?;
    if let Some(hidden) = &hidden {
        hidden.expect(sizes.dtype, &problem.hidden_shape(), problem.layer.layout.hidden_legend())?;
    }
    let of_plan = plan.as_ref().map_or_else(|| problem.rows.inputs(), |plan| [Some(&plan.ids), None, None]);
    let inputs = problem.layer.inputs().chain(of_plan);
    let outputs = [packed.as_ref(), Some(&out), hidden.as_ref()];
    if let Backend::Cuda(device) = Backend::of(inputs, outputs)? {
        let mlp = problem.on_device(py)?;
        let plan = plan.as_ref().map(|plan| plan.on_device().map(|sort| (plan, sort))).transpose()?;
        let (out, hidden) = (out.buffer(), buffer(&hidden));
        let scratch = plan.as_ref().map_or(0, |(_, sort)| sort.scratch()) + mlp.forward_scratch();
        return device.run(py, scratch, |queue| {
            if let Some((plan, sort)) = &plan {
                plan.launch(sort, queue)?;
            }
            problem.check_plan(queue)?;
            // SAFETY: dtypes, shapes and separate memory were checked; torch keeps the memory for the stream.
            unsafe { mlp.forward(queue, out, hidden) }.map_err(Into::into)
        });
    }
    compute(py, || {
        if let Some(plan) = &mut plan {
            plan.build(threads)?;
        }
        let mlp = problem.on_cpu(threads)?;
        // SAFETY: dtypes, shapes, separate memory and the plan were checked.
        Ok(unsafe { fastmoe_cpu::mlp_forward(&mlp, out.ptr_mut(), hidden.as_ref().map(Tensor::ptr_mut)) }?)
    })
}

#[pyfunction]
#[pyo3(signature = (
    grad_out, x, w1, b1, w2, b2, weights, hidden, offsets, gather, inverse,
    grad_x, grad_weights, grad_w1, grad_b1, grad_w2, grad_b2,
    activation, transposed, interleaved, threads, add_w1=false, add_w2=false,
    w1_scales=None, w2_scales=None
))]
pub fn mlp_backward(
    py: Python<'_>,
    grad_out: &Bound<'_, PyAny>,
    x: &Bound<'_, PyAny>,
    w1: &Bound<'_, PyAny>,
    b1: Option<&Bound<'_, PyAny>>,
    w2: &Bound<'_, PyAny>,
    b2: Option<&Bound<'_, PyAny>>,
    weights: &Bound<'_, PyAny>,
    hidden: &Bound<'_, PyAny>,
    offsets: Option<&Bound<'_, PyAny>>,
    gather: Option<&Bound<'_, PyAny>>,
    inverse: Option<&Bound<'_, PyAny>>,
    grad_x: Option<&Bound<'_, PyAny>>,
    grad_weights: Option<&Bound<'_, PyAny>>,
    grad_w1: Option<&Bound<'_, PyAny>>,
    grad_b1: Option<&Bound<'_, PyAny>>,
    grad_w2: Option<&Bound<'_, PyAny>>,
    grad_b2: Option<&Bound<'_, PyAny>>,
    activation: &str,
    transposed: bool,
    interleaved: bool,
    threads: i64,
    add_w1: bool,
    add_w2: bool,
    w1_scales: Option<&Bound<'_, PyAny>>,
    w2_scales: Option<&Bound<'_, PyAny>>,
) -> Result<()> {
    let threads = self::threads(threads)?;
    let layout = Layout::new(activation, transposed, interleaved)?;
    let layer = Layer::new(layout, x, w1, b1, w2, b2, weights, [w1_scales, w2_scales])?;
    let hidden = Tensor::input("hidden", hidden)?;
    let (hidden, rows) = match (offsets, gather, inverse) {
        (None, None, None) => {
            let [hidden, plan] = layer.hidden_and_plan(&hidden)?;
            (hidden, Rows::packed(&layer, &plan)?)
        }
        _ => (hidden, Rows::given(&layer, offsets, gather, inverse)?),
    };
    let problem = Problem { layer, rows };
    let sizes = problem.layer.sizes;
    let grad_out = Tensor::input("grad_out", grad_out)?;
    grad_out.expect(sizes.dtype, &[sizes.tokens, sizes.hidden], "T, H")?;
    hidden.expect(sizes.dtype, &problem.hidden_shape(), problem.layer.layout.hidden_legend())?;
    let grads = [
        optional_output("grad_x", grad_x)?,
        optional_output("grad_weights", grad_weights)?,
        optional_output("grad_w1", grad_w1)?,
        optional_output("grad_b1", grad_b1)?,
        optional_output("grad_w2", grad_w2)?,
        optional_output("grad_b2", grad_b2)?,
    ];
    let update = |grad: &Option<Tensor>, adds| {
        grad.as_ref().map_or(Ok(Update::Write), |grad| update(grad, sizes.dtype, adds))
    };
    let (up, down) = (update(&grads[2], add_w1)?, update(&grads[4], add_w2)?);
    let Layer { x, weights, w1, w2, .. } = &problem.layer;
    for (w, grad) in [(w1, &grads[2]), (w2, &grads[4])] {
        if let Some(grad) = grad {
            w.expect_numbers(&format!("beside {}: quantized weights have no gradient", grad.name()))?;
        }
    }
    // The elements of w1 and w2 are those of `update`.
    let expected: [(Option<Element>, &[usize], &str); 6] = [
        (Some(x.element()), x.shape(), "T, H"),
        (Some(weights.element()), weights.shape(), "T, K"),
        (None, &w1.shape(), "like w1"),
        (Some(x.element()), &[sizes.experts, sizes.up], "like b1"),
        (None, &w2.shape(), "like w2"),
        (Some(x.element()), &[sizes.experts, sizes.hidden], "E, H"),
    ];
    for (grad, (element, shape, legend)) in grads.iter().zip(expected) {
        if let Some(grad) = grad {
            element.map_or(Ok(()), |element| grad.expect_element(element))?;
            grad.expect_shape(shape, legend)?;
        }
    }
    let inputs = problem.layer.inputs().chain(problem.rows.inputs());
    let inputs = inputs.chain([Some(&grad_out), Some(&hidden)]);
    if let Backend::Cuda(device) = Backend::of(inputs, grads.each_ref().map(Option::as_ref))? {
        let mlp = problem.on_device(py)?;
        let [x, weights, w1, b1, w2, b2] = grads.each_ref().map(buffer);
        let grads = fastmoe_cuda::MlpGrads { x, weights, w1: (w1, up), b1, w2: (w2, down), b2 };
        let (hidden, grad_out) = (hidden.buffer(), grad_out.buffer());
        let scratch = mlp.backward_scratch(&grads);
        return device.run(py, scratch, |queue| {
            problem.check_plan(queue)?;
            // SAFETY: as above.
            unsafe { mlp.backward(queue, hidden, grad_out, &grads) }.map_err(Into::into)
        });
    }
    compute(py, || {
        let mlp = problem.on_cpu(threads)?;
        let [x, weights, w1, b1, w2, b2] = grads.each_ref().map(|grad| grad.as_ref().map(Tensor::ptr_mut));
        let (w1, w2) = (w1.map(|w1| (w1, up)), w2.map(|w2| (w2, down)));
        let grads = MlpGrads { x, weights, w1, b1, w2, b2 };
        // SAFETY: dtypes, shapes, separate memory and the plan were checked.
        Ok(unsafe { fastmoe_cpu::mlp_backward(&mlp, hidden.ptr(), grad_out.ptr(), &grads) }?)
    })
}
