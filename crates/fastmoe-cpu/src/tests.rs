//! Every machine of this computer against a naive f64 layer, forward and backward.

use crate::backward::backward;
use crate::dtype::Element;
use crate::forward::forward;
use crate::grouped::{grouped, grouped_grad_weight};
#[cfg(target_arch = "x86_64")]
use crate::isa::Isa;
use crate::machine::*;
use crate::problem::{GroupedMm, Mlp, MlpGrads, PtrMut, RoutedRows, Weight};
use crate::simd::Array;
use crate::{Activation, DType, Threads};
use fastmoe_core::Update;
use half::{bf16, f16};

/// Numbers in [-1, 1) from a small generator.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
    fn numbers(&mut self, n: usize, scale: f64) -> Vec<f64> {
        (0..n).map(|_| self.next() * scale).collect()
    }
}

fn store<E: Element>(x: &[f64]) -> Vec<E> {
    let wide: Vec<E::Acc> = x.iter().map(|&x| fastmoe_core::Float::from_f64(x)).collect();
    let mut out = vec![E::default(); x.len()];
    // SAFETY: the portable register is of any machine.
    unsafe { E::narrow::<Array<f32, 4>>(&wide, &mut out) };
    out
}

/// What is stored, seen as f64.
trait Seen {
    fn seen(self) -> f64;
}
impl Seen for f32 {
    fn seen(self) -> f64 {
        self.into()
    }
}
impl Seen for f64 {
    fn seen(self) -> f64 {
        self
    }
}
impl Seen for bf16 {
    fn seen(self) -> f64 {
        self.into()
    }
}
impl Seen for f16 {
    fn seen(self) -> f64 {
        self.into()
    }
}

fn seen<E: Seen + Copy>(x: &[E]) -> Vec<f64> {
    x.iter().map(|x| x.seen()).collect()
}

#[derive(Clone, Copy, Debug)]
struct Case {
    tokens: usize,
    hidden: usize,
    intermediate: usize,
    experts: usize,
    top_k: usize,
    activation: Activation,
    transposed: bool,
    interleaved: bool,
    bias: bool,
    threads: usize,
}

/// Activation and its derivatives by gate and up, in f64 by central differences.
fn act(a: Activation, g: f64, u: f64) -> f64 {
    let mut out = [0.0];
    a.forward(&[g], &[u], &mut out);
    out[0]
}

struct Problem {
    case: Case,
    x: Vec<f64>,
    w1: Vec<f64>,
    b1: Vec<f64>,
    w2: Vec<f64>,
    b2: Vec<f64>,
    weights: Vec<f64>,
    grad: Vec<f64>,
    offsets: Vec<i32>,
    gather: Vec<i32>,
    inverse: Vec<i32>,
}

/// The output, and the gradients of the others.
#[derive(PartialEq)]
struct Answer {
    out: Vec<f64>,
    x: Vec<f64>,
    w1: Vec<f64>,
    b1: Vec<f64>,
    w2: Vec<f64>,
    b2: Vec<f64>,
    weights: Vec<f64>,
}

impl Problem {
    fn new<E: Element + Seen>(case: Case, seed: u64) -> Self {
        let Case { tokens: t, hidden: h, intermediate: i, experts: e, top_k: k, .. } = case;
        let n = if case.activation.gated() { 2 * i } else { i };
        let mut r = Random(seed);
        let mut round = |n, scale| seen(&store::<E>(&r.numbers(n, scale)));
        let (x, w1, b1) = (round(t * h, 1.0), round(e * n * h, 1.5 / (h as f64).sqrt()), round(e * n, 0.5));
        let (w2, b2, grad) =
            (round(e * h * i, 1.5 / (i as f64).sqrt()), round(e * h, 0.5), round(t * h, 1.0));
        let weights: Vec<f64> = r.numbers(t * k, 1.0).iter().map(|&w| f64::from(w as f32)).collect();
        // Every fifth route is dropped, expert 1 gets no token where there are others, the rest are skewed.
        let ids: Vec<i32> = (0..t * k)
            .map(|j| {
                let e_of = ((r.next().abs() * r.next().abs()) * e as f64) as i32;
                if j % 5 == 4 {
                    -1
                } else if e_of == 1 && e > 2 {
                    0
                } else {
                    e_of.min(e as i32 - 1)
                }
            })
            .collect();
        let (mut offsets, mut gather, mut inverse) = (vec![0], vec![], vec![-1; t * k]);
        for expert in 0..e as i32 {
            for j in (0..t * k).filter(|&j| ids[j] == expert) {
                inverse[j] = gather.len() as i32;
                gather.push((j / k) as i32);
            }
            offsets.push(gather.len() as i32);
        }
        gather.resize(t * k, -1);
        Self { case, x, w1, b1, w2, b2, weights, grad, offsets, gather, inverse }
    }

