//! Load orders: lists of weight indices, in which a weight's first mention is its block 1, the next its block 2, and so on.

use crate::FormatError;

/// Checks an order for weights of which there are `available[w]` blocks: it begins with every weight once, and asks for no more.
pub(crate) fn check(order: &[u32], available: &[usize]) -> Result<(), FormatError> {
    let n_weights = available.len();
    let wrong = |position, reason| Err(FormatError::Order { position, reason });
    if n_weights == 0 {
        return wrong(0, "there is no weight to load".to_owned());
    }
    let mut counts = vec![0; n_weights];
    for (position, &w) in order.iter().enumerate() {
        let Some(count) = counts.get_mut(w as usize) else {
            return wrong(position, format!("weight {w} of {n_weights}"));
        };
        *count += 1;
        if position < n_weights && *count > 1 {
            let reason = format!("weight {w} comes again before every weight has its first block");
            return wrong(position, reason);
        }
        if *count > available[w as usize] {
            return wrong(position, format!("block {count} of weight {w}, which has {}", available[w as usize]));
        }
    }
    if order.len() < n_weights {
        let reason = format!("{} blocks are fewer than one for each of {n_weights} weights", order.len());
        return wrong(order.len(), reason);
    }
    Ok(())
}

/// The blocks of a checked order as (weight from 0, block from 1).
pub(crate) fn blocks(order: &[u32]) -> impl Iterator<Item = (usize, usize)> {
    let mut counts = Vec::new();
    order.iter().map(move |&w| {
        let w = w as usize;
        if w >= counts.len() {
            counts.resize(w + 1, 0);
        }
        counts[w] += 1;
        (w, counts[w])
    })
}

/// How many blocks of each weight a checked order has.
pub(crate) fn counts(order: &[u32], n_weights: usize) -> Vec<usize> {
    let mut counts = vec![0; n_weights];
    for &w in order {
        counts[w as usize] += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_that_break_a_rule_are_rejected_at_the_right_place() {
        assert!(check(&[1, 0, 0, 1, 0], &[3, 2]).is_ok());
        for (order, available, at) in [
            (&[0, 0, 1][..], &[3, 2][..], 1), // not every first block first
            (&[0, 2], &[1, 1], 1),            // no such weight
            (&[0, 1, 1], &[1, 1], 2),         // no such block
            (&[0], &[1, 1], 1),               // a weight without a block
            (&[], &[], 0),                    // nothing
        ] {
            let error = check(order, available).unwrap_err();
            assert!(matches!(error, FormatError::Order { position, .. } if position == at), "{order:?}: {error}");
        }
    }

    #[test]
    fn blocks_are_numbered_by_counting() {
        assert_eq!(blocks(&[1, 0, 0, 1]).collect::<Vec<_>>(), [(1, 1), (0, 1), (0, 2), (1, 2)]);
        assert_eq!(counts(&[1, 0, 0, 1, 0], 2), [3, 2]);
    }
}
