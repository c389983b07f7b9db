//! A weight `[E, N, D]` of the experts: numbers, or quantized ones as codes and scales.

use fastmoe_cpu::{Format, Weight};
use pyo3::prelude::*;
use smallvec::SmallVec;

use crate::call::optional_input;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// A checked weight.
pub struct ExpertWeight {
    /// The numbers, or the codes.
    pub tensor: Tensor,
    pub scales: Option<(Format, Tensor)>,
    shape: [usize; 3],
}

impl ExpertWeight {
    /// Its two tensors; `legend` names the sizes of numbers. Quantized are `uint8` codes that come with scales.
    pub fn new(
        [name, scales_name]: [&'static str; 2],
        codes: &Bound<'_, PyAny>,
        scales: Option<&Bound<'_, PyAny>>,
        element: Element,
        legend: &str,
    ) -> Result<Self> {
        let tensor = Tensor::input(name, codes)?;
        let Some(scales) = optional_input(scales_name, scales)? else {
            tensor.expect_element(element)?;
            let shape = tensor.dims(legend)?;
            return Ok(Self { tensor, scales: None, shape });
        };
        tensor.expect_element(Element::U8)?;
        if tensor.shape().len() == 4 {
            let [e, n, blocks, _] = tensor.dims("E, N, D/32, 16")?;
            tensor.expect_shape(&[e, n, blocks, 16], "E, N, D/32, 16")?;
            scales.expect(Element::U8, &[e, n, blocks], "E, N, D/32")?;
            return Ok(Self { tensor, scales: Some((Format::Mxfp4, scales)), shape: [e, n, 32 * blocks] });
        }
        let shape @ [e, n, d] = tensor.dims("E, N, D")?;
        let squares = [e, n.div_ceil(128), d.div_ceil(128)];
        scales.expect(Element::F32, &squares, "E, ceil(N/128), ceil(D/128)")?;
        Ok(Self { tensor, scales: Some((Format::Fp8, scales)), shape })
    }

    /// Sizes of what it means, which for codes of MXFP4 are not those of the tensor.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Fails unless the numbers have this shape.
    pub fn expect_shape(&self, shape: &[usize; 3], legend: &str) -> Result<()> {
        if self.shape == *shape {
            return Ok(());
        }
        self.tensor.clone().with_shape(SmallVec::from_slice(&self.shape)).expect_shape(shape, legend)
    }

    /// Fails where it is quantized in a call that can have numbers only.
    pub fn expect_numbers(&self, of: &str) -> Result<()> {
        match &self.scales {
            None => Ok(()),
            Some((_, scales)) => Err(Error::wrong_value(scales.name(), "scales", format!("None {of}"))),
        }
    }

    pub fn tensors(&self) -> [Option<&Tensor>; 2] {
        [Some(&self.tensor), self.scales.as_ref().map(|(_, scales)| scales)]
    }

    pub fn on_cpu(&self) -> Weight {
        match &self.scales {
            None => Weight::Plain(self.tensor.ptr()),
            Some((format, scales)) => {
                Weight::Quantized { format: *format, codes: self.tensor.ptr(), scales: scales.ptr() }
            }
        }
    }
}
