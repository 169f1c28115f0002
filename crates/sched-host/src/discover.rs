//! Which processes of this host are virtual machines, and which of their threads are vCPUs.
//!
//! **The rule.** A thread's name alone proves nothing: anybody may name a thread `CPU 0/KVM`. A
//! process is a machine when it has threads with vCPU names *and*
//! - it holds a KVM vCPU (`anon_inode:kvm-vcpu:N` among its files), whatever its program; or
//! - its program is `qemu-system-*` and the threads are named as QEMU's emulator names them.
//!
//! Where the files of a process may not be read, the names of the known programs count
//! (`qemu-system-*`, `qemu-kvm`, `cloud-hypervisor`, `firecracker`). Who goes so far as to call their
//! own program `qemu-system-x` gets what a machine gets, and that is no more than anybody can have by a
//! session of its own: a group with the weight of one thread, and loans among its own threads.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::proc::{Thread, ThreadId, VcpuName, numbers_in, read_bounded, vcpu_name};

/// vCPUs of one machine that are understood; QEMU's own limit is below.
pub const MAX_VCPUS: u32 = 4096;
/// Processes that one scan looks at: the kernel's default limit of numbers.
const MAX_PROCESSES: usize = 65_536;
/// Threads of one process that one scan looks at.
const MAX_THREADS: usize = 8192;
/// Machines that are looked after.
pub const MAX_VMS: usize = 4096;
/// After how many scans a process of an unknown program is looked at again.
const FORGET_AFTER_SCANS: u64 = 16;

/// A machine's process.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct VmId {
    /// Its number.
    pub pid: i32,
    /// When its main thread started, clock ticks since boot.
    pub start: u64,
}

/// A machine.
#[derive(Debug)]
pub struct Vm {
    /// Its process.
    pub id: VmId,
    /// What it calls itself (`-name`), or its program; printable, at most 40 characters.
    pub name: String,
    /// Its vCPUs by number.
    pub vcpus: BTreeMap<u32, Thread>,
}

/// Looks for machines. Keeps what it learned of processes that are none, so that a host with
/// thousands of them is scanned cheaply.
#[derive(Debug, Default)]
pub struct Discovery {
    only: Option<Vec<i32>>,
    mark: Option<String>,
    /// Processes of unknown programs that were no machines, and in which scan that was seen.
    not_vms: HashMap<VmId, u64>,
    scans: u64,
}

/// What a program's name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Program {
    QemuSystem,
    KnownVmm,
    Other,
}

fn program(exe: &Path) -> Program {
    let name = exe.file_name().unwrap_or_default().as_bytes();
    // A program that was replaced while it runs, as an update does.
    let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
    match name {
        n if n.starts_with(b"qemu-system-") => Program::QemuSystem,
        b"qemu-kvm" | b"kvm" | b"cloud-hypervisor" | b"firecracker" => Program::KnownVmm,
        _ => Program::Other,
    }
}

/// Whether a process is a machine.
///
/// `kvm` says whether it holds a KVM vCPU; `None` when its files may not be read.
fn is_machine(program: Program, names: VcpuName, kvm: Option<bool>) -> bool {
    match (program, names, kvm) {
        (_, VcpuName::QemuKvm | VcpuName::Rust, Some(held)) => held,
        (Program::QemuSystem, VcpuName::QemuTcg, _) => true,
        (Program::QemuSystem | Program::KnownVmm, VcpuName::QemuKvm | VcpuName::Rust, None) => true,
        (_, VcpuName::QemuTcg, _) | (Program::Other, _, None) => false,
    }
}

impl Discovery {
    /// Looks at all processes, or only at some.
    #[must_use]
    pub fn new(only: Option<Vec<i32>>) -> Self {
        Self { only, ..Self::default() }
    }

    /// Looks only at processes that were started with the variable `mark` in their environment.
    #[must_use]
    pub fn marked(mut self, mark: Option<String>) -> Self {
        self.mark = mark;
        self
    }