    fn naive(&self) -> Answer {
        let Case { tokens: t, hidden: h, intermediate: i, experts: e, top_k: k, activation, .. } = self.case;
        let n = if activation.gated() { 2 * i } else { i };
        let at1 = |x: usize, r: usize, c: usize| {
            if self.case.transposed { (x * h + c) * n + r } else { (x * n + r) * h + c }
        };
        let at2 = |x: usize, r: usize, c: usize| {
            if self.case.transposed { (x * i + c) * h + r } else { (x * h + r) * i + c }
        };
        let gate_row = |j: usize| if activation.gated() && self.case.interleaved { 2 * j } else { j };
        let up_row = |j: usize| if self.case.interleaved { 2 * j + 1 } else { i + j };
        let mut a = Answer {
            out: vec![0.0; t * h],
            x: vec![0.0; t * h],
            w1: vec![0.0; e * n * h],
            b1: vec![0.0; e * n],
            w2: vec![0.0; e * h * i],
            b2: vec![0.0; e * h],
            weights: vec![0.0; t * k],
        };
        for flat in 0..t * k {
            let Ok(row) = usize::try_from(self.inverse[flat]) else { continue };
            let x = (0..e).find(|&x| row < self.offsets[x + 1] as usize).unwrap();
            let (token, scale) = (flat / k, self.weights[flat]);
            let hid: Vec<f64> = (0..n)
                .map(|r| {
                    let b = if self.case.bias { self.b1[x * n + r] } else { 0.0 };
                    b + (0..h).map(|c| self.x[token * h + c] * self.w1[at1(x, r, c)]).sum::<f64>()
                })
                .collect();
            let up_of = |j: usize| if activation.gated() { hid[up_row(j)] } else { 0.0 };
            let acts: Vec<f64> = (0..i).map(|j| act(activation, hid[gate_row(j)], up_of(j))).collect();
            let mut grad_act = vec![0.0; i];
            for r in 0..h {
                let b = if self.case.bias { self.b2[x * h + r] } else { 0.0 };
                let y = b + (0..i).map(|j| acts[j] * self.w2[at2(x, r, j)]).sum::<f64>();
                let g = self.grad[token * h + r];
                a.out[token * h + r] += scale * y;
                a.weights[flat] += g * y;
                a.b2[x * h + r] += scale * g;
                for j in 0..i {
                    a.w2[at2(x, r, j)] += scale * g * acts[j];
                    grad_act[j] += scale * g * self.w2[at2(x, r, j)];
                }
            }
            let mut grad_h = vec![0.0; n];
            for j in 0..i {
                let (g, u, d) = (hid[gate_row(j)], up_of(j), 1e-6);
                let slope = |f: &dyn Fn(f64) -> f64| (f(d) - f(-d)) / (2.0 * d);
                grad_h[gate_row(j)] = grad_act[j] * slope(&|s| act(activation, g + s, u));
                if activation.gated() {
                    grad_h[up_row(j)] = grad_act[j] * slope(&|s| act(activation, g, u + s));
                }
            }
            for r in 0..n {
                a.b1[x * n + r] += grad_h[r];
                for c in 0..h {
                    a.w1[at1(x, r, c)] += grad_h[r] * self.x[token * h + c];
                    a.x[token * h + c] += grad_h[r] * self.w1[at1(x, r, c)];
                }
            }
        }
        a
    }

