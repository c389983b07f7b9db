//! `permute` and `unpermute`: token rows to expert order and back.

use fastmoe_core::{validate_gather, validate_inverse, validate_plan};
use fastmoe_cpu::Unpermute;
use fastmoe_cuda::{Combine, Permute, UnpermuteGrad};
use pyo3::prelude::*;

use crate::backend::{Backend, buffer, check_indices};
use crate::call::{checked, compute, optional_input, optional_output, threads};
use crate::element::Element;
use crate::error::Result;
use crate::tensor::Tensor;

#[pyfunction]
#[pyo3(signature = (x, gather, out, *, threads))]
pub fn permute(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    gather: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    threads: i64,
) -> Result<()> {
    let threads = self::threads(threads)?;
    let x = Tensor::input("x", x)?;
    let [tokens, cols] = x.dims("T, H")?;
    let dtype = x.float()?;
    let gather = Tensor::input("gather", gather)?;
    let [rows] = gather.dims("R")?;
    let out = Tensor::output("out", out)?;
    out.expect(dtype, &[rows, cols], "R, H")?;
    if let Backend::Cuda(device) = Backend::of([&x, &gather].map(Some), [Some(&out)])? {
        gather.expect_element(Element::I32)?;
        let dtype = x.cuda_float()?;
        let (columns, x, out) = (cols, x.buffer(), out.buffer());
        let problem = Permute { dtype, tokens, rows, columns, x, gather: gather.buffer(), out };
        return device.run(py, 0, |queue| {
            check_indices(queue, [&gather], |[gather]| validate_gather(gather, tokens))?;
            // SAFETY: dtypes, shapes and separate memory were checked; torch keeps the memory for the stream.
            unsafe { problem.launch(queue) }.map_err(Into::into)
        });
    }
    compute(py, || {
        let (size, gather) = (x.element().bytes(), gather.slice()?);
        validate_gather(gather, tokens)?;
        // SAFETY: dtypes, shapes, separate memory and every index were checked.
        unsafe { fastmoe_cpu::permute(size, cols, x.ptr(), gather, out.ptr_mut(), threads) }
        Ok(())
    })
}

#[pyfunction]
#[pyo3(signature = (y, inverse, weights, out, *, threads))]
pub fn unpermute(
    py: Python<'_>,
    y: &Bound<'_, PyAny>,
    inverse: &Bound<'_, PyAny>,
    weights: Option<&Bound<'_, PyAny>>,
    out: &Bound<'_, PyAny>,
    threads: i64,
) -> Result<()> {
    let threads = self::threads(threads)?;
    let y = Tensor::input("y", y)?;
    let [rows, cols] = y.dims("R, H")?;
    let dtype = y.float()?;
    let inverse = Tensor::input("inverse", inverse)?;
    let [tokens, top_k] = inverse.dims("T, K")?;
    let weights =
        checked(optional_input("weights", weights)?, Element::of_weights(dtype), &[tokens, top_k], "T, K")?;
    let out = Tensor::output("out", out)?;
    out.expect(dtype, &[tokens, cols], "T, H")?;
    let inputs = [Some(&y), Some(&inverse), weights.as_ref()];
    if let Backend::Cuda(device) = Backend::of(inputs, [Some(&out)])? {
        inverse.expect_element(Element::I32)?;
        let problem = Combine {
            dtype: y.cuda_float()?,
            tokens,
            top_k,
            rows,
            columns: cols,
            y: y.buffer(),
            inverse: inverse.buffer(),
            weights: buffer(&weights),
            out: out.buffer(),
        };
        return device.run(py, 0, |queue| {
            check_indices(queue, [&inverse], |[inverse]| validate_inverse(inverse, top_k, rows))?;
            // SAFETY: dtypes, shapes and separate memory were checked; torch keeps the memory for the stream.
            unsafe { problem.launch(queue) }.map_err(Into::into)
        });
    }
    compute(py, || {
        let inverse = inverse.slice()?;
        validate_inverse(inverse, top_k, rows)?;
        let weights = weights.as_ref().map(Tensor::ptr);
        let problem = Unpermute { cols, top_k, y: y.ptr(), inverse, weights, threads };
        // SAFETY: dtypes, shapes, separate memory and every index were checked.
        Ok(unsafe { fastmoe_cpu::unpermute(dtype, &problem, out.ptr_mut()) }?)
    })
}

