//! `mlp_forward` and `mlp_backward`: the expert MLP over a routing plan.

use fastmoe_core::{Update, validate_plan};
use fastmoe_cpu::{Activation, DType, Mlp, MlpGrads, RoutedRows, Threads};
use fastmoe_cuda::Queue;
use pyo3::prelude::*;

use crate::backend::{Backend, buffer, check_indices, math};
use crate::call::{compute, optional_input, optional_output, threads, update};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::tensor::{Tensor, disjoint};

#[pyfunction]
#[pyo3(signature = (
    x, w1, b1, w2, b2, weights, offsets, gather, inverse, out, hidden, *,
    activation, transposed, interleaved, threads
))]
#[expect(clippy::too_many_arguments, reason = "the arguments of the Python function")]
pub fn mlp_forward(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    w1: &Bound<'_, PyAny>,
    b1: Option<&Bound<'_, PyAny>>,
    w2: &Bound<'_, PyAny>,
    b2: Option<&Bound<'_, PyAny>>,
    weights: &Bound<'_, PyAny>,
    offsets: &Bound<'_, PyAny>,
    gather: &Bound<'_, PyAny>,
    inverse: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    hidden: Option<&Bound<'_, PyAny>>,
    activation: &str,
    transposed: bool,
    interleaved: bool,
    threads: i64,
) -> Result<()> {
    let layout = Layout::new(activation, transposed, interleaved)?;
    let threads = self::threads(threads)?;
    let problem = Problem {
        x: Tensor::input("x", x)?,
        w1: Tensor::input("w1", w1)?,
        b1: optional_input("b1", b1)?,
        w2: Tensor::input("w2", w2)?,
        b2: optional_input("b2", b2)?,
        weights: Tensor::input("weights", weights)?,
        offsets: Tensor::input("offsets", offsets)?,
        gather: Tensor::input("gather", gather)?,
        inverse: Tensor::input("inverse", inverse)?,
    };
    let sizes = problem.check(layout)?;
    let out = Tensor::output("out", out)?;
    out.expect(sizes.dtype, &[sizes.tokens, sizes.hidden], "T, H")?;
    let hidden = optional_output("hidden", hidden)?;
    if let Some(hidden) = &hidden {
        hidden.expect(sizes.dtype, &[sizes.rows, sizes.up], layout.hidden_legend())?;
    }
    let outputs = [Some(&out), hidden.as_ref()];
    disjoint(outputs, problem.inputs())?;
    if let Backend::Cuda(device) = Backend::of(problem.inputs().into_iter().chain(outputs))? {
        let mlp = problem.on_device(py, sizes, layout)?;
        let (out, hidden) = (out.buffer(), buffer(&hidden));
        return device.run(py, mlp.forward_scratch(), |queue| {
            problem.check_plan(queue, sizes)?;
            // SAFETY: dtypes, shapes and separate memory were checked; torch keeps the memory for the stream.
            unsafe { mlp.forward(queue, out, hidden) }.map_err(Into::into)
        });
    }
    compute(py, || {
        let mlp = problem.mlp(sizes, layout, threads)?;
        // SAFETY: dtypes, shapes, separate memory and the plan were checked.
        unsafe { fastmoe_cpu::mlp_forward(&mlp, out.ptr_mut(), hidden.as_ref().map(Tensor::ptr_mut)) }
        Ok(())
    })
}

