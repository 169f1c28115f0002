//! Starting a QEMU.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};

use godwit_types::{Arch, Name};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};
use uuid::Uuid;

use crate::accel::Accel;
use crate::args::Inherited;
use crate::confine::{self, Cell, Claim, Confine};
use crate::discard::{self, DiscardSwitch, Preload};
use crate::disk::{DiskChain, Layer};
use crate::error::QemuError;
use crate::group::{MemoryGroup, MemoryGroups};
use crate::machine::{Machine, Record, RunPaths};
use crate::memory::MemoryFile;
use crate::process::Process;
use crate::spec::{MachineSpec, Nic, NicBackend};
use crate::tap::Tap;

/// What QEMU has in its environment when it was started here: the name of its machine. Tells this
/// host's other programs whose machine it is.
pub const MACHINE_VARIABLE: &str = "GODWIT_MACHINE";

/// Whether a QEMU has started on this host only without the library of [`discard`].
static LOADS_NOTHING: AtomicBool = AtomicBool::new(false);

/// What QEMU keeps of this process's environment: where programs are. It may hold secrets, and
/// whoever breaks out of a guest reads it.
fn kept_environment() -> impl Iterator<Item = (&'static str, std::ffi::OsString)> {
    ["PATH"].into_iter().filter_map(|name| Some((name, std::env::var_os(name)?)))
}

/// Where a machine's memory comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemorySource {
    /// The file at `path` is the memory (`share=on`). It is made when it is not there. It stays
    /// when QEMU ends.
    Shared {
        /// A file on tmpfs, or `/proc/PID/fd/N` of a memfd.
        path: PathBuf,
    },
    /// A private copy-on-write mapping of the sealed file at `path`; the file is never written.
    PrivateOf {
        /// A file on tmpfs.
        path: PathBuf,
    },
}

impl MemorySource {
    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Shared { path } | Self::PrivateOf { path } => path,
        }
    }
}

/// What the machine does first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Start {
    /// Boots its kernel.
    Boot,
    /// Waits for a state (`-incoming defer`).
    Incoming,
}

/// The GUID by which a guest learns that it is a copy of what it was. An x86-64 guest that finds
/// another one reseeds its random numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmGenId {
    /// A new one: the guest boots, or it is one of several that go on from one state.
    #[default]
    Fresh,
    /// That of the machine whose only continuation this one is ([`Machine::generation_id`]).
    Keep(Uuid),
}

/// The QEMU programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binaries {
    /// For x86-64 guests.
    pub x86_64: PathBuf,
    /// For arm64 guests.
    pub aarch64: PathBuf,
}

impl Default for Binaries {
    fn default() -> Self {
        Self { x86_64: "qemu-system-x86_64".into(), aarch64: "qemu-system-aarch64".into() }
    }
}

impl Binaries {
    /// The program for guests of `arch`.
    #[must_use]
    pub fn of(&self, arch: Arch) -> &Path {
        match arch {
            Arch::X86_64 => &self.x86_64,
            Arch::Aarch64 => &self.aarch64,
        }
    }
}

/// One start of one machine. [`Launch::new`] gives one that boots under TCG without disk or NIC;
/// the fields say the rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// The machine.
    pub spec: MachineSpec,
    /// Directory for sockets, logs and `machine.json`; made when it is not there. Kept short: a
    /// socket path has at most 107 bytes.
    pub run_dir: PathBuf,
    /// The name shown in the process list.
    pub name: Name,
    /// Its memory.
    pub memory: MemorySource,
    /// Its disk; present exactly when the spec has one.
    pub disk: Option<DiskChain>,
    /// Boot or wait.
    pub start: Start,
    /// The accelerator.
    pub accel: Accel,
    /// NICs that are plugged from the first; an incoming machine lists those that the source had.
    pub nics: Vec<Nic>,
    /// The programs.
    pub binaries: Binaries,
    /// The generation GUID. A machine into which a running one migrates keeps its source's.
    #[serde(default)]
    pub vmgenid: VmGenId,
    /// How its QEMU is kept apart from all else; without it QEMU is this process's user.
    #[serde(default)]
    pub confine: Option<Confine>,
    /// Where its QEMU gets a control group with a memory limit; without it nothing limits it.
    #[serde(default)]
    pub groups: Option<MemoryGroups>,
    /// That group; [`Launch::spawn`] makes it.
    #[serde(default)]
    pub group: Option<MemoryGroup>,
    /// The uid and gid that its QEMU was given; [`Launch::spawn`] chooses it.
    #[serde(default)]
    pub user: Option<u32>,
}