#[pyfunction]
#[pyo3(signature = (grad_out, y, weights, gather, inverse, grad_y, grad_weights, *, threads))]
pub fn unpermute_backward(
    py: Python<'_>,
    grad_out: &Bound<'_, PyAny>,
    y: &Bound<'_, PyAny>,
    weights: Option<&Bound<'_, PyAny>>,
    gather: &Bound<'_, PyAny>,
    inverse: &Bound<'_, PyAny>,
    grad_y: Option<&Bound<'_, PyAny>>,
    grad_weights: Option<&Bound<'_, PyAny>>,
    threads: i64,
) -> Result<()> {
    let threads = self::threads(threads)?;
    let y = Tensor::input("y", y)?;
    let [rows, cols] = y.dims("R, H")?;
    let dtype = y.float()?;
    let wide = Element::of_weights(dtype);
    let inverse = Tensor::input("inverse", inverse)?;
    let [tokens, top_k] = inverse.dims("T, K")?;
    let gather = Tensor::input("gather", gather)?;
    gather.expect_shape(&[rows], "R")?;
    let grad_out = Tensor::input("grad_out", grad_out)?;
    grad_out.expect(dtype, &[tokens, cols], "T, H")?;
    let weights = checked(optional_input("weights", weights)?, wide, &[tokens, top_k], "T, K")?;
    let grad_y = checked(optional_output("grad_y", grad_y)?, dtype, &[rows, cols], "R, H")?;
    let grad_weights =
        checked(optional_output("grad_weights", grad_weights)?, wide, &[tokens, top_k], "T, K")?;
    let inputs = [Some(&grad_out), Some(&y), weights.as_ref(), Some(&gather), Some(&inverse)];
    let outputs = [grad_y.as_ref(), grad_weights.as_ref()];
    if let Backend::Cuda(device) = Backend::of(inputs, outputs)? {
        for index in [&gather, &inverse] {
            index.expect_element(Element::I32)?;
        }
        let problem = UnpermuteGrad {
            dtype: y.cuda_float()?,
            tokens,
            top_k,
            rows,
            columns: cols,
            grad_out: grad_out.buffer(),
            y: y.buffer(),
            gather: gather.buffer(),
            inverse: inverse.buffer(),
            weights: buffer(&weights),
            grad_y: buffer(&grad_y),
            grad_weights: buffer(&grad_weights),
        };
        return device.run(py, 0, |queue| {
            check_indices(queue, [&gather, &inverse], |[gather, inverse]| {
                validate_plan(tokens, top_k, 1, &[0, rows as i32], gather, inverse)
            })?;
            // SAFETY: dtypes, shapes and separate memory were checked; torch keeps the memory for the stream.
            unsafe { problem.launch(queue) }.map_err(Into::into)
        });
    }
    compute(py, || {
        let (gather, inverse) = (gather.slice()?, inverse.slice()?);
        validate_plan(tokens, top_k, 1, &[0, rows as i32], gather, inverse)?;
        let weights = weights.as_ref().map(Tensor::ptr);
        let problem = Unpermute { cols, top_k, y: y.ptr(), inverse, weights, threads };
        let [grad_y, grad_weights] = [&grad_y, &grad_weights].map(|grad| grad.as_ref().map(Tensor::ptr_mut));
        // SAFETY: dtypes, shapes, separate memory and every index were checked.
        Ok(unsafe {
            fastmoe_cpu::unpermute_backward(dtype, &problem, grad_out.ptr(), gather, grad_y, grad_weights)
        }?)
    })
}