    /// Finds the machines that run now, by process number. A process that ends meanwhile is left
    /// out.
    ///
    /// # Errors
    /// When `/proc` can't be read.
    pub fn scan(&mut self) -> io::Result<Vec<Vm>> {
        self.scans += 1;
        let mut pids = match &self.only {
            Some(pids) => pids.clone(),
            None => numbers_in(Path::new("/proc"), MAX_PROCESSES)?,
        };
        pids.sort_unstable();
        let mut found = Vec::new();
        for pid in pids {
            if let Ok(Some(vm)) = self.look_at(pid) {
                found.push(vm);
            }
            if found.len() == MAX_VMS {
                tracing::warn!("more than {MAX_VMS} machines; the rest is left alone");
                break;
            }
        }
        let oldest = self.scans.saturating_sub(FORGET_AFTER_SCANS);
        self.not_vms.retain(|_, seen| *seen > oldest);
        Ok(found)
    }

    /// How many processes are remembered as no machines.
    #[must_use]
    pub fn remembered(&self) -> usize {
        self.not_vms.len()
    }

    fn look_at(&mut self, pid: i32) -> io::Result<Option<Vm>> {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        // A kernel thread has no program.
        let Ok(exe) = std::fs::read_link(dir.join("exe")) else { return Ok(None) };
        let program = program(&exe);
        let main = Thread::open(pid, pid)?;
        let id = VmId { pid, start: main.id().start };
        if program == Program::Other && self.not_vms.contains_key(&id) {
            return Ok(None);
        }
        let threads = vcpu_threads(&dir, pid)?;
        if !threads.is_empty() && !self.mark.as_ref().is_none_or(|mark| has_variable(&dir, mark)) {
            return Ok(None);
        }
        let machine = threads.first().is_some_and(|(_, _, names)| {
            let kvm = (*names != VcpuName::QemuTcg).then(|| holds_kvm_vcpu(&dir)).flatten();
            is_machine(program, *names, kvm)
        });
        if !machine {
            if program == Program::Other {
                self.not_vms.insert(id, self.scans);
            }
            return Ok(None);
        }
        let mut vcpus = BTreeMap::new();
        for (number, tid, _) in threads {
            // Two threads of one number: one of them only says so. Neither is believed more.
            if let Ok(thread) = Thread::open(pid, tid) {
                vcpus.entry(number).or_insert(thread);
            }
        }
        Ok((!vcpus.is_empty()).then(|| Vm { id, name: name_of(&dir, &exe), vcpus }))
    }
}

/// The threads that are named like vCPUs, all in the manner of the first.
fn vcpu_threads(dir: &Path, pid: i32) -> io::Result<Vec<(u32, i32, VcpuName)>> {
    let mut tids = numbers_in(&dir.join("task"), MAX_THREADS)?;
    tids.sort_unstable();
    let mut threads: Vec<(u32, i32, VcpuName)> = tids
        .into_iter()
        .filter_map(|tid| {
            let comm = read_bounded(Path::new(&format!("/proc/{pid}/task/{tid}/comm"))).ok()?;
            // The file is the name and a line end; the name itself may hold others.
            let (number, names) = vcpu_name(comm.strip_suffix(b"\n").unwrap_or(&comm))?;
            Some((number, tid, names))
        })
        .collect();
    if let Some((_, _, manner)) = threads.first().copied() {
        threads.retain(|(_, _, m)| *m == manner);
    }
    Ok(threads)
}

/// Whether a process was started with a variable in its environment; not where that can't be read.
fn has_variable(dir: &Path, name: &str) -> bool {
    let environment = read_bounded(&dir.join("environ")).unwrap_or_default();
    environment
        .split(|b| *b == 0)
        .any(|v| v.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.starts_with(b"=")))
}

