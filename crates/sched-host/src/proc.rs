//! What the kernel tells of threads under `/proc`, read with bounds.
//!
//! Every text here may be chosen by somebody else: a thread's name holds what it likes (spaces,
//! parentheses, line ends), a directory may vanish between two reads, and a number may stand for
//! another thread by the time it is used. So files are read up to a limit, nothing is unwrapped,
//! and a thread is known by its number *and* its start time.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags, open, openat};

use crate::cpus::CpuSet;

/// The most of one file of `/proc` that is read, bytes.
const FILE_LIMIT: u64 = 1024 * 1024;

/// One thread, never confused with a later one that got its number.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct ThreadId {
    /// The process it belongs to.
    pub pid: i32,
    /// Its own number.
    pub tid: i32,
    /// When it started, clock ticks since boot (field 22 of `stat`).
    pub start: u64,
}

/// What `/proc/<tid>/stat` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// The thread's name, at most 15 bytes of anything.
    pub name: Vec<u8>,
    /// `R`: runs or waits for a pCPU; `S`, `D`, `T`, `Z`, `I`, ...: does not.
    pub state: u8,
    /// When it started, clock ticks since boot.
    pub start: u64,
    /// The pCPU on whose queue it stands, or stood last.
    pub cpu: usize,
}

/// What `/proc/<tid>/schedstat` says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedStat {
    /// Time on a pCPU, nanoseconds.
    pub run_ns: u64,
    /// Time ready and waiting for a pCPU, nanoseconds. A wait that has not ended is not in it.
    pub wait_ns: u64,
    /// How often it was put on a pCPU.
    pub times: u64,
}

/// What `/proc/<tid>/sched` says of a thread's place in its queue.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Position {
    /// When it was last put on or taken off a pCPU, milliseconds of that pCPU's clock.
    pub exec_start_ms: f64,
    /// Its virtual runtime, milliseconds; comparable within one group of threads only.
    pub vruntime_ms: f64,
}

/// Reads `stat`. The name is what stands between the first `(` and the last `)`.
#[must_use]
pub fn parse_stat(text: &[u8]) -> Option<Stat> {
    let open = text.iter().position(|b| *b == b'(')?;
    let close = text.iter().rposition(|b| *b == b')')?;
    let name = text.get(open + 1..close)?.to_vec();
    let rest = std::str::from_utf8(text.get(close + 1..)?).ok()?;
    // The state is field 3 of `proc_pid_stat(5)`.
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let field = |n: usize| fields.get(n - 3).copied();
    let cpu: usize = field(39)?.parse().ok()?;
    Some(Stat {
        name,
        state: *field(3)?.as_bytes().first()?,
        start: field(22)?.parse().ok()?,
        cpu: Some(cpu).filter(|c| *c < crate::cpus::MAX_CPUS)?,
    })
}

/// Reads `schedstat`.
#[must_use]
pub fn parse_schedstat(text: &[u8]) -> Option<SchedStat> {
    let text = std::str::from_utf8(text).ok()?;
    let mut fields = text.split_ascii_whitespace().map(|f| f.parse::<u64>().ok());
    Some(SchedStat { run_ns: fields.next()??, wait_ns: fields.next()??, times: fields.next()?? })
}

/// Reads `sched`. Its first line holds the thread's name, which may hold line ends and look like
/// any other line; so only what follows the line of dashes counts.
#[must_use]
pub fn parse_sched(text: &[u8]) -> Option<Position> {
    let text = String::from_utf8_lossy(text);
    let body = text.rsplit_once("\n-----").map_or("", |(_, body)| body);
    let value = |key: &str| -> Option<f64> {
        body.lines().find_map(|line| {
            let (k, v) = line.split_once(':')?;
            (k.trim() == key).then(|| v.trim().parse::<f64>().ok().filter(|n| n.is_finite()))?
        })
    };
    Some(Position { exec_start_ms: value("se.exec_start")?, vruntime_ms: value("se.vruntime")? })
}

/// The number of a vCPU whose thread has this name: `CPU n/KVM` and `CPU n/TCG` (QEMU with
/// `debug-threads=on`), `vcpuN` (cloud-hypervisor), `fc_vcpu N` (Firecracker).
#[must_use]
pub fn vcpu_name(name: &[u8]) -> Option<(u32, VcpuName)> {
    let name = std::str::from_utf8(name).ok()?;
    let number = |text: &str| -> Option<u32> {
        let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        plain.then(|| text.parse().ok())?.filter(|n| *n < crate::discover::MAX_VCPUS)
    };
    if let Some(rest) = name.strip_prefix("CPU ") {
        if let Some(n) = rest.strip_suffix("/KVM") {
            return Some((number(n)?, VcpuName::QemuKvm));
        }
        return Some((number(rest.strip_suffix("/TCG")?)?, VcpuName::QemuTcg));
    }
    if let Some(rest) = name.strip_prefix("fc_vcpu ") {
        return Some((number(rest)?, VcpuName::Rust));
    }
    Some((number(name.strip_prefix("vcpu")?)?, VcpuName::Rust))
}

