//! What the scheduler is told before it is loaded.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use godwit_sched::policy::{Alpha, Granularity};
use serde::{Deserialize, Serialize};

/// What couples sibling vCPUs. All but `Dft` keep them on distinct CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// `sbco` with a threshold for each machine: tighter, down to none, for those whose vCPUs spin (as
    /// KVM tells, or never sleep), loose for those that sleep.
    Adaptive,
    /// Self-boosted co-scheduling: a fast vCPU lends vruntime to a sibling that waits far back.
    Sbco,
    /// `sbco` that allows no distance: a machine's vCPUs start and stop together.
    Strict,
    /// Balance scheduling: distinct CPUs and nothing else.
    Bal,
    /// Process-based co-scheduling: when vCPU 0 runs, its siblings are forced to.
    Procco,
    /// CPU-based co-scheduling: what CPU 0 runs is forced on the others.
    Cpuco,
    /// The same queues without placement and coupling: what the queues alone are worth.
    Dft,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Adaptive => "adaptive",
            Self::Sbco => "sbco",
            Self::Strict => "strict",
            Self::Bal => "bal",
            Self::Procco => "procco",
            Self::Cpuco => "cpuco",
            Self::Dft => "dft",
        })
    }
}

/// What makes threads the vCPUs of one virtual machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmBy {
    /// Threads named `CPU n/KVM`, `CPU n/TCG` or `vcpuN`; their process is the machine.
    Names,
    /// Every thread but the main one of each process with this name: stand-ins for machines.
    Process(String),
    /// Every thread but the main one of each of these processes.
    Tgid(Vec<u32>),
    /// Every thread that is no main thread in each of these cgroups (version 2), as one machine.
    Cgroup(Vec<PathBuf>),
}

impl FromStr for VmBy {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = || ConfigError::VmBy(text.chars().take(80).collect());
        if text == "names" {
            return Ok(Self::Names);
        }
        let (kind, what) = text.split_once(':').ok_or_else(wrong)?;
        if what.is_empty() {
            return Err(wrong());
        }
        match kind {
            // The kernel keeps 15 bytes of a name.
            "process" if what.len() <= 15 && !what.contains('\0') => {
                Ok(Self::Process(what.to_owned()))
            }
            "tgid" => {
                let ids: Result<Vec<u32>, _> = what.split(',').map(str::parse).collect();
                let ids = ids.map_err(|_| wrong())?;
                if ids.contains(&0) || ids.len() > MOST_LISTED {
                    return Err(wrong());
                }
                Ok(Self::Tgid(ids))
            }
            "cgroup" => {
                let paths: Vec<PathBuf> = what.split(',').map(PathBuf::from).collect();
                if paths.len() > MOST_LISTED || paths.iter().any(|p| !p.is_absolute()) {
                    return Err(wrong());
                }
                Ok(Self::Cgroup(paths))
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for VmBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Names => f.write_str("names"),
            Self::Process(name) => write!(f, "process:{}", name.escape_debug()),
            Self::Tgid(ids) => write!(f, "tgid:{} processes", ids.len()),
            Self::Cgroup(paths) => write!(f, "cgroup:{} groups", paths.len()),
        }
    }
}

/// As many processes or groups as can be named one by one; `MAX_LISTED` of `vm.h`.
pub(crate) const MOST_LISTED: usize = 4096;

/// How to schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What couples siblings.
    pub mode: Mode,
    /// From which distance on `sbco` lends; at zero it is `strict`. Of `adaptive` the loosest.
    pub alpha: Alpha,
    /// How long a task runs before the next has its turn; also the most that a loan moves.
    pub slice: Duration,
    /// How many slices a machine may owe, or be owed; one for each of its vCPUs where it has more.
    pub owe_slices: u32,
    /// What a virtual machine is.
    pub vm_by: VmBy,
    /// For how long a task may be ready and not run before the kernel takes all tasks back.
    pub watchdog: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mode: Mode::Adaptive,
            alpha: Alpha::THESIS,
            slice: default_slice(),
            owe_slices: 4,
            vm_by: VmBy::Names,
            watchdog: Duration::from_secs(20),
        }
    }
}

/// As long as the kernel's own class lets a task run: its `base_slice_ns`, which grows with the number
/// of CPUs.
#[must_use]
pub fn default_slice() -> Duration {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    Duration::from_nanos(Granularity::linux_2_6_34(cpus).eevdf_slice())
}

impl Config {
    /// From which distance on something is done: none is allowed in mode `strict`.
    #[must_use]
    pub fn threshold(&self) -> Alpha {
        if self.mode == Mode::Strict { Alpha::ZERO } else { self.alpha }
    }

    /// Whether the values make sense together.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] with the value that does not.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(Duration::from_micros(100)..=Duration::from_millis(100)).contains(&self.slice) {
            return Err(ConfigError::Slice(self.slice));
        }
        if !(1..=64).contains(&self.owe_slices) {
            return Err(ConfigError::OweSlices(self.owe_slices));
        }
        if !(Duration::from_secs(1)..=Duration::from_secs(30)).contains(&self.watchdog) {
            return Err(ConfigError::Watchdog(self.watchdog));
        }
        Ok(())
    }
}

/// A configuration that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Not a way to tell virtual machines.
    #[error(
        "'{0}' does not say what a virtual machine is: names, process:NAME (at most 15 bytes), \
         tgid:N,... or cgroup:/sys/fs/cgroup/PATH,..."
    )]
    VmBy(String),
    /// Too short to be worth a switch, or too long for those who wait.
    #[error("a slice of {0:?} is not between 100 µs and 100 ms")]
    Slice(Duration),
    /// Not a bound.
    #[error("a machine may owe 1 to 64 slices, not {0}")]
    OweSlices(u32),
    /// Longer than the kernel allows, or so short that a busy machine is taken for a stalled one.
    #[error("the watchdog waits 1 to 30 s, not {0:?}")]
    Watchdog(Duration),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_virtual_machine_is_named_in_one_of_four_ways() {
        assert_eq!("names".parse(), Ok(VmBy::Names));
        assert_eq!("process:a b".parse(), Ok(VmBy::Process("a b".to_owned())));
        assert_eq!("tgid:1,22".parse(), Ok(VmBy::Tgid(vec![1, 22])));
        let group = PathBuf::from("/sys/fs/cgroup/a");
        assert_eq!("cgroup:/sys/fs/cgroup/a".parse(), Ok(VmBy::Cgroup(vec![group])));
        let long = format!("process:{}", "x".repeat(16));
        for wrong in ["", "name", "process:", &long, "tgid:", "tgid:0", "tgid:a", "cgroup:a", "x:y"]
        {
            assert!(wrong.parse::<VmBy>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(Config::default().validate(), Ok(()));
        let mut config = Config { slice: Duration::ZERO, ..Config::default() };
        assert!(matches!(config.validate(), Err(ConfigError::Slice(_))));
        config.slice = Duration::from_secs(1);
        assert!(matches!(config.validate(), Err(ConfigError::Slice(_))));
        config = Config { owe_slices: 0, ..Config::default() };
        assert!(matches!(config.validate(), Err(ConfigError::OweSlices(0))));
        config = Config { watchdog: Duration::from_secs(31), ..Config::default() };
        assert!(matches!(config.validate(), Err(ConfigError::Watchdog(_))));
    }
}
