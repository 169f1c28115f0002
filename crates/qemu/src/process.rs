//! A QEMU process seen from outside: whether it is still the one that was started, when it ended
//! and why.

use std::fmt;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::Path;

use godwit_types::Mib;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

/// One process, told apart from a later one with the same pid by its start time and boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its pid.
    pub pid: i32,
    /// When it started, in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id` of the boot it belongs to.
    pub boot_id: String,
}

/// How a QEMU ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Exit status, when it was our child and ended by itself.
    pub code: Option<i32>,
    /// The signal that ended it, when it was our child.
    pub signal: Option<i32>,
    /// The memory limit that it outgrew, so that the kernel ended it.
    pub outgrew: Option<Mib>,
    /// The last lines of QEMU's log, at most 2 KiB.
    pub log: String,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(limit) = self.outgrew {
            return write!(f, "by the kernel: it wanted more than its {limit} of memory");
        }
        match (self.code, self.signal) {
            (Some(0), _) => f.write_str("by itself")?,
            (Some(code), _) => write!(f, "with status {code}")?,
            (_, Some(signal)) => write!(f, "by signal {signal}")?,
            _ => f.write_str("while nobody watched")?,
        }
        match self.log.trim() {
            "" => Ok(()),
            log => write!(f, "; its last words: {log}"),
        }
    }
}

impl Exit {
    /// The longest piece of QEMU's own words in [`Exit::brief`], in characters.
    const BRIEF: usize = 160;

    /// How it ended in half a line: the last thing that it said, and no more of it.
    #[must_use]
    pub fn brief(&self) -> String {
        if let Some(limit) = self.outgrew {
            return format!("its QEMU was ended: it wanted more than its {limit} of memory");
        }
        if let Some(signal) = self.signal {
            return format!("its QEMU was ended by signal {signal}");
        }
        let last = self.log.rsplit(" | ").next().unwrap_or_default().trim();
        if last.is_empty() {
            return "its QEMU ended".to_owned();
        }
        let cut: String = last.chars().take(Self::BRIEF).collect();
        let more = if cut.len() < last.len() { "..." } else { "" };
        format!("its QEMU ended: {cut}{more}")
    }
}

impl Process {
    /// Describes the process `pid`.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(pid: i32) -> std::io::Result<Self> {
        Ok(Self { pid, start_ticks: start_ticks(pid)?, boot_id: boot_id()? })
    }

    /// Whether it still runs (a zombie does not).
    #[must_use]
    pub fn is_alive(&self) -> bool {
        boot_id().is_ok_and(|b| b == self.boot_id)
            && start_ticks(self.pid).is_ok_and(|t| t == self.start_ticks)
    }

    /// A handle that later pids cannot be mistaken for; `None` when the process is gone.
    #[must_use]
    pub fn handle(&self) -> Option<OwnedFd> {
        let fd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        // Only now is the comparison free of a race with reuse of the pid.
        self.is_alive().then_some(fd)
    }

    /// Ends it with SIGKILL; nothing happens when it is gone.
    pub fn kill(&self) {
        if let Some(fd) = self.handle() {
            // It may end between the check and the signal.
            let _ = pidfd_send_signal(fd, Signal::KILL);
        }
    }

    /// Waits until it has ended.
    pub async fn ended(&self) {
        let Some(fd) = self.handle() else { return };
        // SAFETY: the guard owns the pidfd, whose number is the same until it closes it.
        if let Ok(fd) = unsafe { AsyncFd::register(fd) } {
            let _ = fd.readable().await;
        }
    }
}

/// Every QEMU of this host that was started with a file below one of `dirs`, those that no record
/// names included. A QEMU of another site has its files elsewhere.
#[must_use]
pub fn started_below(dirs: &[&Path]) -> Vec<Process> {
    let dirs: Vec<String> = dirs.iter().map(|d| format!("{}/", d.display())).collect();
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            is_qemu_below(&line, &dirs)
        })
        .filter_map(|pid| Process::of(pid).ok())
        .collect()
}