fn holds_kvm_vcpu(dir: &Path) -> Option<bool> {
    let files = std::fs::read_dir(dir.join("fd")).ok()?;
    Some(files.filter_map(Result::ok).take(MAX_THREADS * 4).any(|entry| {
        std::fs::read_link(entry.path())
            .is_ok_and(|to| to.as_os_str().as_bytes().starts_with(b"anon_inode:kvm-vcpu:"))
    }))
}

/// A machine's name: the value of `-name`, without its options.
fn name_of(dir: &Path, exe: &Path) -> String {
    let line = read_bounded(&dir.join("cmdline")).unwrap_or_default();
    let mut args = line.split(|b| *b == 0);
    let given = args.by_ref().find(|a| *a == b"-name" || *a == b"--name").and_then(|_| args.next());
    let name = given.map(|value| {
        let mut parts = value.split(|b| *b == b',');
        let first = parts.clone().find_map(|p| p.strip_prefix(b"guest="));
        first.or_else(|| parts.next()).unwrap_or_default().to_vec()
    });
    let name =
        name.unwrap_or_else(|| exe.file_name().unwrap_or(OsStr::new("?")).as_bytes().to_vec());
    let printable = |c: char| if c.is_control() || c == '\u{fffd}' { '?' } else { c };
    String::from_utf8_lossy(&name).chars().map(printable).take(40).collect()
}

/// The vCPUs of a machine, as ids.
impl Vm {
    /// Its threads.
    pub fn threads(&self) -> impl Iterator<Item = ThreadId> + '_ {
        self.vcpus.values().map(Thread::id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_alone_makes_no_machine() {
        use Program::{KnownVmm, Other, QemuSystem};
        use VcpuName::{QemuKvm, QemuTcg, Rust};
        for kvm in [None, Some(false)] {
            assert!(!is_machine(Other, QemuKvm, kvm));
            assert!(!is_machine(Other, Rust, kvm));
            assert!(!is_machine(Other, QemuTcg, kvm));
        }
        assert!(is_machine(Other, Rust, Some(true)));
        assert!(is_machine(QemuSystem, QemuTcg, Some(false)));
        assert!(!is_machine(KnownVmm, QemuTcg, None));
        assert!(!is_machine(QemuSystem, QemuKvm, Some(false)));
        assert!(is_machine(KnownVmm, Rust, None));
    }

    #[test]
    fn a_mark_is_a_variable_of_the_environment() {
        let dir = Path::new("/proc/self");
        assert!(has_variable(dir, "PATH"));
        assert!(!has_variable(dir, "PAT"));
        assert!(!has_variable(Path::new("/proc/nobody"), "PATH"));
    }

    #[test]
    fn programs_are_known_by_their_last_name() {
        assert_eq!(program(Path::new("/usr/bin/qemu-system-x86_64")), Program::QemuSystem);
        assert_eq!(
            program(Path::new("/usr/bin/qemu-system-aarch64 (deleted)")),
            Program::QemuSystem
        );
        assert_eq!(program(Path::new("/opt/cloud-hypervisor")), Program::KnownVmm);
        assert_eq!(program(Path::new("/qemu-system-x86_64/sh")), Program::Other);
    }

    #[test]
    fn a_thread_that_names_itself_a_vcpu_is_not_believed() {
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let (told, hear) = std::sync::mpsc::channel();
        let poser = std::thread::Builder::new().name("CPU 0/TCG".into()).spawn(move || {
            told.send(()).expect("somebody listens");
            let _ = wait.recv();
        });
        hear.recv().expect("it runs");
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let threads = vcpu_threads(Path::new("/proc/self"), pid).expect("own threads");
        assert!(!threads.is_empty(), "its name is one of a vCPU");
        let mut discovery = Discovery::new(Some(vec![pid]));
        assert!(discovery.scan().expect("a scan").is_empty());
        assert_eq!(discovery.remembered(), 1);
        drop(end);
        poser.expect("a thread").join().expect("it ended");
    }
}
