//! The evaluation: the WAN link emulator, the harness, and the suites that measure Godwit beside
//! its rivals on the same link in the same run.
//!
//! # Suite `sched`
//!
//! The link emulator is a sans-IO model behind two TUN devices in two network namespaces; its
//! accuracy has tests of its own. Suite `sched` sets each table and figure of the thesis' chapter 4
//! beside the simulator's value and, with `--real kernel,host`, beside what a guest's kernel
//! (`sched-ext` in `lab` guests) and this host's threads (`sched-host` under QEMU machines) show
//! with `standin`'s programs. An emulated CPU is ten to thirty times slower than a real one while a
//! slice is as long, so what lies between two waits would be as long as a slice, and no order of
//! vCPUs could help or harm. The suite measures by how much a guest is slower at each stand-in,
//! alone, before anything is compared, and makes its operations so much smaller. A guest has no
//! more vCPUs than the host has CPUs: those that share one stop each other in the middle of a lock.

pub mod demo;
pub mod harness;
pub mod link;
pub mod prober;
pub mod rng;
pub mod suites;