#[pyfunction]
#[pyo3(signature = (
    grad_out, x, w1, b1, w2, b2, weights, hidden, offsets, gather, inverse,
    grad_x, grad_weights, grad_w1, grad_b1, grad_w2, grad_b2, *,
    activation, transposed, interleaved, threads, add_w1=false, add_w2=false
))]
#[expect(clippy::too_many_arguments, reason = "the arguments of the Python function")]
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
    offsets: &Bound<'_, PyAny>,
    gather: &Bound<'_, PyAny>,
    inverse: &Bound<'_, PyAny>,
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
) -> Result<()> {
    let layout = Layout::new(activation, transposed, interleaved)?;
    let threads = self::threads(threads)?;
    let problem = Problem {
        x: Tensor::input("x", x)?,
        w1: Tensor::input("w1", w1)?,
        b1: optional_input("b1", b1)?,
        w2: Tensor::input("w2", w2)?,
        b2: optional_input("b2", b2)?,
        weights: Tensor::input("weights", weights)?,
        offsets: Tensor::input("offsets", offsets)?,
        gather: Tensor::input("gather", gather)?,
        inverse: Tensor::input("inverse", inverse)?,
    };
    let sizes = problem.check(layout)?;
    let grad_out = Tensor::input("grad_out", grad_out)?;
    grad_out.expect(sizes.dtype, &[sizes.tokens, sizes.hidden], "T, H")?;
    let hidden = Tensor::input("hidden", hidden)?;
    hidden.expect(sizes.dtype, &[sizes.rows, sizes.up], layout.hidden_legend())?;
    let grads = [
        optional_output("grad_x", grad_x)?,
        optional_output("grad_weights", grad_weights)?,
        optional_output("grad_w1", grad_w1)?,
        optional_output("grad_b1", grad_b1)?,
        optional_output("grad_w2", grad_w2)?,
        optional_output("grad_b2", grad_b2)?,
    ];
    let up_shape = [sizes.experts, sizes.up];
    let down_shape = [sizes.experts, sizes.hidden];
    let shapes = [
        problem.x.shape(),
        problem.weights.shape(),
        problem.w1.shape(),
        &up_shape,
        problem.w2.shape(),
        &down_shape,
    ];
    let legends = ["T, H", "T, K", "like w1", "like b1", "like w2", "E, H"];
    let update = |grad: &Option<Tensor>, adds| {
        grad.as_ref().map_or(Ok(Update::Write), |grad| update(grad, sizes.dtype, adds))
    };
    let (up, down) = (update(&grads[2], add_w1)?, update(&grads[4], add_w2)?);
    for ((grad, shape), legend) in grads.iter().zip(shapes).zip(legends) {
        if let Some(grad) = grad {
            let element = match legend {
                "T, K" => Element::of_weights(sizes.dtype),
                "like w1" | "like w2" => grad.element(),
                _ => sizes.dtype.into(),
            };
            grad.expect(element, shape, legend)?;
        }
    }
    let inputs = problem.inputs().into_iter().chain([Some(&grad_out), Some(&hidden)]);
    disjoint(grads.iter().map(Option::as_ref), inputs.clone())?;
    if let Backend::Cuda(device) = Backend::of(inputs.chain(grads.iter().map(Option::as_ref)))? {
        let mlp = problem.on_device(py, sizes, layout)?;
        let [x, weights, w1, b1, w2, b2] = grads.each_ref().map(buffer);
        let grads = fastmoe_cuda::MlpGrads { x, weights, w1: (w1, up), b1, w2: (w2, down), b2 };
        let (hidden, grad_out) = (hidden.buffer(), grad_out.buffer());
        let scratch = mlp.backward_scratch(&grads);
        return device.run(py, scratch, |queue| {
            problem.check_plan(queue, sizes)?;
            // SAFETY: as above.
            unsafe { mlp.backward(queue, hidden, grad_out, &grads) }.map_err(Into::into)
        });
    }
    compute(py, || {
        let mlp = problem.mlp(sizes, layout, threads)?;
        let [x, weights, w1, b1, w2, b2] = grads.each_ref().map(|grad| grad.as_ref().map(Tensor::ptr_mut));
        let (w1, w2) = (w1.map(|w1| (w1, up)), w2.map(|w2| (w2, down)));
        let grads = MlpGrads { x, weights, w1, b1, w2, b2 };
        // SAFETY: dtypes, shapes, separate memory and the plan were checked.
        unsafe { fastmoe_cpu::mlp_backward(&mlp, hidden.ptr(), grad_out.ptr(), &grads) }
        Ok(())
    })
}

