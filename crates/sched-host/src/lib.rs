//! Co-scheduling of sibling vCPUs from user space, for kernels without `sched_ext`.
//!
//! Chapter 4 of K. Wang's dissertation keeps the vCPUs of a machine on distinct pCPUs and has a vCPU
//! that is ahead lend virtual runtime to a sibling that is behind. From outside the kernel no thread's
//! virtual runtime can be moved. What can be done there does the same more coarsely: every machine
//! gets a control group, its siblings get disjoint sets of pCPUs, and a loan is a lower nice and a
//! shorter slice for the slow sibling against a higher nice and a longer slice for the fast one, in
//! one call each and with an expiry. Since both are in one group, others lose next to nothing by it.
//! Machines as wide as the host are run whole in turns, by the weights of their groups.
//! It works at tens of milliseconds, not at single slices: it promises that siblings get on evenly,
//! not that no lock holder is ever preempted.
//!
//! - [`observe`]: measures a live host and changes nothing; on [`queues`];
//! - [`service`]: does it; [`config`] says how, [`status`] what was done;
//! - [`place`], [`lend`]: the decisions, pure; [`gang`]: turns in which machines run whole;
//! - [`discover`]: which processes are machines;
//! - [`hands`], [`journal`]: every change, written down before it is made and put back in the end,
//!   by the next start if need be;
//! - [`cgroup`], [`sys`], [`proc`], [`cpus`]: the kernel's interfaces;
//! - [`cli`]: the commands.
//!
//! # How it works
//!
//! One thread finds machines, spreads their vCPUs, watches and lends; what it decides is pure
//! (`place`, `lend`), and whatever it changes goes through `hands`, which writes it into a journal
//! first and puts it back in the end. A vCPU is a thread number *and* a start time; one whose nice
//! or mask somebody else has changed belongs to that somebody. Siblings get disjoint sets of pCPUs
//! within their owner's masks, so the kernel balances freely inside a set and can't stack them. A
//! loan is nice and slice of two siblings in one control group, by as many steps up as down, for a
//! lag or for a place far back in the queue, with an expiry. Where a machine shares its group with
//! others it gets a group below that one, of its vCPU threads only. *Gangs* (`gang`) are the better
//! way than design.md's: loans by nice work at tens of milliseconds and can't bring siblings
//! together, weights can. Of the busy machines that are as wide as the host one has nearly all the
//! weight for 10 ms, then the next; the sum never changes, so nobody else pays. Their weights are
//! in groups that the service made and removes, so they need no journal. Sites do all of it by
//! default for machines that carry Godwit's mark; one site of a host does it for all
//! (`--no-co-scheduling` leaves it).

pub mod cgroup;
pub mod cli;
pub mod config;
pub mod cpus;
pub mod discover;
pub mod gang;
pub mod hands;
pub mod journal;
pub mod lend;
pub mod observe;
pub mod place;
pub mod proc;
pub mod queues;
pub mod service;
pub mod status;
pub mod sys;
mod vm;
