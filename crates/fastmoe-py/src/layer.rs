//! The arguments that `mlp_forward` and `mlp_backward` share, checked.

use fastmoe_core::{OutOfRange, PlanSpec, validate_plan};
use fastmoe_cpu::{Activation, DType, Mlp, RoutedRows, Threads};
use fastmoe_cuda::Queue;
use pyo3::prelude::*;

use crate::backend::{buffer, check_indices, math};
use crate::call::{optional_input, required_input};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::plan::NewPlan;
use crate::tensor::Tensor;
use crate::weight::ExpertWeight;

/// How the expert weights are laid out, and the activation between them.
#[derive(Clone, Copy)]
pub struct Layout {
    activation: Activation,
    transposed: bool,
    interleaved: bool,
}

/// The sizes that the arguments agree on.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub dtype: DType,
    pub tokens: usize,
    pub hidden: usize,
    pub intermediate: usize,
    /// Rows of W1 per expert: 2I where the activation is gated, else I.
    pub up: usize,
    pub experts: usize,
    pub top_k: usize,
}

/// The inputs that forward and backward share, but for the plan.
pub struct Layer {
    pub layout: Layout,
    pub sizes: Sizes,
    pub x: Tensor,
    pub w1: ExpertWeight,
    pub b1: Option<Tensor>,
    pub w2: ExpertWeight,
    pub b2: Option<Tensor>,
    pub weights: Tensor,
}

/// The plan of a call.
pub struct Rows {
    offsets: Tensor,
    gather: Tensor,
    inverse: Tensor,
}

pub struct Problem {
    pub layer: Layer,
    pub rows: Rows,
}