    fn computed<M: Machine, E: Element<Acc = M::Acc> + Seen>(&self, dtype: DType, threads: usize) -> Answer
    where
        M::Acc: Seen,
    {
        let c = self.case;
        let (x, w1, w2) = (store::<E>(&self.x), store::<E>(&self.w1), store::<E>(&self.w2));
        let (b1, b2, grad) = (store::<E>(&self.b1), store::<E>(&self.b2), store::<E>(&self.grad));
        let weights: Vec<M::Acc> = self.weights.iter().map(|&w| fastmoe_core::Float::from_f64(w)).collect();
        let p = Mlp {
            dtype,
            tokens: c.tokens,
            hidden: c.hidden,
            intermediate: c.intermediate,
            experts: c.experts,
            top_k: c.top_k,
            activation: c.activation,
            transposed: c.transposed,
            interleaved: c.interleaved,
            x: x.as_ptr().cast(),
            w1: Weight::Plain(w1.as_ptr().cast()),
            b1: c.bias.then_some(b1.as_ptr().cast()),
            w2: Weight::Plain(w2.as_ptr().cast()),
            b2: c.bias.then_some(b2.as_ptr().cast()),
            weights: weights.as_ptr().cast(),
            rows: RoutedRows { offsets: &self.offsets, gather: &self.gather, inverse: &self.inverse },
            threads: Threads::new(threads),
        };
        let nan = |n: usize| store::<E>(&vec![f64::NAN; n]);
        let mut out = nan(x.len());
        let mut hidden = nan(self.gather.len() * b1.len() / c.experts);
        let (mut dx, mut dw1, mut db1) = (nan(x.len()), nan(w1.len()), nan(b1.len()));
        let (mut dw2, mut db2) = (nan(w2.len()), nan(b2.len()));
        let mut dweights = vec![M::Acc::default(); weights.len()];
        let grads = MlpGrads {
            x: Some(dx.as_mut_ptr().cast()),
            weights: Some(dweights.as_mut_ptr().cast()),
            w1: Some((dw1.as_mut_ptr().cast(), Update::Write)),
            b1: Some(db1.as_mut_ptr().cast()),
            w2: Some((dw2.as_mut_ptr().cast(), Update::Write)),
            b2: Some(db2.as_mut_ptr().cast()),
        };
        // SAFETY: the vectors have the sizes of the case, and only machines that are present are checked.
        unsafe {
            forward::<M, E>(&p, out.as_mut_ptr().cast(), Some(hidden.as_mut_ptr().cast()));
            backward::<M, E>(&p, hidden.as_ptr().cast(), grad.as_ptr().cast(), &grads);
        }
        Answer {
            out: seen(&out),
            x: seen(&dx),
            w1: seen(&dw1),
            b1: seen(&db1),
            w2: seen(&dw2),
            b2: seen(&db2),
            weights: seen(&dweights),
        }
    }

    /// Compares what each subject computes with the naive layer.
    fn check(&self, subjects: &[Subject], dtype: DType, tolerance: f64) {
        let (c, want) = (self.case, self.naive());
        for subject in subjects {
            let got = (subject.computed)(self, dtype, c.threads);
            let close = |name: &str, got: &[f64], want: &[f64]| {
                let size = want.iter().fold(1e-3f64, |m, w| m.max(w.abs()));
                for (i, (g, w)) in got.iter().zip(want).enumerate() {
                    let machine = subject.machine;
                    assert!(
                        (g - w).abs() <= tolerance * size,
                        "{name}[{i}]: {g} wanted {w}; {c:?} {machine} {dtype:?}"
                    );
                }
            };
            close("out", &got.out, &want.out);
            close("dx", &got.x, &want.x);
            close("dweights", &got.weights, &want.weights);
            close("dw1", &got.w1, &want.w1);
            close("dw2", &got.w2, &want.w2);
            if c.bias {
                close("db1", &got.b1, &want.b1);
                close("db2", &got.b2, &want.b2);
            }
        }
    }
}