impl Launch {
    /// A machine that boots under TCG without disk or NIC.
    #[must_use]
    pub fn new(spec: MachineSpec, run_dir: PathBuf, name: Name, memory: MemorySource) -> Self {
        Self {
            spec,
            run_dir,
            name,
            memory,
            disk: None,
            start: Start::Boot,
            accel: Accel::Tcg,
            nics: Vec::new(),
            binaries: Binaries::default(),
            vmgenid: VmGenId::Fresh,
            confine: None,
            groups: None,
            group: None,
            user: None,
        }
    }

    /// Starts QEMU in a session of its own and connects to it. A machine that boots is running
    /// when this returns; one that waits is in [`crate::Life::Incoming`].
    ///
    /// QEMU outlives the caller: [`Machine::adopt`] finds it again.
    ///
    /// # Errors
    /// A launch that does not fit its spec, a living machine in the same directory, or a QEMU that
    /// ends at once (with its last words).
    pub async fn spawn(self) -> Result<Machine, QemuError> {
        let preload = match &self.memory {
            MemorySource::PrivateOf { .. } if !LOADS_NOTHING.load(Ordering::Relaxed) => {
                Preload::new()
            }
            _ => None,
        };
        if preload.is_none() {
            return Box::pin(self.spawn_with(None)).await;
        }
        let again = self.clone();
        let failed = match Box::pin(self.spawn_with(preload)).await {
            Ok(machine) if discard::is_loaded(machine.process()) => return Ok(machine),
            // It would write to what all clones share.
            Ok(machine) => {
                machine.kill().await;
                None
            }
            Err(e @ (QemuError::Exited { .. } | QemuError::Qmp(_))) => Some(e),
            Err(e) => return Err(e),
        };
        let machine = Box::pin(again.spawn_with(None)).await;
        let machine = machine.map_err(|e| failed.unwrap_or(e))?;
        tracing::warn!("QEMU loads no library on this host: clones keep what their guests free");
        LOADS_NOTHING.store(true, Ordering::Relaxed);
        Ok(machine)
    }

    async fn spawn_with(mut self, preload: Option<Preload>) -> Result<Machine, QemuError> {
        self.check()?;
        let paths = RunPaths::of(&self.run_dir);
        paths.check(&self.name)?;
        let claim = self.prepare(&paths)?;
        self.user = claim.as_ref().map(|c| c.uid);
        let groups = self.groups.as_ref();
        self.group = groups.map(|g| g.make(&self.spec, &self.memory, self.accel)).transpose()?;
        let started = self.start_process(&paths, preload);
        if let (Err(_), Some(group)) = (&started, &self.group) {
            group.remove();
        }
        let (child, process, discards) = started?;
        // From here on its uid is that of a process.
        drop(claim);
        godwit_hold::at("qemu.started").await;
        let record = Record { process, launch: self };
        if let Err(e) = record.write(&paths) {
            record.process.kill();
            return Err(e);
        }
        Machine::connect_new(record, paths, child, discards).await
    }

    fn check(&self) -> Result<(), QemuError> {
        self.spec.check()?;
        let refuse = |why: String| Err(QemuError::Launch { name: self.name.to_string(), why });
        if self.spec.disk != self.disk.is_some() {
            return refuse("a disk chain is wanted exactly when the spec has a disk".into());
        }
        let mut seen = Vec::new();
        for nic in &self.nics {
            check_nic(nic, &self.spec).or_else(refuse)?;
            if seen.contains(&nic.port) {
                return refuse(format!("two NICs in port {}", nic.port));
            }
            seen.push(nic.port);
        }
        let mut files = vec![self.memory.path(), &self.run_dir, &self.spec.kernel.path];
        files.extend(self.spec.initrd.as_ref().map(|f| f.path.as_path()));
        if let Some(disk) = &self.disk {
            files.push(&disk.top);
            files.extend(disk.layers.iter().map(|l| match &l.layer {
                Layer::Raw { path } | Layer::Qcow2 { path } => path.as_path(),
                Layer::Nbd { socket } => socket.as_path(),
            }));
        }
        if self.confine.is_some() && self.memory.path().starts_with("/proc") {
            return refuse("the memory of a confined machine is a file of its own".into());
        }
        match files.iter().find(|p| !p.is_absolute() || p.to_str().is_none()) {
            Some(p) => refuse(format!("{} is not an absolute path in UTF-8", p.display())),
            None => Ok(()),
        }
    }

