//! A running QEMU, from its start or its adoption to its end.

mod apart;
mod block;
mod display;
mod life;
mod migrate;
mod nic;
mod rings;
mod run_dir;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_types::{Arch, Mib, Name};
use serde_json::Value;
use tokio::process::Child;
use tokio::sync::watch;
use tracing::{debug, info};
use uuid::Uuid;

pub use block::BlockStats;
pub use display::Screenshot;
pub use life::{Action, Life, Refused};
pub use migrate::{BlockInUse, Capability, MigrationInfo, MigrationStatus, Parameters};
pub use rings::RAM_BLOCK;
pub(crate) use run_dir::Record;
pub use run_dir::{RunPaths, bound_log};

use crate::agent::Agent;
use crate::confine;
use crate::discard::DiscardSwitch;
use crate::error::QemuError;
use crate::group::MemoryGroup;
use crate::launch::{Launch, MemorySource, Start};
use crate::manifest::Manifest;
use crate::memory::MemoryReader;
use crate::process::{Exit, Process, log_tail};
use crate::qmp::{EventCursor, Qmp, QmpError};

/// How long QEMU may take from its start to its first answer.
const START_WITHIN: Duration = Duration::from_secs(60);
/// How long QEMU may take to end after `quit`.
const QUIT_WITHIN: Duration = Duration::from_secs(20);

/// One QEMU. Clones are handles to the same one; dropping them all leaves QEMU running.
#[derive(Debug, Clone)]
pub struct Machine {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// As launched, with the block chain and the NICs of now.
    launch: Mutex<Launch>,
    process: Process,
    paths: RunPaths,
    /// The same, for the task that watches the process.
    home: Home,
    qmp: Qmp,
    agent: Agent,
    exit: watch::Receiver<Option<Exit>>,
    /// One change of the block graph or of the devices at a time.
    changing: tokio::sync::Mutex<()>,
    /// Of a clone that was started by this process and has no state yet.
    discards: Mutex<Option<DiscardSwitch>>,
}

impl Machine {
    pub(crate) async fn connect_new(
        record: Record,
        paths: RunPaths,
        child: Child,
        discards: Option<DiscardSwitch>,
    ) -> Result<Self, QemuError> {
        let home = Home::new(Mutex::new(paths.clone()));
        let exit = watch_child(child, Arc::clone(&home), record.launch.group.clone());
        let start = record.launch.start;
        let process = record.process.clone();
        let name = record.launch.name.to_string();
        let connected = async {
            let machine = Self::connect(record, home, exit.clone(), discards).await?;
            machine.enable_migration_events().await?;
            machine.take_display()?;
            if start == Start::Boot {
                machine.qmp("cont", Value::Null).await?;
            }
            Ok::<_, QemuError>(machine)
        };
        match connected.await {
            Ok(machine) => Ok(machine),
            Err(e) => {
                process.kill();
                let mut exit = exit;
                match wait_exit(&mut exit).await {
                    // Killed by us: the first error says more.
                    Exit { signal: Some(9), .. } => Err(e),
                    exit => Err(QemuError::Exited { name, exit }),
                }
            }
        }
    }

