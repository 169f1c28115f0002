//! The run directory of a machine: its sockets, its logs, and the record that lets a later daemon
//! adopt it.

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_types::Name;
use serde::{Deserialize, Serialize};
use tracing::debug;

use crate::confine::NURSERY;
use crate::error::QemuError;
use crate::launch::Launch;
use crate::process::Process;

/// Longest path of a unix socket, in bytes (`sun_path` less its end).
const SOCKET_PATH_MAX: usize = 107;
/// Largest record that is read.
const RECORD_MAX: u64 = 1 << 20;
/// Bytes of each log that are kept on disk; what is older is given back to the file system.
const LOG_KEPT: u64 = 4 << 20;
/// How often the logs are looked at.
const LOG_LOOK: Duration = Duration::from_secs(10);

/// Files in a machine's run directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunPaths {
    /// Control sockets: the daemon's, and a second speaker's.
    pub qmp: [PathBuf; 2],
    /// Serial console, a socket.
    pub console: PathBuf,
    /// What the serial console printed.
    pub console_log: PathBuf,
    /// Guest agent, a socket.
    pub agent: PathBuf,
    /// VNC, a socket; there when the machine has a display.
    pub vnc: PathBuf,
    /// Where a confined QEMU makes that.
    pub(crate) vnc_made: PathBuf,
    /// What QEMU itself printed.
    pub log: PathBuf,
    /// What runs here.
    pub record: PathBuf,
    /// The latest screenshot while it is being taken.
    pub screen: PathBuf,
}

impl RunPaths {
    /// The files in `run_dir`.
    #[must_use]
    pub fn of(run_dir: &Path) -> Self {
        let at = |name: &str| run_dir.join(name);
        Self {
            qmp: [at("qmp0.sock"), at("qmp1.sock")],
            console: at("console.sock"),
            console_log: at("console.log"),
            agent: at("agent.sock"),
            vnc: at("vnc.sock"),
            vnc_made: at(NURSERY).join("vnc"),
            log: at("qemu.log"),
            record: at("machine.json"),
            screen: at("screen.png"),
        }
    }

    pub(crate) fn sockets(&self) -> [&Path; 6] {
        [&self.qmp[0], &self.qmp[1], &self.console, &self.agent, &self.vnc, &self.vnc_made]
    }

    /// Those that listen before QEMU is there, in the order in which it takes them.
    pub(crate) fn handed(&self) -> [&Path; 4] {
        [&self.qmp[0], &self.qmp[1], &self.console, &self.agent]
    }

    /// Where a confined QEMU makes a socket before it is moved to its place.
    pub(crate) fn made(&self, name: &str) -> PathBuf {
        self.vnc_made.with_file_name(name)
    }

    pub(crate) fn check(&self, name: &Name) -> Result<(), QemuError> {
        match self.sockets().iter().find(|p| p.as_os_str().len() > SOCKET_PATH_MAX) {
            None => Ok(()),
            Some(p) => Err(QemuError::Launch {
                name: name.to_string(),
                why: format!("the socket path {} is over {SOCKET_PATH_MAX} bytes", p.display()),
            }),
        }
    }
}

/// What runs in a run directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) process: Process,
    pub(crate) launch: Launch,
}

impl Record {
    pub(crate) fn read(run_dir: &Path) -> Result<Self, QemuError> {
        let path = RunPaths::of(run_dir).record;
        let mut text = Vec::new();
        std::fs::File::open(&path)
            .and_then(|f| f.take(RECORD_MAX).read_to_end(&mut text))
            .map_err(QemuError::file("reading the record", &path))?;
        serde_json::from_slice(&text).map_err(|e| QemuError::Unexpected {
            what: "the record of a machine",
            why: format!("{}: {e}", path.display()),
        })
    }

    /// Replaces the record in one step.
    pub(crate) fn write(&self, paths: &RunPaths) -> Result<(), QemuError> {
        let path = &paths.record;
        let new = path.with_extension("json.new");
        let write = || -> std::io::Result<()> {
            let text = serde_json::to_vec_pretty(self).map_err(std::io::Error::other)?;
            let mut file = std::fs::OpenOptions::new()
                .create(true)
                .write(true)
                .truncate(true)
                .mode(0o600)
                .open(&new)?;
            file.write_all(&text)?;
            std::fs::rename(&new, path)
        };
        write().map_err(QemuError::file("writing the record", path))
    }
}

/// The last bytes of the file at `path`, at most `max`.
pub(crate) fn tail(path: &Path, max: usize) -> Result<Vec<u8>, QemuError> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(max as u64)))?;
        let mut out = Vec::new();
        file.take(max as u64).read_to_end(&mut out)?;
        Ok(out)
    };
    read().map_err(QemuError::file("reading the console log", path))
}

/// Keeps the logs of the console and of QEMU from filling the disk, for as long as it is polled: a
/// guest can print without end, and make QEMU complain without end. Both are appended to, so a file
/// keeps its length and its older part becomes a hole.
pub(crate) async fn bound_logs(paths: impl Fn() -> RunPaths) {
    let mut look = tokio::time::interval(LOG_LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        let paths = paths();
        for log in [&paths.console_log, &paths.log] {
            if let Err(e) = bound_log(log) {
                debug!(error = %e, log = %log.display(), "a log cannot be bounded");
            }
        }
    }
}

/// Gives the older part of a log back to its file system when it takes more than 8 MiB; the last
/// 4 MiB are kept. The file must be appended to: it keeps its length, and reads as zeros where it
/// was cut.
///
/// # Errors
/// When it cannot be looked at or cut. One that is no plain file is left alone.
pub fn bound_log(log: &Path) -> std::io::Result<()> {
    let large = |m: &std::fs::Metadata| {
        m.is_file() && m.blocks() * 512 > 2 * LOG_KEPT && m.len() > LOG_KEPT
    };
    if !large(&std::fs::symlink_metadata(log)?) {
        return Ok(());
    }
    let no_follow = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or_default();
    let file = std::fs::OpenOptions::new().write(true).custom_flags(no_follow).open(log)?;
    let meta = file.metadata()?;
    if !large(&meta) {
        return Ok(());
    }
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, 0, meta.len() - LOG_KEPT)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_gives_its_older_part_back_and_keeps_its_tail() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("console.log");
        let mut text = vec![b'x'; 10 << 20];
        text.extend_from_slice(b"the end");
        std::fs::write(&log, &text).unwrap();
        let link = dir.path().join("qemu.log");
        std::os::unix::fs::symlink(&log, &link).unwrap();
        bound_log(&link).unwrap();
        assert!(std::fs::metadata(&log).unwrap().blocks() * 512 > 9 << 20, "another's file");
        bound_log(&log).unwrap();
        let meta = std::fs::metadata(&log).unwrap();
        assert_eq!(meta.len(), text.len() as u64);
        assert!(meta.blocks() * 512 < 5 << 20, "{}", meta.blocks() * 512);
        assert_eq!(tail(&log, 7).unwrap(), b"the end");
    }

    #[test]
    fn a_socket_path_that_the_kernel_would_refuse_is_named() {
        let long = PathBuf::from(format!("/{}", "d".repeat(100)));
        let err = RunPaths::of(&long).check(&"vm".parse().unwrap()).expect_err("refused");
        assert!(err.to_string().contains("over 107 bytes"), "{err}");
    }
}