impl Layout {
    pub fn new(activation: &str, transposed: bool, interleaved: bool) -> Result<Self> {
        let given = activation;
        let activation = Activation::from_name(given).ok_or_else(|| {
            let names: Vec<_> = Activation::ALL.iter().map(|(name, _)| format!("'{name}'")).collect();
            Error::wrong_value("activation", format!("'{given}'"), format!("one of {}", names.join(", ")))
        })?;
        if interleaved && !activation.gated() {
            let wanted = format!("False, because '{given}' has no gate to interleave");
            return Err(Error::wrong_value("interleaved", "True", wanted));
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

    pub fn hidden_legend(self) -> &'static str {
        if self.activation.gated() { "rows of gather, 2I" } else { "rows of gather, I" }
    }
}

impl Layer {
    pub fn new(
        layout: Layout,
        x: &Bound<'_, PyAny>,
        w1: &Bound<'_, PyAny>,
        b1: Option<&Bound<'_, PyAny>>,
        w2: &Bound<'_, PyAny>,
        b2: Option<&Bound<'_, PyAny>>,
        weights: &Bound<'_, PyAny>,
        [w1_scales, w2_scales]: [Option<&Bound<'_, PyAny>>; 2],
    ) -> Result<Self> {
        let x = Tensor::input("x", x)?;
        let b1 = optional_input("b1", b1)?;
        let b2 = optional_input("b2", b2)?;
        let weights = Tensor::input("weights", weights)?;

        let dtype = x.float()?;
        let [tokens, hidden] = x.dims("T, H")?;
        let [_, top_k] = weights.dims("T, K")?;
        weights.expect(Element::of_weights(dtype), &[tokens, top_k], "T, K")?;
        let w1 = ExpertWeight::new(["w1", "w1_scales"], w1, w1_scales, dtype.into(), "E, 2I, H")?;
        let w2 = ExpertWeight::new(["w2", "w2_scales"], w2, w2_scales, dtype.into(), "E, H, I")?;
        if layout.transposed {
            w1.expect_numbers("beside transposed=True")?;
            w2.expect_numbers("beside transposed=True")?;
        }
        let [experts, ..] = w1.shape();
        let [_, a, b] = w2.shape();
        let (h, i) = if layout.transposed { (b, a) } else { (a, b) };
        // Where W2 comes in the other layout its first error is about W1, which tells the remedy.
        let intermediate = if h == hidden { i } else { h };
        let up = if layout.activation.gated() { 2 * intermediate } else { intermediate };
        let shapes = layout.weights(experts, up, hidden, intermediate);
        let swapped = Layout { transposed: !layout.transposed, ..layout };
        let others = swapped.weights(experts, up, hidden, intermediate);
        for ((w, (shape, legend)), (other, other_legend)) in [&w1, &w2].into_iter().zip(shapes).zip(others) {
            w.expect_shape(&shape, legend).map_err(|error| {
                let flag = if layout.transposed { "drop" } else { "pass" };
                error
                    .hint(w.shape() == other, &format!("{flag} transposed=True for [{other_legend}] weights"))
            })?;
        }
        if let Some(b1) = &b1 {
            b1.expect(dtype, &[experts, up], if layout.activation.gated() { "E, 2I" } else { "E, I" })?;
        }
        if let Some(b2) = &b2 {
            b2.expect(dtype, &[experts, hidden], "E, H")?;
        }
        let sizes = Sizes { dtype, tokens, hidden, intermediate, up, experts, top_k };
        Ok(Self { layout, sizes, x, w1, b1, w2, b2, weights })
    }

    pub fn inputs(&self) -> impl Iterator<Item = Option<&Tensor>> {
        let Self { x, w1, b1, w2, b2, weights, .. } = self;
        let others = [Some(x), b1.as_ref(), b2.as_ref(), Some(weights)];
        others.into_iter().chain(w1.tensors()).chain(w2.tensors())
    }

    /// The pre-activation of a call that makes its plan, and that plan, of the one tensor that keeps both.
    pub fn hidden_and_plan(&self, both: &Tensor) -> Result<[Tensor; 2]> {
        let Sizes { dtype, tokens, up, top_k, .. } = self.sizes;
        both.expect_element(dtype.into())?;
        let legend = "pre-activation + room for the plan";
        both.with_numbers(&[tokens * top_k, up], self.packed_length(), legend)
    }

    /// Elements of a plan that lies whole in one tensor.
    pub fn packed_length(&self) -> usize {
        let Sizes { tokens, experts, top_k, .. } = self.sizes;
        2 * experts + 1 + 2 * tokens * top_k
    }

    /// Its counts, offsets, gather and inverse.
    fn unpack(&self, plan: &Tensor) -> Result<[Tensor; 4]> {
        let Sizes { tokens, experts, top_k, .. } = self.sizes;
        plan.expect_element(Element::I32)?;
        plan.split([
            ("counts", &[experts]),
            ("offsets", &[experts + 1]),
            ("gather", &[tokens * top_k]),
            ("inverse", &[tokens, top_k]),
        ])
    }

    /// The plan of `ids`, to be made into one tensor.
    pub fn plan(&self, ids: Tensor, plan: &Tensor) -> Result<NewPlan> {
        let Sizes { tokens, experts, top_k, .. } = self.sizes;
        ids.expect_shape(&[tokens, top_k], "T, K")?;
        let [counts, offsets, gather, inverse] = self.unpack(plan)?;
        let spec = PlanSpec { tokens, top_k, experts, capacity: None, out_of_range: OutOfRange::Error };
        Ok(NewPlan { spec, ids, weights: None, counts, offsets, gather, inverse, sorted_weights: None })
    }
}

impl Rows {
    pub fn inputs(&self) -> [Option<&Tensor>; 3] {
        [&self.offsets, &self.gather, &self.inverse].map(Some)
    }

