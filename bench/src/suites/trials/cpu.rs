//! Where processor time goes, by what the kernel accounts.

use std::path::Path;

/// Processor time in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Cpu {
    /// Of threads that are a guest's vCPU: what the guest does, emulated.
    pub vcpus: f64,
    /// Of the rest of those processes.
    pub rest: f64,
}

impl std::ops::Sub for Cpu {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self { vcpus: self.vcpus - before.vcpus, rest: self.rest - before.rest }
    }
}

impl std::iter::Sum for Cpu {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |a, b| Self { vcpus: a.vcpus + b.vcpus, rest: a.rest + b.rest })
    }
}

/// Milliseconds of one of the kernel's ticks for user programs, everywhere that Linux runs QEMU.
const TICK_MS: f64 = 10.0;

/// User and system time of a process and of its children that were waited for, from its `stat`.
fn ticks(stat: &str) -> Option<(f64, f64)> {
    // The name may hold blanks and parentheses; fields count from after it.
    let after = &stat[stat.rfind(')')? + 1..];
    let fields: Vec<f64> = after.split_whitespace().map(|f| f.parse().unwrap_or(0.0)).collect();
    let sum = |from: usize| Some((fields.get(from)? + fields.get(from + 1)?) * TICK_MS);
    Some((sum(11)?, sum(13)?))
}

/// What a process has taken since its start; nothing when it is gone.
pub(super) fn of(pid: i64) -> Cpu {
    let stat = |dir: &Path| std::fs::read_to_string(dir.join("stat")).ok();
    let own = |dir: &Path| ticks(&stat(dir)?).map(|t| t.0);
    let dir = Path::new("/proc").join(pid.to_string());
    let threads = std::fs::read_dir(dir.join("task")).into_iter().flatten().flatten();
    let is_vcpu = |dir: &Path| {
        std::fs::read_to_string(dir.join("comm")).is_ok_and(|name| name.starts_with("CPU "))
    };
    let vcpus: f64 = threads.map(|t| t.path()).filter(|t| is_vcpu(t)).filter_map(|t| own(&t)).sum();
    Cpu { vcpus, rest: (own(&dir).unwrap_or_default() - vcpus).max(0.0) }
}

/// What the commands took that this process has started and waited for.
pub(super) fn of_commands() -> f64 {
    std::fs::read_to_string("/proc/self/stat").ok().and_then(|s| ticks(&s)).map_or(0.0, |t| t.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_the_kernel_writes_them() {
        let stat = "12 (a ) b) S 1 12 12 0 -1 4194304 99 0 0 0 7 3 20 10 20 0 4 0 123";
        assert_eq!(ticks(stat), Some((100.0, 300.0)));
        assert_eq!(ticks("nonsense"), None);
        assert!(of(std::process::id().into()).vcpus == 0.0);
        assert_eq!(of(-1), Cpu::default());
    }
}
