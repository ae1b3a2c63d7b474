//! The jobs that a compression consists of, and who runs them.

use crate::CompressError;
use crate::compress::Making;
use rayon::prelude::*;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

/// Jobs run side by side up to this much memory; the results do not depend on it. A job that needs more is alone: decomposing the largest weight
/// of a model of 70 billion weights takes 13 GB.
const SIDE_BY_SIDE_BYTES: u64 = 6 << 30;

/// A job: it makes units of a store from others, and its name is that of the unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Job {
    /// Text that the model writes; a unit for each group of windows.
    Text,
    /// What each weight counts for.
    Importance,
    /// The hidden states of all windows in front of a layer; behind the last one, in front of the head.
    States(usize),
    /// The blocks of a weight, by its index among those that are stacked, and its errors.
    Weight(usize),
    /// The order of all blocks; runs that choose it are units of their own.
    Order,
    /// How good the stack is at some sizes; likewise.
    Quality,
}

impl Job {
    /// The weight whose blocks it makes, if it does.
    pub(crate) fn weight(&self) -> Option<usize> {
        if let Self::Weight(weight) = self { Some(*weight) } else { None }
    }
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text => write!(f, "text"),
            Self::Importance => write!(f, "importance"),
            Self::States(layer) => write!(f, "states.{layer:04}"),
            Self::Weight(weight) => write!(f, "weight.{weight:04}"),
            Self::Order => write!(f, "order"),
            Self::Quality => write!(f, "quality"),
        }
    }
}

impl FromStr for Job {
    type Err = CompressError;

    fn from_str(name: &str) -> Result<Self, CompressError> {
        let job = match name.split_once('.') {
            None => {
                [Self::Text, Self::Importance, Self::Order, Self::Quality].into_iter().find(|j| j.to_string() == name)
            }
            Some(("states", layer)) => layer.parse().ok().map(Self::States),
            Some(("weight", weight)) => weight.parse().ok().map(Self::Weight),
            Some(_) => None,
        };
        job.ok_or_else(|| CompressError::NoSuchJob { name: name.to_owned() })
    }
}

/// Who runs jobs: the pool of this machine, or something that hands their names to others, who share the store.
pub trait Executor {
    /// Makes these jobs, in any order, side by side or elsewhere. When this returns their units are in the store.
    ///
    /// # Errors
    /// The first that a job has.
    fn run(&self, making: &Making<'_>, jobs: &[Job]) -> Result<(), CompressError>;
}

/// The current rayon pool: as many jobs side by side as memory allows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pool;

impl Executor for Pool {
    fn run(&self, making: &Making<'_>, jobs: &[Job]) -> Result<(), CompressError> {
        making.prepare(jobs)?;
        let needs: Vec<u64> = jobs.iter().map(|job| making.bytes_for(*job)).collect();
        batches(&needs, SIDE_BY_SIDE_BYTES)
            .into_iter()
            .try_for_each(|batch| jobs[batch].par_iter().with_max_len(1).try_for_each(|job| making.make(*job)))
    }
}

/// Runs of jobs, in their order, that stay within `limit` together, or are one job.
fn batches(needs: &[u64], limit: u64) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    let mut sum = 0;
    for (i, need) in needs.iter().enumerate() {
        sum += need;
        match batches.last_mut() {
            Some(last) if sum <= limit => last.end = i + 1,
            _ => {
                batches.push(i..i + 1);
                sum = *need;
            }
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_keep_the_order_and_the_limit() {
        assert_eq!(batches(&[3, 3, 4, 11, 1, 9, 1], 10), [0..3, 3..4, 4..6, 6..7]);
        assert!(batches(&[], 10).is_empty());
        assert_eq!(batches(&[20, 20], 10), [0..1, 1..2]);
    }

    #[test]
    fn a_job_is_known_by_its_name() {
        use Job::*;
        for job in [Text, Importance, States(0), States(31), Weight(7), Weight(12345), Order, Quality] {
            assert_eq!(job.to_string().parse::<Job>().unwrap(), job);
        }
        for name in ["", "weights", "weight", "weight.", "weight.x", "states.-1", "order.1", "text "] {
            assert!(matches!(name.parse::<Job>(), Err(CompressError::NoSuchJob { name: n }) if n == name), "{name}");
        }
    }
}