/// A machine with a type of numbers.
struct Subject {
    machine: &'static str,
    computed: fn(&Problem, DType, usize) -> Answer,
    check_grouped: fn(DType, f64),
}

fn subject<M: Machine, E: Element<Acc = M::Acc> + Seen>() -> Subject
where
    M::Acc: Seen,
{
    Subject {
        machine: std::any::type_name::<M>(),
        computed: Problem::computed::<M, E>,
        check_grouped: check_grouped::<M, E>,
    }
}

/// Of a size whose blocks are narrower for more threads, and whose experts then have fewer chunks of rows.
fn check_threads<E: Element + Seen>(subject: &Subject, dtype: DType) {
    for transposed in [false, true] {
        let case = Case {
            tokens: 420,
            hidden: 8,
            intermediate: 600,
            experts: 2,
            top_k: 1,
            bias: true,
            transposed,
            ..cases()[0]
        };
        let problem = Problem::new::<E>(case, 7);
        let [one, many] = [1, 64].map(|threads| (subject.computed)(&problem, dtype, threads));
        assert!(one == many, "{case:?} {} {dtype:?}", subject.machine);
    }
}

fn cases() -> Vec<Case> {
    let base = Case {
        tokens: 37,
        hidden: 70,
        intermediate: 45,
        experts: 4,
        top_k: 2,
        activation: Activation::Swiglu,
        transposed: false,
        interleaved: false,
        bias: false,
        threads: 2,
    };
    let mut cases = vec![
        base,
        Case { tokens: 1, threads: 1, ..base },
        Case { tokens: 0, ..base },
        Case { tokens: 3, hidden: 1, intermediate: 1, experts: 1, top_k: 1, ..base },
        Case { tokens: 260, hidden: 300, intermediate: 160, experts: 3, bias: true, threads: 3, ..base },
        Case { tokens: 9, hidden: 640, intermediate: 32, ..base },
        Case { tokens: 150, hidden: 96, intermediate: 160, bias: true, ..base },
        Case { tokens: 40, hidden: 320, intermediate: 96, transposed: true, ..base },
        Case { tokens: 450, experts: 2, interleaved: true, bias: true, ..base },
        Case { tokens: 1100, hidden: 24, intermediate: 17, experts: 2, ..base },
        Case {
            tokens: 300,
            hidden: 200,
            intermediate: 150,
            experts: 2,
            bias: true,
            transposed: true,
            ..base
        },
    ];
    for (_, activation) in Activation::ALL {
        for (transposed, interleaved) in [(false, false), (true, false), (false, true), (true, true)] {
            cases.push(Case { activation, transposed, interleaved, bias: true, ..base });
        }
    }
    cases
}

fn check_all<E: Element + Seen>(subjects: &[Subject], dtype: DType, tolerance: f64) {
    for (seed, case) in cases().into_iter().enumerate() {
        Problem::new::<E>(case, seed as u64).check(subjects, dtype, tolerance);
    }
    for subject in subjects {
        (subject.check_grouped)(dtype, tolerance);
        check_threads::<E>(subject, dtype);
    }
}