/// Whether the words of a command line, each ended by a zero byte, start a QEMU with a file below
/// one of `dirs`, each of which ends in a slash.
fn is_qemu_below(line: &[u8], dirs: &[String]) -> bool {
    let mut words = line.split(|b| *b == 0).map(String::from_utf8_lossy);
    let program = words.next().unwrap_or_default().into_owned();
    let qemu = program.rsplit('/').next().is_some_and(|n| n.starts_with("qemu-system-"));
    // A path begins a word or follows one of the marks of an option.
    let names = |word: &str, dir: &str| {
        word.match_indices(dir)
            .any(|(at, _)| at == 0 || matches!(word.as_bytes()[at - 1], b'=' | b',' | b':' | b'"'))
    };
    // In an option a comma of a path is written twice.
    qemu && words.any(|w| dirs.iter().any(|d| names(&w, d) || names(&w, &d.replace(',', ",,"))))
}

fn boot_id() -> std::io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Start time of a process that is no zombie.
fn start_ticks(pid: i32) -> std::io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let bad = || std::io::Error::new(std::io::ErrorKind::NotFound, "no such process");
    // The command name may hold blanks and parentheses; fields count from after the last one.
    let after = stat.rfind(')').ok_or_else(bad)?;
    let fields: Vec<&str> = stat[after + 1..].split_whitespace().collect();
    if matches!(fields.first(), None | Some(&"Z" | &"X")) {
        return Err(bad());
    }
    fields.get(19).and_then(|f| f.parse().ok()).ok_or_else(bad)
}

/// The last part of a log file, at most 2 KiB, cleaned of control characters.
pub(crate) fn log_tail(path: &Path) -> String {
    const TAIL: u64 = 2048;
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(TAIL)))?;
        let mut out = Vec::new();
        file.take(TAIL).read_to_end(&mut out)?;
        Ok(out)
    };
    let text = read().unwrap_or_default();
    String::from_utf8_lossy(&text)
        .lines()
        .map(|l| l.chars().filter(|c| !c.is_control()).collect::<String>())
        .filter(|l| !l.trim().is_empty())
        .collect::<Vec<_>>()
        .join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_another_with_its_pid_is_not() {
        let me = Process::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(me.is_alive());
        let later = Process { start_ticks: me.start_ticks + 1, ..me.clone() };
        assert!(!later.is_alive());
        assert!(later.handle().is_none());
        let other_boot = Process { boot_id: "x".into(), ..me };
        assert!(!other_boot.is_alive());
    }

    #[test]
    fn the_end_of_a_qemu_is_reported_in_half_a_line() {
        let noise = "qemu: ram_block_discard_range: Discarding RAM is not supported | ".repeat(30);
        let exit = |signal, log: String| Exit { code: None, signal, outgrew: None, log }.brief();
        assert_eq!(exit(Some(9), noise.clone()), "its QEMU was ended by signal 9");
        assert_eq!(exit(None, format!("{noise}bad disk")), "its QEMU ended: bad disk");
        assert_eq!(exit(None, String::new()), "its QEMU ended");
        assert!(exit(None, "x".repeat(2000)).len() < 200);
        let exit = Exit { code: None, signal: Some(9), outgrew: Some(Mib(300)), log: noise };
        assert!(exit.brief().ends_with("more than its 300 MiB of memory"), "{}", exit.brief());
    }

    #[test]
    fn a_qemu_is_known_by_the_files_that_it_was_started_with() {
        let dirs = ["/r/site/run/".to_owned(), "/dev/shm/site/".to_owned()];
        let below = |words: &[&str]| is_qemu_below(words.join("\0").as_bytes(), &dirs);
        let qemu = "/usr/bin/qemu-system-x86_64";
        assert!(below(&[qemu, "-chardev", "socket,id=a,path=/r/site/run/1/a.sock,server=on"]));
        assert!(below(&[qemu, "-object", "memory-backend-file,mem-path=/dev/shm/site/1"]));
        assert!(below(&["qemu-system-aarch64", "-blockdev", r#"{"filename":"/r/site/run/x"}"#]));
        // Another root that ends alike, another site that begins alike, another program.
        assert!(!below(&[qemu, "-chardev", "socket,path=/other/r/site/run/1/a.sock"]));
        assert!(!below(&[qemu, "-chardev", "socket,path=/r/site/runner/a.sock"]));
        assert!(!below(&["tail", "/r/site/run/1/qemu.log"]));
    }

    #[tokio::test]
    async fn the_end_of_a_process_is_seen_even_before_it_is_reaped() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let p = Process::of(i32::try_from(child.id()).unwrap()).unwrap();
        p.kill();
        tokio::time::timeout(std::time::Duration::from_secs(20), p.ended()).await.unwrap();
        child.wait().unwrap();
        assert!(!p.is_alive());
    }
}
