//! The search for the best code: the leaf of a binary tree of sign prefixes with the least sum of squared distances over all levels.

use super::lanes::{Aligned, LANES, Lane};
use crate::Nested;

/// See [`Nested::MAX_JOINT`].
pub(crate) const MAX_JOINT: usize = Nested::MAX_JOINT;

/// Where the nodes of depth `b` (from 0, so `2^(b+1)` of them) start in a table of all nodes.
pub(crate) const fn nodes_before(b: usize) -> usize {
    (2 << b) - 2
}

/// A value for each node.
pub(crate) type Nodes = Aligned<[Lane; nodes_before(MAX_JOINT)]>;
/// Scratch of [`choose`].
pub(crate) type Costs = Aligned<[Lane; 1 << MAX_JOINT]>;

/// For each row the code z (most significant bit first: the sign of plane i is bit `q - 1 - i`) that minimises
/// Σ_b (targets[b] − table[node of the first b + 1 bits])². Weights of the levels are multiplied into targets and table beforehand.
/// Ties go to the smaller code.
#[inline(always)]
pub(crate) fn choose(targets: &[Lane], table: &Nodes, costs: &mut Costs) -> [u8; LANES] {
    let (q, table, costs) = (targets.len(), &table.0, &mut costs.0);
    let mut best = [f32::INFINITY; LANES];
    let mut code = [0u32; LANES];
    costs[0] = [0.0; LANES];
    for b in 0..q - 1 {
        let nodes = &table[nodes_before(b)..nodes_before(b + 1)];
        let t = &targets[b];
        // Children overwrite their parents from the top: child 2k of parent k never lands on a parent still needed.
        for k in (0..1 << b).rev() {
            let parent = costs[k];
            for child in [2 * k + 1, 2 * k] {
                for l in 0..LANES {
                    let d = t[l] - nodes[child][l];
                    costs[child][l] = parent[l] + d * d;
                }
            }
        }
    }
    let nodes = &table[nodes_before(q - 1)..nodes_before(q)];
    let t = &targets[q - 1];
    for k in 0..1usize << (q - 1) {
        let (low, high) = (&nodes[2 * k], &nodes[2 * k + 1]);
        let parent = &costs[k];
        for l in 0..LANES {
            let d0 = t[l] - low[l];
            let d1 = t[l] - high[l];
            let (d0, d1) = (d0 * d0, d1 * d1);
            let upper = d1 < d0;
            let cost = parent[l] + if upper { d1 } else { d0 };
            let leaf = 2 * k as u32 + u32::from(upper);
            let better = cost < best[l];
            code[l] = if better { leaf } else { code[l] };
            best[l] = if better { cost } else { best[l] };
        }
    }
    code.map(|z| z as u8)
}

/// The sign of plane `i` of `q` in each row's code.
#[inline(always)]
pub(crate) fn signs(codes: &[u8; LANES], q: usize, i: usize) -> Lane {
    let mut out = [0.0; LANES];
    for l in 0..LANES {
        let bit = (u32::from(codes[l]) >> (q - 1 - i)) & 1;
        out[l] = (2 * bit as i32 - 1) as f32;
    }
    out
}