    /// Makes what QEMU needs, and hands it over to the uid that is chosen for it.
    fn prepare(&self, paths: &RunPaths) -> Result<Option<Claim>, QemuError> {
        if let Ok(record) = Record::read(&self.run_dir)
            && record.process.is_alive()
        {
            return Err(QemuError::Launch {
                name: self.name.to_string(),
                why: format!("QEMU {} already runs in its directory", record.process.pid),
            });
        }
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.run_dir)
            .map_err(QemuError::file("making the run directory", &self.run_dir))?;
        for stale in paths.sockets() {
            match std::fs::remove_file(stale) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(QemuError::file("removing the stale socket", stale)(e));
                }
                _ => {}
            }
        }
        let before = Record::read(&self.run_dir).ok().and_then(|r| r.launch.user);
        match &self.memory {
            MemorySource::Shared { path } => MemoryFile::create(path, self.spec.memory, before)?,
            MemorySource::PrivateOf { path } => MemoryFile::check(path, self.spec.memory, None)?,
        }
        let Some(confine) = &self.confine else { return Ok(None) };
        let claim = confine::claim(confine.uids, &self.run_dir)?;
        self.hand_over(paths, claim.uid)?;
        Ok(Some(claim))
    }

    /// Gives the machine's own files to `uid`. What it shares with others stays ours.
    fn hand_over(&self, paths: &RunPaths, uid: u32) -> Result<(), QemuError> {
        confine::make_run_dir(&self.run_dir, &[&paths.console_log, &paths.screen], uid)?;
        if let MemorySource::Shared { path } = &self.memory {
            confine::give_file(path, uid)?;
        }
        let Some(disk) = &self.disk else { return Ok(()) };
        if let Some(dir) = disk.top.parent() {
            confine::open_dir(dir, uid)?;
        }
        confine::give_file(&disk.top, uid)?;
        for l in &disk.layers {
            match &l.layer {
                Layer::Nbd { socket } => confine::open_socket(socket, uid)?,
                Layer::Raw { path } | Layer::Qcow2 { path } => confine::let_read(path, uid)?,
            }
        }
        Ok(())
    }

    /// What its QEMU sees of the host.
    fn cell(&self, confine: &Confine, uid: u32) -> Result<Cell, QemuError> {
        let mut cell = Cell::new(uid)?;
        cell.program(self.binaries.of(self.spec.arch))?;
        cell.device("/dev/userfaultfd")?;
        if self.accel == Accel::Kvm {
            cell.device("/dev/kvm")?;
        }
        // All sockets: those of migrations come later. Those of others it can't open.
        cell.bind(self.run_dir.parent().unwrap_or(&self.run_dir), false)?;
        cell.bind(&confine.scratch, false)?;
        for path in &confine.readable {
            cell.bind(path, true)?;
        }
        let shared = matches!(self.memory, MemorySource::Shared { .. });
        cell.bind(self.memory.path(), !shared)?;
        cell.bind(&self.spec.kernel.path, true)?;
        if let Some(file) = &self.spec.initrd {
            cell.bind(&file.path, true)?;
        }
        let Some(disk) = &self.disk else { return Ok(cell) };
        cell.bind(disk.top.parent().unwrap_or(&disk.top), false)?;
        for l in &disk.layers {
            if let Layer::Raw { path } | Layer::Qcow2 { path } = &l.layer {
                cell.bind(path, true)?;
            }
        }
        Ok(cell)
    }

    /// Opens the TAPs of its NICs; gives each with its port.
    fn open_taps(&self) -> Result<Vec<(u8, OwnedFd)>, QemuError> {
        let taps = self.nics.iter().filter_map(|nic| match &nic.backend {
            NicBackend::Tap(tap) => Some(open_tap(&self.name, tap).map(|fd| (nic.port, fd))),
            NicBackend::Isolated | NicBackend::User => None,
        });
        taps.collect()
    }

    fn start_process(
        &self,
        paths: &RunPaths,
        preload: Option<Preload>,
    ) -> Result<(Child, Process, Option<DiscardSwitch>), QemuError> {
        let program = self.binaries.of(self.spec.arch);
        let log = std::fs::OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&paths.log)
            .map_err(QemuError::file("making the log", &paths.log))?;
        let err_log = log.try_clone().map_err(QemuError::file("sharing the log", &paths.log))?;
        // The control sockets listen before QEMU exists, so that nobody has to wait for them.
        let mut listeners = Vec::new();
        for path in paths.handed() {
            listeners.push(
                UnixListener::bind(path)
                    .map_err(QemuError::file("listening on the control socket", path))?,
            );
        }
        let mut fds: Vec<i32> = listeners.iter().map(AsRawFd::as_raw_fd).collect();
        let taps = self.open_taps()?;
        let inherited = match fds[..] {
            [qmp0, qmp1, console, agent] => Inherited {
                qmp: [qmp0, qmp1],
                console,
                agent,
                taps: taps.iter().map(|(port, fd)| (*port, fd.as_raw_fd())).collect(),
                discards: preload.is_some(),
            },
            _ => unreachable!("one for each path"),
        };
        fds.extend(taps.iter().map(|(_, fd)| fd.as_raw_fd()));
        let cell = match (&self.confine, self.user) {
            (Some(confine), Some(uid)) => Some(self.cell(confine, uid)?),
            _ => None,
        };
        fds.extend(preload.iter().flat_map(Preload::descriptors));
        let door = self.group.as_ref().map(MemoryGroup::door).transpose()?;
        let mut command = Command::new(program);
        command
            .args(crate::args::command_line(self, paths, &inherited))
            .env_clear()
            .envs(kept_environment())
            .env(MACHINE_VARIABLE, self.name.as_str())
            .envs(preload.iter().flat_map(|p| p.environment(self.memory.path())))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(err_log)
            .kill_on_drop(false);
        // SAFETY: between fork and exec nothing but system calls is made, with what was allocated
        // before, on descriptors that `listeners`, `taps` and `preload` keep open until after
        // the spawn.
        unsafe {
            command.pre_exec(move || {
                rustix::process::setsid()?;
                if let Some(door) = &door {
                    rustix::io::write(door, b"0")?;
                }
                for &fd in &fds {
                    let fd = std::os::fd::BorrowedFd::borrow_raw(fd);
                    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
                }
                match &cell {
                    Some(cell) => cell.enter(),
                    None => Ok(()),
                }
            });
        }
        let start = |source| QemuError::Start { program: program.to_owned(), source };
        let child = command.spawn().map_err(start)?;
        drop((listeners, taps));
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).unwrap_or(0);
        let process = Process::of(pid).map_err(start)?;
        Ok((child, process, preload.map(Preload::into_switch)))
    }
}

/// Whether `nic` fits the ports of `spec`.
pub(crate) fn check_nic(nic: &Nic, spec: &MachineSpec) -> Result<(), String> {
    if nic.port >= spec.nic_ports {
        return Err(format!("NIC port {} of a machine with {}", nic.port, spec.nic_ports));
    }
    match &nic.backend {
        NicBackend::Tap(tap) => tap.check(),
        NicBackend::Isolated | NicBackend::User => Ok(()),
    }
}

/// Opens the TAP of a NIC of machine `name`.
pub(crate) fn open_tap(name: &Name, tap: &Tap) -> Result<OwnedFd, QemuError> {
    tap.open().map_err(|e| QemuError::Launch {
        name: name.to_string(),
        why: format!("opening interface {} in {}: {e}", tap.interface, tap.namespace),
    })
}
