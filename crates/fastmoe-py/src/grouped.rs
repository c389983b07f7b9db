//! `grouped_mm` and its weight gradient: one matrix product per expert over consecutive rows.

use fastmoe_core::validate_offsets;
use fastmoe_cpu::GroupedMm;
use fastmoe_cuda::{Buffer, Factor, GradBias, GradWeight, Product};
use pyo3::prelude::*;

use crate::backend::{Backend, buffer, check_indices, math};
use crate::call::{checked, compute, optional_input, optional_output, threads, update};
use crate::element::Element;
use crate::error::Result;
use crate::tensor::Tensor;

#[pyfunction]
#[pyo3(signature = (x, w, offsets, bias, out, *, transposed, threads))]
pub fn grouped_mm(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    w: &Bound<'_, PyAny>,
    offsets: &Bound<'_, PyAny>,
    bias: Option<&Bound<'_, PyAny>>,
    out: &Bound<'_, PyAny>,
    transposed: bool,
    threads: i64,
) -> Result<()> {
    let threads = self::threads(threads)?;
    let x = Tensor::input("x", x)?;
    let [rows, inner] = x.dims("R, K")?;
    let dtype = x.float()?;
    let w = Tensor::input("w", w)?;
    let [experts, a, b] = w.dims(if transposed { "E, K, N" } else { "E, N, K" })?;
    let (given, outer) = if transposed { (a, b) } else { (b, a) };
    w.expect_element(dtype.into())?;
    expect_weights(&w, [experts, outer, inner], transposed).map_err(|error| {
        let other = outer == inner && given != inner;
        error.hint(
            other,
            if transposed {
                "drop transposed=True for [E, N, K] weights"
            } else {
                "pass transposed=True for [E, K, N] weights"
            },
        )
    })?;
    let offsets = Tensor::input("offsets", offsets)?;
    offsets.expect_shape(&[experts + 1], "E+1")?;
    let bias = checked(optional_input("bias", bias)?, dtype, &[experts, outer], "E, N")?;
    let out = Tensor::output("out", out)?;
    out.expect(dtype, &[rows, outer], "R, N")?;
    let inputs = [Some(&x), Some(&w), Some(&offsets), bias.as_ref()];
    if let Backend::Cuda(device) = Backend::of(inputs, [Some(&out)])? {
        offsets.expect_element(Element::I32)?;
        let problem = Product {
            math: math(py, &x)?,
            rows,
            inner,
            columns: outer,
            experts,
            transposed,
            a: x.buffer(),
            offsets: offsets.buffer(),
            w: w.buffer(),
            bias: buffer(&bias),
            y: out.buffer(),
        };
        return device.run(py, 0, |queue| {
            check_indices(queue, [&offsets], |[offsets]| validate_offsets(offsets, rows))?;
            // SAFETY: dtypes, shapes and separate memory were checked; torch keeps the memory for the stream.
            unsafe { problem.launch(queue) }.map_err(Into::into)
        });
    }
    compute(py, || {
        let offsets = offsets.slice()?;
        validate_offsets(offsets, rows)?;
        let problem = GroupedMm { dtype, inner, outer, rows, offsets, transposed, threads };
        let bias = bias.as_ref().map(Tensor::ptr);
        // SAFETY: dtypes, shapes, separate memory and the offsets were checked.
        Ok(unsafe { fastmoe_cpu::grouped_mm(&problem, x.ptr(), w.ptr(), bias, out.ptr_mut()) }?)
    })
}

#[pyfunction]
#[pyo3(signature = (grad_out, x, offsets, grad_w, grad_bias, *, transposed, threads, add_w=false))]
pub fn grouped_mm_grad_weight(
    py: Python<'_>,
    grad_out: &Bound<'_, PyAny>,
    x: &Bound<'_, PyAny>,
    offsets: &Bound<'_, PyAny>,
    grad_w: &Bound<'_, PyAny>,
    grad_bias: Option<&Bound<'_, PyAny>>,
    transposed: bool,
    threads: i64,
    add_w: bool,
) -> Result<()> {
    let threads = self::threads(threads)?;
    let x = Tensor::input("x", x)?;
    let [rows, inner] = x.dims("R, K")?;
    let dtype = x.float()?;
    let grad_out = Tensor::input("grad_out", grad_out)?;
    let [_, outer] = grad_out.dims("R, N")?;
    grad_out.expect(dtype, &[rows, outer], "R, N")?;
    let grad_w = Tensor::output("grad_w", grad_w)?;
    let [experts, ..] = grad_w.dims::<3>(if transposed { "E, K, N" } else { "E, N, K" })?;
    let update = update(&grad_w, dtype, add_w)?;
    expect_weights(&grad_w, [experts, outer, inner], transposed)?;
    let offsets = Tensor::input("offsets", offsets)?;
    offsets.expect_shape(&[experts + 1], "E+1")?;
    let grad_bias = checked(optional_output("grad_bias", grad_bias)?, dtype, &[experts, outer], "E, N")?;
    let (inputs, outputs) = ([&grad_out, &x, &offsets].map(Some), [Some(&grad_w), grad_bias.as_ref()]);
    if let Backend::Cuda(device) = Backend::of(inputs, outputs)? {
        offsets.expect_element(Element::I32)?;
        let math = math(py, &x)?;
        let factor =
            |rows: &Tensor, columns| Factor { rows: rows.buffer(), gather: Buffer::default(), columns };
        let weight = GradWeight {
            math,
            tokens: rows,
            rows,
            experts,
            offsets: offsets.buffer(),
            a: factor(&grad_out, outer),
            b: factor(&x, inner),
            out: (grad_w.buffer(), update),
        }
        .transposed(transposed);
        let bias = grad_bias.as_ref().map(|grad_bias| GradBias {
            dtype: math.dtype,
            experts,
            columns: outer,
            sorted: rows,
            sources: rows,
            rows: grad_out.buffer(),
            gather: Buffer::default(),
            scale: Buffer::default(),
            offsets: offsets.buffer(),
            out: grad_bias.buffer(),
        });
        let scratch = if bias.is_some() { GradBias::scratch(rows, experts, outer) } else { 0 };
        return device.run(py, scratch, |queue| {
            check_indices(queue, [&offsets], |[offsets]| validate_offsets(offsets, rows))?;
            // SAFETY: dtypes, shapes and separate memory were checked; torch keeps the memory for the stream.
            unsafe {
                weight.launch(queue)?;
                bias.map_or(Ok(()), |bias| bias.launch(queue)).map_err(Into::into)
            }
        });
    }
    compute(py, || {
        let offsets = offsets.slice()?;
        validate_offsets(offsets, rows)?;
        let problem = GroupedMm { dtype, inner, outer, rows, offsets, transposed, threads };
        let (grad_out, grad_bias) = (grad_out.ptr(), grad_bias.as_ref().map(Tensor::ptr_mut));
        let grad_w = (grad_w.ptr_mut(), update);
        // SAFETY: dtypes, shapes, separate memory and the offsets were checked.
        Ok(unsafe { fastmoe_cpu::grouped_mm_grad_weight(&problem, grad_out, x.ptr(), grad_w, grad_bias) }?)
    })
}

fn expect_weights(w: &Tensor, [e, n, k]: [usize; 3], transposed: bool) -> Result<()> {
    if transposed { w.expect_shape(&[e, k, n], "E, K, N") } else { w.expect_shape(&[e, n, k], "E, N, K") }
}