/// How the expert weights are laid out, and the activation between them.
#[derive(Clone, Copy)]
struct Layout {
    activation: Activation,
    transposed: bool,
    interleaved: bool,
}

/// The sizes that the arguments agree on.
#[derive(Clone, Copy)]
struct Sizes {
    dtype: DType,
    tokens: usize,
    hidden: usize,
    intermediate: usize,
    /// Rows of W1 per expert: 2I where the activation is gated, else I.
    up: usize,
    experts: usize,
    top_k: usize,
    rows: usize,
}

/// The inputs that forward and backward share.
struct Problem {
    x: Tensor,
    w1: Tensor,
    b1: Option<Tensor>,
    w2: Tensor,
    b2: Option<Tensor>,
    weights: Tensor,
    offsets: Tensor,
    gather: Tensor,
    inverse: Tensor,
}

impl Layout {
    fn new(activation: &str, transposed: bool, interleaved: bool) -> Result<Self> {
        let given = activation;
        let activation = Activation::from_name(given).ok_or_else(|| {
            let names: Vec<_> = Activation::ALL.iter().map(|(name, _)| format!("'{name}'")).collect();
            Error::Value(format!("activation: expected one of {}, got '{given}'", names.join(", ")))
        })?;
        if interleaved && !activation.gated() {
            return Err(Error::Value(format!(
                "interleaved: expected False for the ungated activation '{given}', got True"
            )));
        }
        Ok(Self { activation, transposed, interleaved })
    }

    /// Shapes of W1 and W2 with their legends.
    fn weights(self, e: usize, up: usize, h: usize, i: usize) -> [([usize; 3], &'static str); 2] {
        match (self.activation.gated(), self.transposed) {
            (true, false) => [([e, up, h], "E, 2I, H"), ([e, h, i], "E, H, I")],
            (true, true) => [([e, h, up], "E, H, 2I"), ([e, i, h], "E, I, H")],
            (false, false) => [([e, up, h], "E, I, H"), ([e, h, i], "E, H, I")],
            (false, true) => [([e, h, up], "E, H, I"), ([e, i, h], "E, I, H")],
        }
    }

    fn hidden_legend(self) -> &'static str {
        if self.activation.gated() { "rows of gather, 2I" } else { "rows of gather, I" }
    }
}

impl Problem {
    fn inputs(&self) -> [Option<&Tensor>; 9] {
        let Self { x, w1, b1, w2, b2, weights, offsets, gather, inverse } = self;
        let biases = [b1.as_ref(), b2.as_ref()];
        let [b1, b2] = biases;
        [Some(x), Some(w1), b1, Some(w2), b2, Some(weights), Some(offsets), Some(gather), Some(inverse)]
    }