    async fn connect(
        record: Record,
        home: Home,
        exit: watch::Receiver<Option<Exit>>,
        discards: Option<DiscardSwitch>,
    ) -> Result<Self, QemuError> {
        let paths = now_of(&home);
        let [first, second] = &paths.qmp;
        // The first socket is the daemon's. A daemon that was replaced while its predecessor
        // still holds it takes the second.
        let mut gone = exit.clone();
        let qmp = tokio::select! {
            qmp = Qmp::connect(first, START_WITHIN) => qmp,
            _ = wait_exit(&mut gone) => Err(QmpError::Closed { command: "qmp_capabilities".into() }),
        };
        let qmp = match qmp {
            Err(QmpError::TimedOut { .. }) => Qmp::connect(second, START_WITHIN).await?,
            other => other?,
        };
        let agent = Agent::new(paths.agent.clone());
        let inner = Inner {
            launch: Mutex::new(record.launch),
            process: record.process,
            paths,
            home,
            qmp,
            agent,
            exit,
            changing: tokio::sync::Mutex::default(),
            discards: Mutex::new(discards),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Takes over the QEMU that runs in `run_dir`, started by this or an earlier daemon.
    ///
    /// # Errors
    /// [`QemuError::NotRunning`] when there is none (its pid and start time are compared), or its
    /// control socket does not answer.
    pub async fn adopt(run_dir: &Path) -> Result<Self, QemuError> {
        let not_running = || QemuError::NotRunning { run_dir: run_dir.to_owned() };
        let record = Record::read(run_dir).map_err(|e| match e {
            QemuError::File { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                not_running()
            }
            other => other,
        })?;
        if !record.process.is_alive() {
            return Err(not_running());
        }
        let home = Home::new(Mutex::new(RunPaths::of(run_dir)));
        let group = record.launch.group.clone();
        let exit = watch_stranger(record.process.clone(), Arc::clone(&home), group);
        info!(pid = record.process.pid, dir = %run_dir.display(), "a running machine is adopted");
        Self::connect(record, home, exit, None).await
    }

    /// The process that the record in `run_dir` names, if it lives; it may not answer.
    #[must_use]
    pub fn recorded(run_dir: &Path) -> Option<Process> {
        Record::read(run_dir).ok().map(|r| r.process).filter(Process::is_alive)
    }

    /// Gives the machine another run directory, name and top image: all of them are renamed under
    /// the running QEMU, which holds them open. A waiting QEMU becomes a machine of a name so.
    /// Both directories must be on one file system, `run_dir` must not exist.
    ///
    /// # Errors
    /// [`QemuError::File`] when something can't be renamed: the machine is then where it was.
    /// [`QemuError::Unexpected`] when other handles to the machine are there.
    pub fn rehouse(
        self,
        run_dir: &Path,
        name: Name,
        top: Option<&Path>,
    ) -> Result<Self, (Self, QemuError)> {
        let paths = RunPaths::of(run_dir);
        if let Err(e) = paths.check(&name) {
            return Err((self, e));
        }
        let before = self.launch();
        let moved = || {
            if let (Some(disk), Some(top)) = (&before.disk, top) {
                if let (Some(uid), Some(dir)) = (before.user, top.parent()) {
                    confine::open_dir(dir, uid)?;
                }
                std::fs::rename(&disk.top, top).map_err(QemuError::file("renaming to", top))?;
            }
            std::fs::rename(&before.run_dir, run_dir)
                .map_err(QemuError::file("renaming to", run_dir))
        };
        let back = || {
            if let (Some(disk), Some(top)) = (&before.disk, top) {
                let _ = std::fs::rename(top, &disk.top);
            }
        };
        if let Err(e) = moved() {
            back();
            return Err((self, e));
        }
        match Arc::try_unwrap(self.inner) {
            Ok(mut inner) => {
                *inner.home.lock().unwrap_or_else(PoisonError::into_inner) = paths.clone();
                inner.agent.moved(paths.agent.clone());
                inner.paths = paths;
                let machine = Self { inner: Arc::new(inner) };
                let recorded = machine.record(|l| {
                    l.run_dir = run_dir.to_owned();
                    l.name = name;
                    if let (Some(disk), Some(top)) = (&mut l.disk, top) {
                        disk.top = top.to_owned();
                    }
                });
                match recorded {
                    Ok(()) => Ok(machine),
                    Err(e) => Err((machine, e)),
                }
            }
            Err(inner) => {
                let _ = std::fs::rename(run_dir, &before.run_dir);
                back();
                let why = "other handles to it are there".to_owned();
                let e = QemuError::Unexpected { what: "a machine that is to be renamed", why };
                Err((Self { inner }, e))
            }
        }
    }

    /// What it was launched with; disk chain and NICs are those of now.
    #[must_use]
    pub fn launch(&self) -> Launch {
        self.launched().clone()
    }

    fn launched(&self) -> MutexGuard<'_, Launch> {
        self.inner.launch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn take_discard_switch(&self) -> Option<DiscardSwitch> {
        self.inner.discards.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Changes the record of what runs and writes it down for an adoption.
    fn record(&self, change: impl FnOnce(&mut Launch)) -> Result<(), QemuError> {
        let launch = {
            let mut launch = self.launched();
            change(&mut launch);
            launch.clone()
        };
        Record { process: self.inner.process.clone(), launch }.write(&self.inner.paths)
    }

    /// Its sockets and logs.
    #[must_use]
    pub fn paths(&self) -> &RunPaths {
        &self.inner.paths
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.inner.process
    }

    /// The client of its first control socket.
    #[must_use]
    pub fn qmp_client(&self) -> &Qmp {
        &self.inner.qmp
    }

    /// Its guest agent.
    #[must_use]
    pub fn agent(&self) -> &Agent {
        &self.inner.agent
    }

    /// QEMU's version.
    #[must_use]
    pub fn version(&self) -> &str {
        self.inner.qmp.version()
    }

    /// Its manifest.
    #[must_use]
    pub fn manifest(&self) -> Manifest {
        Manifest::of(&self.launched().spec, self.version())
    }

    /// The generation GUID that its guest sees; `None` for an architecture without one.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn generation_id(&self) -> Result<Option<Uuid>, QemuError> {
        if self.launched().spec.arch != Arch::X86_64 {
            return Ok(None);
        }
        let answer = self.qmp("query-vm-generation-id", Value::Null).await?;
        let guid = answer["guid"].as_str().unwrap_or_default();
        let guid = Uuid::parse_str(guid).map_err(|e| QemuError::Unexpected {
            what: "QEMU's generation GUID",
            why: e.to_string(),
        })?;
        Ok(Some(guid))
    }

    /// Its memory, read from outside QEMU.
    ///
    /// # Errors
    /// When the memory file or the process is gone.
    pub fn memory(&self) -> Result<MemoryReader, QemuError> {
        let launch = self.launch();
        match &launch.memory {
            MemorySource::Shared { path } => {
                MemoryReader::shared(path, launch.spec.memory, launch.user)
            }
            MemorySource::PrivateOf { path } => {
                let process = &self.inner.process;
                let reader = MemoryReader::private(path, launch.spec.memory, process.pid)?;
                // What is open is of whoever had that pid then: if QEMU still has it, of QEMU.
                if process.is_alive() {
                    return Ok(reader);
                }
                Err(QemuError::Unexpected {
                    what: "the process of QEMU",
                    why: format!("process {} has ended", process.pid),
                })
            }
        }
    }

    /// A cursor over QEMU's events from now on. Take it before causing what is waited for.
    #[must_use]
    pub fn events(&self) -> EventCursor {
        self.inner.qmp.events()
    }

    /// Its state, asked from QEMU.
    ///
    /// # Errors
    /// When QEMU is there but does not answer.
    pub async fn life(&self) -> Result<Life, QemuError> {
        if self.inner.exit.borrow().is_some() {
            return Ok(Life::Exited);
        }
        match self.inner.qmp.execute("query-status", Value::Null).await {
            Ok(answer) => Ok(Life::of(answer["status"].as_str().unwrap_or_default())),
            Err(QmpError::Closed { .. } | QmpError::Io { .. }) => Ok(Life::Exited),
            Err(e) => Err(e.into()),
        }
    }

    async fn allowed(&self, action: Action) -> Result<Life, QemuError> {
        let life = self.life().await?;
        life.check(action)?;
        Ok(life)
    }

    pub(crate) async fn qmp(&self, command: &str, arguments: Value) -> Result<Value, QemuError> {
        Ok(self.inner.qmp.execute(command, arguments).await?)
    }

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// [`Refused`] unless the machine is paused, saved or running.
    pub async fn run(&self) -> Result<(), QemuError> {
        self.allowed(Action::Run).await?;
        self.qmp("cont", Value::Null).await.map(drop)
    }

    /// Stops the vCPUs; disks are flushed when this returns.
    ///
    /// # Errors
    /// [`Refused`] unless the machine is running or paused.
    pub async fn stop(&self) -> Result<(), QemuError> {
        self.allowed(Action::Stop).await?;
        self.qmp("stop", Value::Null).await.map(drop)
    }

    /// Presses the power button; the guest decides what follows.
    ///
    /// # Errors
    /// When QEMU does not take it.
    pub async fn power_button(&self) -> Result<(), QemuError> {
        self.qmp("system_powerdown", Value::Null).await.map(drop)
    }

    /// Ends QEMU in good order and waits until it is gone; after 20 s it is killed.
    ///
    /// # Errors
    /// None in practice; a QEMU that is gone already counts as ended.
    pub async fn quit(&self) -> Result<Exit, QemuError> {
        match self.inner.qmp.execute("quit", Value::Null).await {
            Ok(_) => {}
            Err(e) => debug!(error = %e, "quit was not answered"),
        }
        if let Ok(exit) = tokio::time::timeout(QUIT_WITHIN, self.exited()).await {
            return Ok(exit);
        }
        Ok(self.kill().await)
    }

    /// Kills QEMU and waits until it is gone.
    pub async fn kill(&self) -> Exit {
        self.inner.process.kill();
        self.exited().await
    }

    /// Waits until QEMU has ended.
    pub async fn exited(&self) -> Exit {
        wait_exit(&mut self.inner.exit.clone()).await
    }

    /// The last bytes of the serial console, at most `max`.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn console_tail(&self, max: usize) -> Result<Vec<u8>, QemuError> {
        run_dir::tail(&self.inner.paths.console_log, max)
    }
}

async fn wait_exit(exit: &mut watch::Receiver<Option<Exit>>) -> Exit {
    match exit.wait_for(Option::is_some).await {
        Ok(exit) => exit.clone(),
        Err(_) => None,
    }
    .unwrap_or(Exit { code: None, signal: None, outgrew: None, log: String::new() })
}

/// Where the machine's files are, as it may be renamed while it runs.
type Home = Arc<Mutex<RunPaths>>;

fn now_of(home: &Home) -> RunPaths {
    home.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Reaps `child` when it ends and keeps its logs bounded until then.
fn watch_child(
    mut child: Child,
    home: Home,
    group: Option<MemoryGroup>,
) -> watch::Receiver<Option<Exit>> {
    use std::os::unix::process::ExitStatusExt;
    let (tell, exit) = watch::channel(None);
    tokio::spawn(async move {
        let status = tokio::select! {
            status = child.wait() => status.ok(),
            () = run_dir::bound_logs(|| now_of(&home)) => None,
        };
        let (code, signal) = (status.and_then(|s| s.code()), status.and_then(|s| s.signal()));
        let (outgrew, log) = (leave(group.as_ref()), log_tail(&now_of(&home).log));
        tell.send_replace(Some(Exit { code, signal, outgrew, log }));
    });
    exit
}

/// Removes the group of a QEMU that has ended; gives the limit if that was its end.
fn leave(group: Option<&MemoryGroup>) -> Option<Mib> {
    let group = group?;
    let limit = group.was_outgrown().then_some(group.limit);
    group.remove();
    limit
}

/// As [`watch_child`], for a process that is not our child.
fn watch_stranger(
    process: Process,
    home: Home,
    group: Option<MemoryGroup>,
) -> watch::Receiver<Option<Exit>> {
    let (tell, exit) = watch::channel(None);
    tokio::spawn(async move {
        tokio::select! {
            () = process.ended() => {}
            () = run_dir::bound_logs(|| now_of(&home)) => {}
        }
        tell.send_replace(Some(Exit {
            code: None,
            signal: None,
            outgrew: leave(group.as_ref()),
            log: log_tail(&now_of(&home).log),
        }));
    });
    exit
}
