//! System tests of Godwit from outside: a center and an AP as processes of their own, driven by
//! the command line as an operator does it.
//!
//! A [`Cloud`] keeps everything below one temporary directory and takes everything with it when it
//! is dropped: daemons, machines, relays, files. One cloud lives at a time on a host, so that the
//! machines of one test do not stretch the time-outs of another.
//!
//! Panics are how a harness of tests says that something is not as it must be.
#![allow(clippy::missing_panics_doc)]

mod another;
mod api;
mod archive;
mod cloud;
mod guest;
#[cfg(test)]
mod house;
mod networks;
mod run;
mod setup;

pub use api::{Api, Body, Reply};
pub use cloud::{Cloud, Daemon, Fed, Running, Unwanted, free_port};
pub use godwit_testkit::process::{exists, kill, pause, resume};
pub use godwit_testkit::{Tmpfs, flip, has_image, within};
pub use guest::{Guest, Identity};
pub use run::{Answer, Followed};
pub use setup::{Setup, Use};