fn check_grouped<M: Machine, E: Element<Acc = M::Acc> + Seen>(dtype: DType, tolerance: f64)
where
    M::Acc: Seen,
{
    let (rows, inner, outer) = (50, 33, 41);
    let offsets = [0, 20, 20, 47];
    let mut r = Random(7);
    let [x, w, b, g] =
        [rows * inner, 3 * inner * outer, 3 * outer, rows * outer].map(|n| store::<E>(&r.numbers(n, 1.0)));
    for transposed in [false, true] {
        let p =
            GroupedMm { dtype, inner, outer, rows, offsets: &offsets, transposed, threads: Threads::new(2) };
        let mut out = vec![E::default(); rows * outer];
        let (mut dw, mut db) = (w.clone(), b.clone());
        // An expert without rows keeps even the sign of a zero.
        let mut before = seen(&w);
        before[inner * outer] = -0.0;
        let mut added = store::<E>(&before);
        let mut added_wide: Vec<M::Acc> = before.iter().map(|&x| fastmoe_core::Float::from_f64(x)).collect();
        // SAFETY: the vectors have the sizes of `p`.
        unsafe {
            grouped::<M, E>(
                &p,
                x.as_ptr().cast(),
                w.as_ptr().cast(),
                Some(b.as_ptr().cast()),
                out.as_mut_ptr().cast(),
            );
            let grad_weight = |out: PtrMut, update, bias: Option<PtrMut>| {
                grouped_grad_weight::<M, E>(&p, g.as_ptr().cast(), x.as_ptr().cast(), (out, update), bias);
            };
            grad_weight(dw.as_mut_ptr().cast(), Update::Write, Some(db.as_mut_ptr().cast()));
            grad_weight(added.as_mut_ptr().cast(), Update::Add, None);
            grad_weight(added_wide.as_mut_ptr().cast(), Update::AddWide, None);
        }
        let (added, added_wide) = (seen(&added), seen(&added_wide));
        for i in inner * outer..2 * inner * outer {
            assert_eq!(dw[i].seen(), 0.0);
            assert_eq!(added[i].to_bits(), before[i].to_bits());
            assert_eq!(added_wide[i].to_bits(), before[i].to_bits());
        }
        let at = |e: usize, n: usize, k: usize| {
            if transposed { (e * inner + k) * outer + n } else { (e * outer + n) * inner + k }
        };
        for e in 0..3 {
            let range = offsets[e] as usize..offsets[e + 1] as usize;
            for n in 0..outer {
                let bias: f64 = range.clone().map(|r| g[r * outer + n].seen()).sum();
                assert!((db[e * outer + n].seen() - bias).abs() <= tolerance * 20.0);
                for k in 0..inner {
                    let want: f64 =
                        range.clone().map(|r| g[r * outer + n].seen() * x[r * inner + k].seen()).sum();
                    let i = at(e, n, k);
                    assert!((dw[i].seen() - want).abs() <= tolerance * 20.0, "dw {e} {n} {k}");
                    assert!((added[i] - before[i] - want).abs() <= tolerance * 20.0, "added {e} {n} {k}");
                    let wide = tolerance.min(F32) * 20.0;
                    assert!((added_wide[i] - before[i] - want).abs() <= wide, "added wide {e} {n} {k}");
                }
                for r in range.clone() {
                    let want: f64 = (0..inner).map(|k| x[r * inner + k].seen() * w[at(e, n, k)].seen()).sum();
                    let want = want + b[e * outer + n].seen();
                    assert!((out[r * outer + n].seen() - want).abs() <= tolerance * 20.0, "out {r} {n}");
                }
            }
        }
        assert!(out[47 * outer..].iter().all(|o| o.seen() == 0.0));
        let nothing = GroupedMm { rows: 0, offsets: &[0; 4], ..p };
        // SAFETY: tensors of no rows have no memory.
        unsafe {
            grouped::<M, E>(&nothing, std::ptr::null(), w.as_ptr().cast(), None, std::ptr::null_mut());
        }
    }
}

