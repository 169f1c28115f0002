//! The evaluation: the WAN link emulator, the harness, and the suites that measure Godwit beside
//! its rivals on the same link in the same run.

pub mod demo;
pub mod harness;
pub mod link;
pub mod prober;
pub mod rng;
pub mod suites;