/// Whose manner of naming vCPU threads it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VcpuName {
    /// QEMU's under KVM.
    QemuKvm,
    /// QEMU's under emulation.
    QemuTcg,
    /// Cloud Hypervisor's and Firecracker's, which have only KVM.
    Rust,
}

/// One thread's directory under `/proc`, held open: when the thread has ended every read fails,
/// even if its number was given to another.
#[derive(Debug)]
pub struct Thread {
    dir: OwnedFd,
    id: ThreadId,
}

impl Thread {
    /// Opens the thread `tid` of process `pid` as it is now.
    ///
    /// # Errors
    /// When there is none, or it can't be read.
    pub fn open(pid: i32, tid: i32) -> io::Result<Self> {
        let path = format!("/proc/{pid}/task/{tid}");
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = open(path, flags, Mode::empty())?;
        let mut thread = Self { dir, id: ThreadId { pid, tid, start: 0 } };
        thread.id.start = thread.stat()?.start;
        Ok(thread)
    }

    /// Opens a thread that was seen before; `None` when it has ended.
    #[must_use]
    pub fn reopen(id: ThreadId) -> Option<Self> {
        Self::open(id.pid, id.tid).ok().filter(|t| t.id == id)
    }

    /// Which one.
    #[must_use]
    pub const fn id(&self) -> ThreadId {
        self.id
    }

    /// Whether it still lives (a zombie does not).
    #[must_use]
    pub fn lives(&self) -> bool {
        self.stat().is_ok_and(|s| s.start == self.id.start && !matches!(s.state, b'Z' | b'X'))
    }

    /// # Errors
    /// When the thread has ended.
    pub fn stat(&self) -> io::Result<Stat> {
        let text = self.read("stat", 4096)?;
        parse_stat(&text).ok_or_else(|| unreadable("stat", self.id.tid))
    }

    /// # Errors
    /// When the thread has ended, or the kernel keeps no such account.
    pub fn schedstat(&self) -> io::Result<SchedStat> {
        let text = self.read("schedstat", 256)?;
        parse_schedstat(&text).ok_or_else(|| unreadable("schedstat", self.id.tid))
    }

    /// # Errors
    /// When the thread has ended, or the kernel keeps no such account.
    pub fn position(&self) -> io::Result<Position> {
        let text = self.read("sched", 16 * 1024)?;
        parse_sched(&text).ok_or_else(|| unreadable("sched", self.id.tid))
    }

    /// Its control groups, as the kernel lists them.
    ///
    /// # Errors
    /// When the thread has ended.
    pub fn cgroups(&self) -> io::Result<String> {
        Ok(String::from_utf8_lossy(&self.read("cgroup", FILE_LIMIT)?).into_owned())
    }

    fn read(&self, name: &str, limit: u64) -> io::Result<Vec<u8>> {
        let fd = openat(self.dir.as_fd(), name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut text = Vec::new();
        File::from(fd).take(limit).read_to_end(&mut text)?;
        Ok(text)
    }
}

fn unreadable(file: &str, tid: i32) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{tid}/{file} is not as expected"))
}

/// Reads a file of `/proc`, `/sys` or a control group, up to a limit.
///
/// # Errors
/// As opening and reading.
pub fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(FILE_LIMIT).read_to_end(&mut text)?;
    Ok(text)
}

/// The numbers among the names of a directory, at most `limit` of them, in no order.
///
/// # Errors
/// When the directory can't be read.
pub fn numbers_in(dir: &Path, limit: usize) -> io::Result<Vec<i32>> {
    let number = |name: &OsStr| std::str::from_utf8(name.as_bytes()).ok()?.parse::<i32>().ok();
    Ok(std::fs::read_dir(dir)?
        .filter_map(Result::ok)
        .filter_map(|e| number(&e.file_name()))
        .filter(|n| *n > 0)
        .take(limit)
        .collect())
}

/// The pCPUs that are online.
///
/// # Errors
/// When the kernel does not say.
pub fn online() -> io::Result<CpuSet> {
    let text = read_bounded(Path::new("/sys/devices/system/cpu/online"))?;
    String::from_utf8_lossy(&text).parse().map_err(io::Error::other)
}

/// Time that each pCPU was not idle since boot, clock ticks, from the text of `/proc/stat`; and
/// time that the hypervisor below this host took (steal).
#[must_use]
pub fn parse_cpu_times(text: &str) -> Vec<(usize, CpuTime)> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.strip_prefix("cpu")?.split_ascii_whitespace();
            let cpu: usize = fields.next().filter(|_| !line.starts_with("cpu "))?.parse().ok()?;
            let v: Vec<u64> = fields.map_while(|f| f.parse().ok()).collect();
            // user nice system idle iowait irq softirq steal; guest is in user already.
            let at = |i: usize| v.get(i).copied().unwrap_or(0);
            let busy = [0, 1, 2, 5, 6].into_iter().map(at).fold(0, u64::saturating_add);
            (v.len() >= 8 && cpu < crate::cpus::MAX_CPUS)
                .then(|| (cpu, CpuTime { busy_ticks: busy, steal_ticks: at(7) }))
        })
        .collect()
}

