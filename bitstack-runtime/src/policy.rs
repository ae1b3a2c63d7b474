//! What budget to set, from what the system says: numbers and a clock in, a budget out.

use crate::system::Reading;
use std::ops::RangeInclusive;
use std::time::Duration;

/// When a model shrinks and grows with the memory there is.
///
/// It keeps `reserve_bytes` free. When less than half of that is left, the model shrinks at once until all of it is free again; when
/// threads wait for memory for more than `stall_share` of the time, by an eighth. When a quarter more than the reserve has been free for
/// `hold`, it grows, by a sixteenth of its range or an eighth of its size each `pause`, but only into what is free above the reserve.
/// Between the two marks nothing happens. Growth that soon had to be taken back doubles `hold` for the next time, up to eightfold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    /// Bytes to keep free for others, and for what arrives faster than it is noticed.
    pub reserve_bytes: u64,
    /// How long memory must have been free before the model grows.
    pub hold: Duration,
    /// The time between two steps of growth.
    pub pause: Duration,
    /// The share of a second, 0 to 1, for which threads may wait for memory.
    pub stall_share: f64,
}

impl Policy {
    /// A sixteenth of the memory there is as reserve, and at least 64 MiB; 5 s before it grows, 1 s between steps, stalls up to 0.2.
    ///
    /// A sixteenth is 1 GiB of 16: at ten looks a second the model makes way for a program that takes 5 GB/s.
    pub fn new(limit_bytes: u64) -> Self {
        let reserve_bytes = (limit_bytes / 16).max(64 << 20);
        Self { reserve_bytes, hold: Duration::from_secs(5), pause: Duration::from_secs(1), stall_share: 0.2 }
    }

    /// The budget to open a model with, of those that it can have (from its smallest to its whole size): what is free above the
    /// reserve. The whole size where nothing is known.
    pub fn first_budget(&self, reading: &Reading, budgets: RangeInclusive<u64>) -> u64 {
        let room = reading.available_bytes.map_or(u64::MAX, |room| room.saturating_sub(self.reserve_bytes));
        room.clamp(*budgets.start(), *budgets.end())
    }
}

/// Where the model stands.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Model {
    /// The budget set last. What a block more needs may be above the plan by more than a step.
    pub(crate) budget_bytes: u64,
    /// Resident bytes of its plan.
    pub(crate) target_bytes: u64,
    /// Bytes that it has now.
    pub(crate) allocated_bytes: u64,
    /// Whether it is still on its way to the plan.
    pub(crate) loading: bool,
}

/// A policy with what it must remember.
#[derive(Debug)]
pub(crate) struct Controller {
    policy: Policy,
    /// From the smallest model to the whole one.
    budgets: RangeInclusive<u64>,
    /// Since when memory has been free.
    free_since: Option<Duration>,
    grown_at: Option<Duration>,
    /// The policy's, or longer after growth that was taken back.
    hold: Duration,
    /// When a second of looking at stalls began, and the stalls until then.
    stalls: Option<(Duration, Duration)>,
}

const STALL_WINDOW: Duration = Duration::from_secs(1);
/// Growth that is taken back within this many times `hold` was premature.
const SOON: u32 = 6;
const MAX_HOLD: u32 = 8;

impl Controller {
    pub(crate) fn new(policy: Policy, budgets: RangeInclusive<u64>) -> Self {
        Self { policy, budgets, free_since: None, grown_at: None, hold: policy.hold, stalls: None }
    }

    /// The budget to set now, if another.
    pub(crate) fn next(&mut self, now: Duration, reading: &Reading, model: Model) -> Option<u64> {
        let reserve = self.policy.reserve_bytes;
        let room = reading.available_bytes;
        let is_low = room.is_some_and(|room| room < reserve / 2);
        let is_stalled = self.is_stalled(now, reading.stalled);
        // What the model would have if just the reserve were free.
        let fitting = room.map_or(u64::MAX, |room| model.allocated_bytes.saturating_add(room).saturating_sub(reserve));

        if is_low || is_stalled {
            self.free_since = None;
            if self.grown_at.take().is_some_and(|at| now.saturating_sub(at) < SOON * self.policy.hold) {
                self.hold = (2 * self.hold).min(MAX_HOLD * self.policy.hold);
            }
            let smaller = if is_stalled { model.target_bytes - model.target_bytes / 8 } else { u64::MAX };
            let budget = if is_low { smaller.min(fitting) } else { smaller };
            let budget = budget.clamp(*self.budgets.start(), *self.budgets.end());
            return (budget < model.target_bytes).then_some(budget);
        }

        // Where only stalls are known, their absence is what says that memory is free.
        let is_free = room.map_or(reading.stalled.is_some(), |room| room >= reserve.saturating_add(reserve / 4));
        if !is_free {
            self.free_since = None;
            return None;
        }
        let free_for = now.saturating_sub(*self.free_since.get_or_insert(now));
        if free_for >= SOON * MAX_HOLD * self.policy.hold {
            self.hold = self.policy.hold;
        }
        let may_step = self.grown_at.is_none_or(|at| now.saturating_sub(at) >= self.policy.pause);
        if free_for < self.hold || !may_step || model.loading {
            return None;
        }
        let step = (model.target_bytes / 8).max((self.budgets.end() - self.budgets.start()) / 16).max(1);
        let budget = fitting.min(model.budget_bytes.saturating_add(step)).min(*self.budgets.end());
        if budget <= model.budget_bytes {
            return None;
        }
        self.grown_at = Some(now);
        Some(budget)
    }

