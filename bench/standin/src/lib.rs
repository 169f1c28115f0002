//! Programs that stand in for the workloads of the dissertation's chapter 4, which are not free to
//! use or not in Debian. Each does real work that can be checked, and waits as its model waits: by
//! spinning, at user level, so that a *process* of such threads behaves towards the scheduler as a
//! machine's vCPUs do whose guest spins in its kernel.
//!
//! | stand-in | for | what its threads do |
//! |---|---|---|
//! | [`dedup`] | PARSEC dedup | a pipeline of chunk, hash, compress and write over bounded queues under spin locks |
//! | [`streamcluster`] | PARSEC streamcluster | short phases of distances, a spinning barrier after each |
//! | [`kernbench`] | kernbench | a parallel build: compute, a kernel's critical sections; or a real build with `cc` |
//! | [`specjbb`] | SPECjbb2005 | transactions under many short locks; now and then the world stops |
//! | [`cpu`] | SuperPI | digits of pi, each thread for itself |
//! | [`locks`] | table 4.1's measurement | kernbench's critical sections and nothing else, timed |

pub mod cc;
pub mod clock;
pub mod cpu;
pub mod dedup;
pub mod fleet;
pub mod kernbench;
pub mod locks;
pub mod mix;
pub mod program;
pub mod specjbb;
pub mod spin;
pub mod streamcluster;

pub use program::{Config, EndReason, MOST_SLOWER, Outcome, Program, StandIn, run};
