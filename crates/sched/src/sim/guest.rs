//! What a vCPU does: a program of steps, and the locks, barriers and work that programs share.

use rand::rngs::SmallRng;

/// Who spins: pause-loop exiting tells of the guest's kernel only (Intel's manual, volume 3: it is
/// ignored where the privilege level is above 0).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// The guest's kernel.
    Kernel,
    /// A program in the guest.
    User,
}

/// A spin-lock of a machine, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LockId(pub usize);

/// A spinning barrier of a machine, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarrierId(pub usize);

/// A bounded queue between stages, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FifoId(pub usize);

/// What a vCPU does next. Times are nanoseconds of undisturbed execution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Computes.
    Compute(u64),
    /// Spins until the lock is its own, holds it that long, releases it.
    Critical(LockId, u64),
    /// Spins until as many have come as the barrier joins.
    Barrier(BarrierId),
    /// Spins until there is room, then puts one item in.
    Put(FifoId),
    /// Spins until there is an item, then takes it.
    Get(FifoId),
    /// Has every sibling that is awake forget a mapping (a TLB shootdown): spins until each of
    /// them has executed something since.
    Shootdown,
    /// Gives its pCPU up for that long, until a timer or a device wakes it.
    Sleep(u64),
    /// Gives its pCPU up for that long, until a sibling wakes it by an interrupt from the pCPU that
    /// it runs on.
    Halt(u64),
    /// Ends.
    Exit,
}

/// What a vCPU executes. A shared part, such as work that any vCPU may take, lies behind `Rc`.
pub trait Program {
    /// The step that follows.
    fn next(&mut self, chance: &mut SmallRng) -> Step;
}

impl<F: FnMut(&mut SmallRng) -> Step> Program for F {
    fn next(&mut self, chance: &mut SmallRng) -> Step {
        self(chance)
    }
}
