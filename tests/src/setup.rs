//! What a cloud is started with, where that is not the usual.

use crate::cloud::{Cloud, Daemon};

/// What a file system of its own is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// The data of a site: store, substrates, cow files, and the registry of a center.
    Disk,
    /// The memory of its machines.
    Ram,
}

/// A cloud that is to be started.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    pub(crate) mounts: Vec<(Daemon, Use, u64)>,
    pub(crate) flags: Vec<(Daemon, String)>,
    pub(crate) others: Vec<(Daemon, std::path::PathBuf)>,
    pub(crate) net: Option<(f64, f64)>,
    pub(crate) co_scheduling: bool,
}

impl Setup {
    /// The usual.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives a site a file system of `mib` MiB of its own.
    #[must_use]
    pub fn mount(mut self, at: Daemon, what: Use, mib: u64) -> Self {
        self.mounts.push((at, what, mib));
        self
    }

    /// Puts the two sites into network namespaces, with an emulated link between them of
    /// `rate_mbit` and `delay_ms` each way.
    #[must_use]
    pub fn over_link(mut self, rate_mbit: f64, delay_ms: f64) -> Self {
        self.net = Some((rate_mbit, delay_ms));
        self
    }

    /// Gives a daemon one more word on its command line.
    #[must_use]
    pub fn flag(mut self, at: Daemon, word: &str) -> Self {
        self.flags.push((at, word.to_owned()));
        self
    }

    /// Lets a daemon, with its relays, be of another build.
    #[must_use]
    pub fn other_build(mut self, at: Daemon, program: impl Into<std::path::PathBuf>) -> Self {
        self.others.push((at, program.into()));
        self
    }

    /// Lets the sites co-schedule, as they do unless told otherwise. One site of a host does it for
    /// all, so clouds of tests that run side by side leave it alone.
    #[must_use]
    pub const fn co_scheduling(mut self) -> Self {
        self.co_scheduling = true;
        self
    }

    /// Lets both sites take a link that is silent for `seconds` for lost.
    #[must_use]
    pub fn patience(self, seconds: u64) -> Self {
        let word = format!("--link-patience={seconds}");
        self.flag(Daemon::Center, &word).flag(Daemon::Ap, &word)
    }

    /// Starts a center and an AP that has joined it.
    #[must_use]
    pub fn start(self) -> Cloud {
        let mut cloud = self.center_only();
        cloud.join_ap();
        cloud
    }

    /// Starts a center.
    #[must_use]
    pub fn center_only(self) -> Cloud {
        Cloud::with(self)
    }
}
