//! Experiments.
#![allow(clippy::print_stdout, missing_docs, reason = "an example prints")]
use bitstack_core::{ActivationStats, Collect, Scales};
use bitstack_decomp::{Nested, nested_blocks};
use ndarray::Array2;
use rand::{RngExt, SeedableRng, rngs::StdRng};

fn gauss(rng: &mut StdRng) -> f64 {
    let u: f64 = 1.0 - rng.random::<f64>();
    let v: f64 = rng.random();
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// The synthetic matrix: W gaussian with log-normal rows and columns, H a random rotation of a spectrum over three decades.
pub fn synthetic(m: usize, n: usize, seed: u64) -> (Array2<f32>, Array2<f64>) {
    let mut rng = StdRng::seed_from_u64(seed);
    let rows: Vec<f64> = (0..m).map(|_| (0.3 * gauss(&mut rng)).exp()).collect();
    let cols: Vec<f64> = (0..n).map(|_| (0.4 * gauss(&mut rng)).exp()).collect();
    let w = Array2::from_shape_fn((m, n), |(r, c)| (gauss(&mut rng) * rows[r] * cols[c]) as f32);
    let g = faer::Mat::<f64>::from_fn(n, n, |_, _| gauss(&mut rng));
    let q = g.qr().compute_Q();
    let d: Vec<f64> = (0..n).map(|_| (0.8 * gauss(&mut rng)).exp()).collect();
    let scaled = faer::Mat::<f64>::from_fn(n, n, |i, j| {
        d[i] * q[(i, j)] * 10f64.powf(-1.5 * j as f64 / (n - 1) as f64)
    });
    let h = &scaled * scaled.transpose();
    (w, Array2::from_shape_fn((n, n), |(i, j)| h[(i, j)]))
}

fn main() {
    let mut o = Nested {
        n_blocks: 8,
        joint: 4,
        sweeps: 4,
        diagonal: 0.0,
        damping: 0.01,
        weights: vec![0.3, 1., 1., 1., 1., 1., 1., 1.],
        omega: vec![0.0, 1., 1., 1., 1., 1., 1., 1.],
        ratio: 0.5,
        clip: 1.0,
        start: vec![],
        gain: 1.15,
        tail: 1,
        rounds: 12,
        order: 0,
        bytes: true,
    };
    let (mut m, mut n, mut nogram) = (768, 512, false);
    let mut search = 0usize;
    for arg in std::env::args().skip(1) {
        let (k, v) = arg.split_once('=').unwrap();
        let list = || {
            let mut l: Vec<f64> = v.split(',').map(|x| x.parse().unwrap()).collect();
            let last = *l.last().unwrap();
            l.resize(8, last);
            l
        };
        match k {
            "m" => m = v.parse().unwrap(),
            "n" => n = v.parse().unwrap(),
            "q" => o.joint = v.parse().unwrap(),
            "blocks" => o.n_blocks = v.parse().unwrap(),
            "sweeps" => o.sweeps = v.parse().unwrap(),
            "diag" => o.diagonal = v.parse().unwrap(),
            "damp" => o.damping = v.parse().unwrap(),
            "w" => o.weights = list(),
            "omega" => o.omega = list(),
            "start" => o.start = v.split(',').map(|x| x.parse().unwrap()).collect(),
            "search" => search = v.parse().unwrap(),
            "clip" => o.clip = v.parse().unwrap(),
            "ratio" => o.ratio = v.parse().unwrap(),
            "gain" => o.gain = v.parse().unwrap(),
            "tail" => o.tail = v.parse().unwrap(),
            "rounds" => o.rounds = v.parse().unwrap(),
            "order" => o.order = v.parse().unwrap(),
            "bytes" => o.bytes = v == "1",
            "nogram" => nogram = v == "1",
            _ => panic!("{k}"),
        }
    }
    let (w, h) = synthetic(m, n, 0);
    // Scales from the diagonal of H.
    let mut stats = ActivationStats::new(n, Collect::Diagonal);
    stats.update(Array2::from_shape_fn((1, n), |(_, c)| h[[c, c]].sqrt() as f32).view()).unwrap();
    let s = Scales::rms(&stats).unwrap();
    if search > 0 {
        let mut rng = StdRng::seed_from_u64(7);
        let q = o.joint;
        let mut best = f64::INFINITY;
        let mut c: Vec<f64> = if o.start.is_empty() { (0..q).map(|i| o.clip * o.ratio.powi(i as i32)).collect() } else { o.start.clone() };
        for it in 0..search {
            let amount = if it < search / 2 { 0.08 } else { 0.04 };
            let try_c: Vec<f64> = if it == 0 { c.clone() } else { c.iter().map(|c| c * (amount * gauss(&mut rng)).exp()).collect() };
            let mut p = o.clone();
            p.start = try_c.clone();
            let steps = nested_blocks(w.view(), Some(&s), (!nogram).then(|| h.view()), &p).unwrap();
            let obj: f64 = steps.iter().zip(&o.weights).map(|(s, w)| w * s.output.unwrap().1.ln()).sum();
            if obj < best {
                best = obj;
                c = try_c;
                println!("{it} {best:.3} {c:.3?} {}", steps.iter().map(|s| format!("{:.2e}", s.output.unwrap().1)).collect::<Vec<_>>().join(" "));
            }
        }
        return;
    }
    let start = std::time::Instant::now();
    let steps = nested_blocks(w.view(), Some(&s), (!nogram).then(|| h.view()), &o).unwrap();
    let time = start.elapsed().as_secs_f64();
    let norm: f64 = w.rows().into_iter().map(|r| { let r = r.mapv(f64::from); r.dot(&h.dot(&r)) }).sum();
    let mut stack = bitstack_core::WeightStack::new(bitstack_core::Shape::new(m, n).unwrap());
    print!("{:<40}", std::env::args().skip(1).collect::<Vec<_>>().join(" "));
    for (b, step) in steps.into_iter().enumerate() {
        let told = step.output;
        stack.push(step.block).unwrap();
        let bits = stack.bytes(b + 1) as f64 * 8.0 / (m * n) as f64;
        let e = if nogram || std::env::var("CHECK").is_ok() {
            let r = Array2::from_shape_vec((m, n), stack.level(b + 1).unwrap().reconstruct()).unwrap() - &w;
            r.rows().into_iter().map(|r| { let r = r.mapv(f64::from); r.dot(&h.dot(&r)) }).sum::<f64>() / norm
        } else {
            told.unwrap().1
        };
        if let (Some((_, t)), true) = (told, std::env::var("CHECK").is_ok()) { print!("[{t:.3e}]"); }
        print!(" {bits:.2}: {e:.2e} ", );
    }
    println!(" {:.0} w/s, {time:.2} s", (m * n) as f64 / time);
}