/// One pCPU's account.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// Time it ran something, clock ticks.
    pub busy_ticks: u64,
    /// Time it was taken away by a hypervisor below, clock ticks.
    pub steal_ticks: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stat_line(name: &[u8]) -> Vec<u8> {
        let mut line = b"4711 (".to_vec();
        line.extend_from_slice(name);
        line.extend_from_slice(b") R 1 2 3 0 -1 4194304 5 0 0 0 9 8 0 0 20 0 3 0 77123 1 2");
        // Fields 25 to 38, then the pCPU.
        line.extend_from_slice(b" 3 4 5 6 7 8 9 10 11 12 13 14 15 17 1 0 0 0 0 0 0\n");
        line
    }

    #[test]
    fn a_name_may_hold_anything() {
        for name in [&b"CPU 0/TCG"[..], b"a) R 1 (b", b"x\ny z", b"", b")))((", b"\xff\xfe"] {
            let stat = parse_stat(&stat_line(name)).expect("a stat line");
            assert_eq!(stat.name, name);
            assert_eq!((stat.state, stat.start, stat.cpu), (b'R', 77123, 1));
        }
    }

    #[test]
    fn vcpus_are_known_by_name() {
        assert_eq!(vcpu_name(b"CPU 3/TCG"), Some((3, VcpuName::QemuTcg)));
        assert_eq!(vcpu_name(b"CPU 12/KVM"), Some((12, VcpuName::QemuKvm)));
        assert_eq!(vcpu_name(b"vcpu7"), Some((7, VcpuName::Rust)));
        assert_eq!(vcpu_name(b"fc_vcpu 0"), Some((0, VcpuName::Rust)));
        for other in [
            &b"CPU /TCG"[..],
            b"CPU 1/XEN",
            b"vcpu",
            b"vcpu-1",
            b"vcpu99999",
            b"CPU +1/KVM",
            b"\xff",
        ] {
            assert_eq!(vcpu_name(other), None, "{other:?}");
        }
    }

    #[test]
    fn a_name_cannot_forge_its_own_position() {
        let text = b"x\nse.vruntime : 1.0\n------\nse.vruntime : 2.0 (7, #threads: 1)\n\
            -------------------------------------------------------------------\n\
            se.exec_start                                :      61054613.981874\n\
            se.vruntime                                  :          -269.292114\n";
        let position = parse_sched(text).expect("a position");
        assert!((position.vruntime_ms + 269.292_114).abs() < 1e-9);
        assert!((position.exec_start_ms - 61_054_613.981_874).abs() < 1e-6);
    }

    #[test]
    fn own_account_is_readable() {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let thread = Thread::open(pid, pid).expect("the main thread");
        assert!(thread.lives());
        assert_eq!(Thread::reopen(thread.id()).map(|t| t.id()), Some(thread.id()));
        let other = ThreadId { start: thread.id().start + 1, ..thread.id() };
        assert!(Thread::reopen(other).is_none());
        assert!(thread.schedstat().is_ok());
        assert!(!online().expect("online pCPUs").is_empty());
        let text = read_bounded(Path::new("/proc/stat")).expect("/proc/stat");
        assert!(!parse_cpu_times(&String::from_utf8_lossy(&text)).is_empty());
    }

    #[test]
    fn a_thread_that_ended_is_not_read_again() {
        let (told, hear) = std::sync::mpsc::channel();
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let worker = std::thread::spawn(move || {
            told.send(rustix::thread::gettid().as_raw_nonzero().get()).expect("somebody listens");
            let _ = wait.recv();
        });
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let thread = Thread::open(pid, hear.recv().expect("a number")).expect("it lives");
        assert!(thread.lives());
        drop(end);
        worker.join().expect("it ended");
        // join() returns when the thread's memory is free, a moment before its number is.
        while thread.lives() {
            std::thread::yield_now();
        }
        assert!(thread.stat().is_err());
    }

    proptest! {
        #[test]
        fn no_text_brings_a_parser_down(text in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = parse_stat(&text);
            let _ = parse_schedstat(&text);
            let _ = parse_sched(&text);
            let _ = vcpu_name(&text);
            let _ = parse_cpu_times(&String::from_utf8_lossy(&text));
        }

        #[test]
        fn any_name_leaves_the_fields_alone(name in proptest::collection::vec(any::<u8>(), 0..16)) {
            let stat = parse_stat(&stat_line(&name)).expect("a stat line");
            prop_assert_eq!((stat.name, stat.start, stat.cpu), (name, 77123, 1));
        }
    }
}