    fn check(&self, layout: Layout) -> Result<Sizes> {
        let dtype = self.x.float()?;
        let [tokens, hidden] = self.x.dims("T, H")?;
        let [_, top_k] = self.weights.dims("T, K")?;
        self.weights.expect(Element::of_weights(dtype), &[tokens, top_k], "T, K")?;
        self.inverse.expect(Element::I32, &[tokens, top_k], "T, K")?;
        let [rows] = self.gather.dims("R")?;
        self.gather.expect_element(Element::I32)?;

        let [w1, w2] = [&self.w1, &self.w2];
        for w in [w1, w2] {
            w.expect_element(dtype.into())?;
        }
        let [experts, ..] = w1.dims::<3>("E, 2I, H")?;
        let [_, a, b] = w2.dims::<3>("E, H, I")?;
        let (h, i) = if layout.transposed { (b, a) } else { (a, b) };
        // Where W2 comes in the other layout its first error is about W1, which tells the remedy.
        let intermediate = if h == hidden { i } else { h };
        let up = if layout.activation.gated() { 2 * intermediate } else { intermediate };
        let shapes = layout.weights(experts, up, hidden, intermediate);
        let swapped = Layout { transposed: !layout.transposed, ..layout };
        let others = swapped.weights(experts, up, hidden, intermediate);
        for ((w, (shape, legend)), (other, other_legend)) in [w1, w2].into_iter().zip(shapes).zip(others) {
            w.expect_shape(&shape, legend).map_err(|error| {
                let flag = if layout.transposed { "drop" } else { "pass" };
                error
                    .hint(w.shape() == other, &format!("{flag} transposed=True for [{other_legend}] weights"))
            })?;
        }
        if let Some(b1) = &self.b1 {
            b1.expect(dtype, &[experts, up], if layout.activation.gated() { "E, 2I" } else { "E, I" })?;
        }
        if let Some(b2) = &self.b2 {
            b2.expect(dtype, &[experts, hidden], "E, H")?;
        }
        self.offsets.expect(Element::I32, &[experts + 1], "E+1")?;
        Ok(Sizes { dtype, tokens, hidden, intermediate, up, experts, top_k, rows })
    }

    /// The problem of the CUDA backend, which trusts the plan that it is given.
    fn on_device(&self, py: Python<'_>, sizes: Sizes, layout: Layout) -> Result<fastmoe_cuda::Mlp> {
        let kinds = Activation::ALL.iter();
        let kind = kinds.take_while(|(_, kind)| *kind != layout.activation).count() as i32;
        for index in [&self.offsets, &self.gather, &self.inverse] {
            index.expect_element(Element::I32)?;
        }
        Ok(fastmoe_cuda::Mlp {
            sizes: fastmoe_cuda::Sizes {
                math: math(py, &self.x)?,
                tokens: sizes.tokens,
                rows: sizes.rows,
                hidden: sizes.hidden,
                intermediate: sizes.intermediate,
                experts: sizes.experts,
                activation: (kind, layout.activation.gated()),
                transposed: layout.transposed,
                interleaved: layout.interleaved,
            },
            top_k: sizes.top_k,
            x: self.x.buffer(),
            w1: self.w1.buffer(),
            b1: buffer(&self.b1),
            w2: self.w2.buffer(),
            b2: buffer(&self.b2),
            weights: self.weights.buffer(),
            offsets: self.offsets.buffer(),
            gather: self.gather.buffer(),
            inverse: self.inverse.buffer(),
        })
    }

    fn check_plan(&self, queue: &Queue<'_>, sizes: Sizes) -> Result<()> {
        let Sizes { tokens, top_k, experts, .. } = sizes;
        check_indices(queue, [&self.offsets, &self.gather, &self.inverse], |[offsets, gather, inverse]| {
            validate_plan(tokens, top_k, experts, offsets, gather, inverse)
        })
    }

    /// The backend's problem, its plan validated.
    fn mlp(&self, sizes: Sizes, layout: Layout, threads: Threads) -> Result<Mlp<'_>> {
        let Sizes { dtype, tokens, hidden, intermediate, experts, top_k, .. } = sizes;
        let (offsets, gather, inverse) = (self.offsets.slice()?, self.gather.slice()?, self.inverse.slice()?);
        validate_plan(tokens, top_k, experts, offsets, gather, inverse)?;
        Ok(Mlp {
            dtype,
            tokens,
            hidden,
            intermediate,
            experts,
            top_k,
            activation: layout.activation,
            transposed: layout.transposed,
            interleaved: layout.interleaved,
            x: self.x.ptr(),
            w1: self.w1.ptr(),
            b1: self.b1.as_ref().map(Tensor::ptr),
            w2: self.w2.ptr(),
            b2: self.b2.as_ref().map(Tensor::ptr),
            weights: self.weights.ptr(),
            rows: RoutedRows { offsets, gather, inverse },
            threads: threads.0,
        })
    }
}