    pub fn given(
        layer: &Layer,
        offsets: Option<&Bound<'_, PyAny>>,
        gather: Option<&Bound<'_, PyAny>>,
        inverse: Option<&Bound<'_, PyAny>>,
    ) -> Result<Self> {
        let Sizes { tokens, experts, top_k, .. } = layer.sizes;
        let rows = Self {
            offsets: required_input("offsets", offsets)?,
            gather: required_input("gather", gather)?,
            inverse: required_input("inverse", inverse)?,
        };
        rows.inverse.expect(Element::I32, &[tokens, top_k], "T, K")?;
        rows.gather.dims::<1>("R")?;
        rows.gather.expect_element(Element::I32)?;
        rows.offsets.expect(Element::I32, &[experts + 1], "E+1")?;
        Ok(rows)
    }

    /// The rows of a plan that lies whole in one tensor.
    pub fn packed(layer: &Layer, plan: &Tensor) -> Result<Self> {
        let [_, offsets, gather, inverse] = layer.unpack(plan)?;
        Ok(Self { offsets, gather, inverse })
    }

    /// Those of a plan that the call makes.
    pub fn of(plan: &NewPlan) -> Self {
        let NewPlan { offsets, gather, inverse, .. } = plan;
        Self { offsets: offsets.clone(), gather: gather.clone(), inverse: inverse.clone() }
    }
}

impl Problem {
    pub fn hidden_shape(&self) -> [usize; 2] {
        [self.rows.gather.shape()[0], self.layer.sizes.up]
    }

    /// The problem of the CUDA backend, which trusts the plan that it is given.
    pub fn on_device(&self, py: Python<'_>) -> Result<fastmoe_cuda::Mlp> {
        let Layer { layout, sizes, .. } = self.layer;
        for w in [&self.layer.w1, &self.layer.w2] {
            w.expect_numbers("on a GPU, where weights are dequantized before the call")?;
        }
        let kinds = Activation::ALL.iter();
        let kind = kinds.take_while(|(_, kind)| *kind != layout.activation).count() as i32;
        Ok(fastmoe_cuda::Mlp {
            sizes: fastmoe_cuda::Sizes {
                math: math(py, &self.layer.x)?,
                tokens: sizes.tokens,
                rows: self.hidden_shape()[0],
                hidden: sizes.hidden,
                intermediate: sizes.intermediate,
                experts: sizes.experts,
                activation: (kind, layout.activation.gated()),
                transposed: layout.transposed,
                interleaved: layout.interleaved,
            },
            top_k: sizes.top_k,
            x: self.layer.x.buffer(),
            w1: self.layer.w1.tensor.buffer(),
            b1: buffer(&self.layer.b1),
            w2: self.layer.w2.tensor.buffer(),
            b2: buffer(&self.layer.b2),
            weights: self.layer.weights.buffer(),
            offsets: self.rows.offsets.buffer(),
            gather: self.rows.gather.buffer(),
            inverse: self.rows.inverse.buffer(),
        })
    }

    pub fn check_plan(&self, queue: &Queue<'_>) -> Result<()> {
        let Sizes { tokens, top_k, experts, .. } = self.layer.sizes;
        let Rows { offsets, gather, inverse } = &self.rows;
        check_indices(queue, [offsets, gather, inverse], |[offsets, gather, inverse]| {
            validate_plan(tokens, top_k, experts, offsets, gather, inverse)
        })
    }

    /// The problem of the CPU backend, its plan validated.
    pub fn on_cpu(&self, threads: Threads) -> Result<Mlp<'_>> {
        let Layer { layout, sizes, .. } = self.layer;
        let Sizes { dtype, tokens, hidden, intermediate, experts, top_k, .. } = sizes;
        let Rows { offsets, gather, inverse } = &self.rows;
        let (offsets, gather, inverse) = (offsets.slice()?, gather.slice()?, inverse.slice()?);
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
            x: self.layer.x.ptr(),
            w1: self.layer.w1.on_cpu(),
            b1: self.layer.b1.as_ref().map(Tensor::ptr),
            w2: self.layer.w2.on_cpu(),
            b2: self.layer.b2.as_ref().map(Tensor::ptr),
            weights: self.layer.weights.ptr(),
            rows: RoutedRows { offsets, gather, inverse },
            threads,
        })
    }
}
