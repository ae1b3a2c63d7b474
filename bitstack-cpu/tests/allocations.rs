//! A call allocates nothing once its buffers have grown.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use bitstack_core::{Basis, Block, Coefficients, Shape, SignMatrix, Spike, Spikes, Values, WeightStack, f16};
use bitstack_cpu::{Isa, Kernel, Scratch, Threads};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every method hands its arguments on to the system's allocator, which keeps the contract; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`, and `at` comes from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_call_allocates_nothing_once_its_buffers_have_grown() {
    let (rows, cols) = (300, 350);
    let halves = |n: usize| Values::F16((0..n).map(|i| f16::from_f32((i % 7) as f32 - 3.0)).collect());
    let shape = Shape::new(rows, cols).unwrap();
    let entries: Vec<Spike> = (0..rows).map(|row| Spike { row, col: row * 3 % cols, size: 1 }).collect();
    let mut stack = WeightStack::new(shape);
    for planes in 1..=3 {
        let signs: Vec<f32> = (0..rows * cols).map(|i| ((i * i) % 11) as f32 - 5.0).collect();
        stack
            .push(Block {
                signs: SignMatrix::from_f32(rows, cols, &signs).unwrap(),
                basis: (planes == 1).then(|| Basis::new(1, cols, halves(cols)).unwrap()),
                coefficients: Coefficients::new(rows, planes, 1, halves(rows * planes)).unwrap(),
                spikes: (planes == 1).then(|| Spikes::encode(shape, [f16::ONE; 15], &entries).unwrap()),
            })
            .unwrap();
    }
    let level = stack.level(3).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    for isa in Isa::available() {
        let kernel = Kernel::with_isa(isa).unwrap();
        for tokens in [1, 3, 40] {
            for threads in [Threads::One, Threads::Pool] {
                let x: Vec<f32> = (0..tokens * cols).map(|i| (i % 13) as f32 - 6.0).collect();
                let mut y = vec![0.0; tokens * rows];
                let mut scratch = Scratch::default();
                // On a thread of the pool, as a call from outside hands the work over through a queue that allocates now and then.
                let allocations = pool.install(|| {
                    let mut ten_calls = || {
                        let before = ALLOCATIONS.load(Ordering::Relaxed);
                        for _ in 0..10 {
                            kernel.apply(&level, &x, &mut y, threads, &mut scratch).unwrap();
                        }
                        ALLOCATIONS.load(Ordering::Relaxed) - before
                    };
                    // The first grow the buffers. Of the others, the fewest: what a thread allocates as it starts, or the test's own, is
                    // counted too, but not every time.
                    ten_calls();
                    (0..5).map(|_| ten_calls()).min().unwrap()
                });
                assert_eq!(allocations, 0, "{isa}, {tokens} tokens, {threads:?}");
            }
        }
    }
}