/// Numbers that do not add up: what is infinite or not a number in exact arithmetic is so, and nothing else is.
#[cfg(target_arch = "x86_64")]
fn check_specials<M: Machine, E: Element<Acc = M::Acc> + Seen>(dtype: DType, largest: f64) {
    let (rows, inner, outer) = (160, 35, 33);
    let mut r = Random(11);
    let (mut x, mut w) = (r.numbers(rows * inner, 1.0), r.numbers(outer * inner, 1.0));
    let specials =
        [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, largest, -largest, 0.0, -0.0, f64::INFINITY, 1.0];
    for (i, &special) in specials.iter().enumerate() {
        x[i * inner + 3 * i] = special;
        w[2 * i * inner + 3 * i] = 1.0;
        w[(2 * i + 1) * inner + 3 * i] = 0.0;
    }
    for (i, &special) in specials.iter().enumerate().take(3) {
        w[(20 + i) * inner + 30] = special;
    }
    x[30 * inner + 30] = 0.0;
    x[31 * inner + 30] = f64::INFINITY;
    let (x, w) = (store::<E>(&x), store::<E>(&w));
    let mut out = vec![E::default(); rows * outer];
    let offsets = [0, rows as i32];
    let p = GroupedMm {
        dtype,
        inner,
        outer,
        rows,
        offsets: &offsets,
        transposed: false,
        threads: Threads::new(1),
    };
    // SAFETY: the vectors have the sizes of `p`.
    unsafe {
        grouped::<M, E>(&p, x.as_ptr().cast(), w.as_ptr().cast(), None, out.as_mut_ptr().cast());
    }
    let class = |x: f64| {
        if x.is_finite() {
            0
        } else if x.is_nan() {
            1
        } else {
            2 * x.signum() as i32
        }
    };
    for r in 0..rows {
        for c in 0..outer {
            let want: f64 = (0..inner).map(|k| x[r * inner + k].seen() * w[c * inner + k].seen()).sum();
            let (got, want) = (out[r * outer + c].seen(), seen(&store::<E>(&[want]))[0]);
            assert_eq!(class(got), class(want), "row {r}, column {c}: {got} wanted {want}; {dtype:?}");
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn infinities_and_what_is_no_number_survive_tiles() {
    check_specials::<Portable, f32>(DType::F32, f64::from(f32::MAX));
    check_specials::<Portable, f16>(DType::F16, 65504.0);
    if Isa::available().contains(&Isa::Amx) {
        check_specials::<crate::amx::Amx<3>, f32>(DType::F32, f64::from(f32::MAX));
        check_specials::<crate::amx::Amx<2>, f16>(DType::F16, 65504.0);
    }
}

const F32: f64 = 3e-6;
const BF16: f64 = 2.5e-2;
const F16: f64 = 2e-3;

/// The machines of this computer whose sums are f32.
fn machines<E: Element<Acc = f32> + Seen>() -> Vec<Subject> {
    let mut found = vec![subject::<Portable, E>()];
    #[cfg(target_arch = "aarch64")]
    found.push(subject::<Neon, E>());
    #[cfg(target_arch = "x86_64")]
    for isa in Isa::available() {
        match isa {
            Isa::Avx2 => found.push(subject::<Avx2, E>()),
            Isa::Avx512 => found.push(subject::<Avx512, E>()),
            _ => (),
        }
    }
    found
}

#[test]
fn f64_matches_the_naive_layer() {
    let mut found = vec![subject::<Portable64, f64>()];
    #[cfg(target_arch = "x86_64")]
    if Isa::available().contains(&Isa::Avx2) {
        found.push(subject::<Avx2Double, f64>());
    }
    check_all::<f64>(&found, DType::F64, 1e-8);
}

#[test]
fn f32_matches_the_naive_layer() {
    let mut found = machines::<f32>();
    #[cfg(target_arch = "x86_64")]
    if Isa::available().contains(&Isa::Amx) {
        found.push(subject::<crate::amx::Amx<3>, f32>());
    }
    check_all::<f32>(&found, DType::F32, F32);
}

#[test]
fn bf16_matches_the_naive_layer() {
    let mut found = machines::<bf16>();
    #[cfg(target_arch = "x86_64")]
    for isa in Isa::available() {
        match isa {
            Isa::Avx512Bf16 => found.push(subject::<Avx512Pairs, bf16>()),
            Isa::Amx => found.push(subject::<crate::amx::Amx<1>, bf16>()),
            _ => (),
        }
    }
    check_all::<bf16>(&found, DType::Bf16, BF16);
}

#[test]
fn f16_matches_the_naive_layer() {
    let mut found = machines::<f16>();
    #[cfg(target_arch = "x86_64")]
    if Isa::available().contains(&Isa::Amx) {
        found.push(subject::<crate::amx::Amx<2>, f16>());
    }
    check_all::<f16>(&found, DType::F16, F16);
}