    /// Whether threads waited for memory for too large a share of the last second, said once for each second.
    fn is_stalled(&mut self, now: Duration, stalled: Option<Duration>) -> bool {
        let Some(stalled) = stalled else { return false };
        let &mut (since, before) = self.stalls.get_or_insert((now, stalled));
        let passed = now.saturating_sub(since);
        if passed < STALL_WINDOW {
            return false;
        }
        self.stalls = Some((now, stalled));
        stalled.saturating_sub(before).as_secs_f64() > self.policy.stall_share * passed.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;
    const TICK: Duration = Duration::from_millis(100);

    /// A machine on which others take memory, and a model of 1,000 to 10,000 MB in blocks of 50 MB with a reserve of 1,000 MB.
    struct World {
        controller: Controller,
        now: Duration,
        model_bytes: u64,
        budget_bytes: u64,
        block_bytes: u64,
        stalled: Duration,
        /// Budgets set, with their times.
        changes: Vec<(Duration, u64)>,
    }

    impl World {
        fn new(model_bytes: u64) -> Self {
            let policy = Policy { reserve_bytes: 1000 * MB, ..Policy::new(0) };
            let controller = Controller::new(policy, 1000 * MB..=10_000 * MB);
            Self {
                controller,
                now: Duration::ZERO,
                model_bytes,
                budget_bytes: model_bytes,
                block_bytes: 50 * MB,
                stalled: Duration::ZERO,
                changes: Vec::new(),
            }
        }

        /// Lets time pass; `others` says how much the others have after so many seconds, of 16,000 MB in all.
        fn run(&mut self, seconds: u64, mut others: impl FnMut(f64) -> u64) -> u64 {
            let start = self.now;
            while self.now < start + Duration::from_secs(seconds) {
                self.now += TICK;
                let used = self.model_bytes + others((self.now - start).as_secs_f64());
                assert!(used < 16_000 * MB, "the system kills at {:?}: {} MB", self.now, used / MB);
                let reading = Reading {
                    available_bytes: Some(16_000 * MB - used),
                    limit_bytes: Some(16_000 * MB),
                    stalled: Some(self.stalled),
                };
                self.tick(&reading);
            }
            self.model_bytes
        }

        fn tick(&mut self, reading: &Reading) {
            let target_bytes = self.model_bytes;
            let budget_bytes = self.budget_bytes;
            let model = Model { budget_bytes, target_bytes, allocated_bytes: target_bytes, loading: false };
            if let Some(budget) = self.controller.next(self.now, reading, model) {
                assert!(self.controller.budgets.contains(&budget));
                self.budget_bytes = budget;
                self.model_bytes = budget / self.block_bytes * self.block_bytes; // what a plan of whole blocks has
                self.changes.push((self.now, budget));
            }
        }
    }

    #[test]
    fn model_makes_way_for_others_before_the_system_kills() {
        for mb_per_second in [100, 1000, 4000] {
            let mut world = World::new(10_000 * MB);
            let model = world.run(150, |t| ((t * f64::from(mb_per_second)) as u64).min(14_600) * MB);
            assert_eq!(model, 1000 * MB, "at {mb_per_second} MB/s nothing but the smallest model fits");
        }
    }

    #[test]
    fn model_grows_back_in_steps_when_memory_has_been_free_for_a_while() {
        let mut world = World::new(1000 * MB);
        assert_eq!(world.run(4, |_| 3000 * MB), 1000 * MB, "not yet");
        assert!(world.run(3, |_| 3000 * MB) < 3000 * MB, "not all at once");
        assert_eq!(world.run(60, |_| 3000 * MB), 10_000 * MB);
        let gaps = world.changes.windows(2).map(|w| w[1].0 - w[0].0);
        assert!(gaps.min().unwrap() >= Duration::from_secs(1));
        assert!(world.changes.is_sorted(), "it only grows: {:?}", world.changes);
    }

    #[test]
    fn blocks_larger_than_a_step_are_reached_too() {
        let mut world = World::new(1000 * MB);
        world.block_bytes = 1000 * MB;
        assert_eq!(world.run(60, |_| 3000 * MB), 10_000 * MB);
    }

    #[test]
    fn growth_stops_at_the_reserve_and_then_nothing_changes() {
        let mut world = World::new(1000 * MB);
        let model = world.run(120, |_| 10_000 * MB);
        assert!((4750 * MB..=5000 * MB).contains(&model), "{} MB leave 1,000 to 1,250 MB free", model / MB);
        let n = world.changes.len();
        // Noise of a third of the reserve is between the marks.
        world.run(600, |t| 10_000 * MB + ((t * 7.0).sin() * 200.0 + 200.0) as u64 * MB);
        assert_eq!(world.changes.len(), n);
    }

    #[test]
    fn others_that_come_and_go_do_not_make_the_model_swing() {
        let mut world = World::new(10_000 * MB);
        // Somebody takes 4.7 GB more every 20 s, for 5 s.
        world.run(600, |t| if t % 20.0 < 5.0 { 5700 * MB } else { 1000 * MB });
        let shrunk = world.changes.windows(2).filter(|w| w[1].1 < w[0].1).count();
        assert!(shrunk <= 8, "shrunk {shrunk} times in 30 swings");
        // It ends, and the model comes back.
        assert_eq!(world.run(120, |_| 1000 * MB), 10_000 * MB);
    }

    #[test]
    fn stalls_shrink_the_model_although_memory_seems_free() {
        let mut world = World::new(8000 * MB);
        let idle = |_: f64| 1000 * MB;
        for _ in 0..20 {
            world.stalled += Duration::from_millis(150); // below a fifth
            world.run(1, idle);
        }
        assert!(world.changes.iter().all(|&(_, budget)| budget >= 8000 * MB));
        let before = world.model_bytes;
        for _ in 0..3 {
            world.stalled += Duration::from_millis(600);
            world.run(1, idle);
        }
        assert!(world.model_bytes < before * 7 / 8 && world.model_bytes > before / 2, "{} MB", world.model_bytes / MB);
    }

    #[test]
    fn where_nothing_is_known_nothing_is_done() {
        let mut world = World::new(5000 * MB);
        for _ in 0..1000 {
            world.now += TICK;
            world.tick(&Reading::default());
        }
        assert_eq!(world.changes, []);
    }

    #[test]
    fn model_that_is_still_loading_or_still_held_is_not_pushed() {
        let policy = Policy { reserve_bytes: 1000 * MB, ..Policy::new(0) };
        let mut controller = Controller::new(policy, 1000 * MB..=10_000 * MB);
        let reading = |available: u64| Reading { available_bytes: Some(available * MB), ..Reading::default() };
        let model = |target: u64, allocated: u64, loading| Model {
            budget_bytes: target * MB,
            target_bytes: target * MB,
            allocated_bytes: allocated * MB,
            loading,
        };
        for s in 0..60 {
            assert_eq!(controller.next(Duration::from_secs(s), &reading(5000), model(5000, 2000, true)), None);
        }
        // 300 MB are free: it gives 700, once, however long a pass holds on to the memory.
        let now = Duration::from_secs(60);
        assert_eq!(controller.next(now, &reading(300), model(5000, 5000, false)), Some(4300 * MB));
        assert_eq!(controller.next(now + TICK, &reading(300), model(4300, 5000, false)), None);
        assert_eq!(controller.next(now + 2 * TICK, &reading(200), model(4300, 5000, false)), Some(4200 * MB));
    }

    #[test]
    fn first_budget_is_what_is_free_above_the_reserve() {
        let policy = Policy::new(16 << 30);
        assert_eq!(policy.reserve_bytes, 1 << 30);
        assert_eq!(Policy::new(100).reserve_bytes, 64 << 20);
        let first =
            |available_bytes| policy.first_budget(&Reading { available_bytes, ..Reading::default() }, 10..=5 << 30);
        assert_eq!([first(Some(3 << 30)), first(Some(9 << 30))], [2 << 30, 5 << 30]);
        assert_eq!([first(Some(5)), first(None)], [10, 5 << 30]);
    }
}
