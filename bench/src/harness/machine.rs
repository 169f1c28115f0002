//! Where a run took place.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// The machine that measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// Processor model.
    pub cpu: String,
    /// Processors that this process may use.
    pub cores: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Kernel release.
    pub kernel: String,
    /// Distribution.
    pub os: String,
    /// First line of `qemu-system-x86_64 --version`; none where it is not installed.
    pub qemu: Option<String>,
    /// Whether the measuring program was built with optimisation.
    pub optimised: bool,
}

fn field(text: &str, key: &str, separator: char) -> Option<String> {
    text.lines().find_map(|l| {
        let (k, v) = l.split_once(separator)?;
        (k.trim() == key).then(|| v.trim().trim_matches('"').to_owned())
    })
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn first_line(program: &str, args: &[&str]) -> Option<String> {
    let out = Command::new(program).args(args).output().ok().filter(|o| o.status.success())?;
    String::from_utf8_lossy(&out.stdout).lines().next().map(|l| l.trim().to_owned())
}

impl MachineInfo {
    /// Asks this machine. What it does not tell is `unknown` or 0.
    #[must_use]
    pub fn here() -> Self {
        let unknown = || "unknown".to_owned();
        let memory = field(&read("/proc/meminfo"), "MemTotal", ':');
        let kib = memory.and_then(|m| m.split_whitespace().next()?.parse::<u64>().ok());
        Self {
            cpu: field(&read("/proc/cpuinfo"), "model name", ':').unwrap_or_else(unknown),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: kib.unwrap_or(0) / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            os: field(&read("/etc/os-release"), "PRETTY_NAME", '=').unwrap_or_else(unknown),
            qemu: first_line("qemu-system-x86_64", &["--version"]),
            optimised: !cfg!(debug_assertions),
        }
    }
}

/// The commit that `dir` is at, with `+` when files differ from it; none outside a repository.
#[must_use]
pub fn git_revision(dir: &Path) -> Option<String> {
    let dir = dir.to_str()?;
    let mut rev = first_line("git", &["-C", dir, "rev-parse", "--short=12", "HEAD"])?;
    if first_line("git", &["-C", dir, "status", "--porcelain"]).is_some_and(|l| !l.is_empty()) {
        rev.push('+');
    }
    Some(rev)
}
