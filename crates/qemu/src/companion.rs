//! A program that works for a machine beside its QEMU, kept apart as the QEMU is.
//!
//! ```text
//! claim a uid --> its meeting place and files to that uid --> fork --> group, own mounts, uid --> exec
//! ```
//!
//! Programs and four devices are there, and what the caller names; whatever can be is given as an
//! open descriptor. It finds the sockets of its QEMU in one directory, the meeting place, in which
//! neither can make anything. Without uids it is a process of this one's user that sees all of it.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;

use rustix::process::{Resource, Rlimit};
use tokio::process::{Child, Command};

use crate::confine::{self, Cell, Claim, UidRange};
use crate::error::QemuError;
use crate::group::MemoryGroup;

/// One start of such a program.
#[derive(Debug)]
pub struct Companion {
    /// The program; an absolute path.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// All of its environment.
    pub env: Vec<(OsString, OsString)>,
    /// A directory of ours where it meets its QEMU, beside the run directories of the site's QEMUs.
    pub meeting: PathBuf,
    /// What it may read besides.
    pub readable: Vec<PathBuf>,
    /// What it may change, as far as the modes there let its uid.
    pub writable: Vec<PathBuf>,
    /// Where its uid comes from; without it it is this process's user.
    pub uids: Option<UidRange>,
    /// Its control group.
    pub group: Option<MemoryGroup>,
    /// What is open to it, under the same numbers as here.
    pub open: Vec<OwnedFd>,
    /// Its standard input.
    pub input: File,
    /// Where it says what it does.
    pub log: File,
}

/// Why one did not start.
#[derive(Debug)]
pub enum NotStarted<E> {
    /// No uid is free, something cannot be handed over, or the program cannot be started.
    Qemu(QemuError),
    /// What its caller had to hand over.
    Caller(E),
}

impl<E> From<QemuError> for NotStarted<E> {
    fn from(e: QemuError) -> Self {
        Self::Qemu(e)
    }
}

impl Companion {
    /// Starts it in a process group of its own. `hand_over` gives the uid what is to be its own.
    ///
    /// # Errors
    /// When no uid is free, something cannot be handed over, or it does not start.
    pub fn spawn<E>(
        self,
        hand_over: impl FnOnce(Option<u32>) -> Result<(), E>,
    ) -> Result<Child, NotStarted<E>> {
        let claim = self.uids.map(|uids| confine::claim(uids, &self.meeting)).transpose()?;
        let uid = claim.as_ref().map(|c: &Claim| c.uid);
        if let Some(uid) = uid {
            confine::make_meeting(&self.meeting, uid)?;
        }
        hand_over(uid).map_err(NotStarted::Caller)?;
        let cell = uid.map(|uid| self.cell(uid)).transpose()?;
        let door = self.group.as_ref().map(MemoryGroup::door).transpose()?;
        let log =
            self.log.try_clone().map_err(QemuError::file("sharing the log", &self.meeting))?;
        let fds: Vec<i32> = self.open.iter().map(AsRawFd::as_raw_fd).collect();
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            .env_clear()
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .current_dir("/")
            .stdin(self.input)
            .stdout(log)
            .stderr(Stdio::from(self.log))
            .process_group(0)
            .kill_on_drop(false);
        // SAFETY: between fork and exec nothing but system calls is made, with what was allocated
        // before, on descriptors that `self.open` keeps open until after the spawn.
        unsafe {
            command.pre_exec(move || {
                if let Some(door) = &door {
                    rustix::io::write(door, b"0")?;
                }
                for &fd in &fds {
                    let fd = BorrowedFd::borrow_raw(fd);
                    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
                }
                // A dump would hold the site's key.
                let none = Rlimit { current: Some(0), maximum: Some(0) };
                rustix::process::setrlimit(Resource::Core, none)?;
                match &cell {
                    Some(cell) => cell.enter(),
                    None => Ok(()),
                }
            });
        }
        let child = command
            .spawn()
            .map_err(|source| QemuError::Start { program: self.program.clone(), source })?;
        drop(self.open);
        // From here on its uid is that of a process.
        drop(claim);
        Ok(child)
    }

    /// What it sees of the host.
    fn cell(&self, uid: u32) -> Result<Cell, QemuError> {
        let mut cell = Cell::new(uid)?;
        cell.bind(&self.program, true)?;
        cell.bind(&self.meeting, true)?;
        for path in &self.readable {
            cell.bind(path, true)?;
        }
        for path in &self.writable {
            cell.bind(path, false)?;
        }
        Ok(cell)
    }
}
