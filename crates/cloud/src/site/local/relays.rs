//! The relay processes of this site: started, found, ended.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_migrate::relay::{RelayCommand, RelayDisk, RelayRole};
use godwit_migrate::{RelayClient, RelayConfig};

use super::LocalSite;
use super::machines::coded;
use super::record::{End, MachineRecord, Migration};
use crate::error::Fault;

/// How long a relay may take until it can be steered, and until it has ended when it is told to.
const RELAY_WITHIN: Duration = Duration::from_secs(20);

/// How long a relay's process may take to go once it has said that it ends.
const END_WITHIN: Duration = Duration::from_secs(5);
/// How often a process is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What a relay is to carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// A migration from its start.
    Whole,
    /// What is missing after a break.
    Rest,
    /// What is missing of the disk after a break; memory is not carried.
    Disk,
}

impl LocalSite {
    /// Starts the relay of this end, as a process that outlives this one.
    pub(super) async fn start_relay(
        &self,
        record: &MachineRecord,
        role: RelayRole,
        disk: Option<RelayDisk>,
        part: Part,
    ) -> Result<RelayClient, Fault> {
        let migration = record
            .migration
            .clone()
            .ok_or_else(|| Fault::internal("a relay for a machine that is in no migration"))?;
        let paths = MovePaths::of(&self.dirs.run, &migration);
        let generation = match migration.end {
            End::Source => migration.next.unwrap_or_else(|| record.generation.next()),
            End::Destination => record.generation,
        };
        let config = RelayConfig {
            role,
            migration: migration.id,
            generation,
            peer: migration.peer,
            keys: self.dirs.keys().join("identity"),
            revoked: (*self.trust.revocations()).clone(),
            revoked_file: Some(self.dirs.revoked()),
            link_patience_ms: self.options.link_patience.as_millis() as u64,
            control: paths.control.clone(),
            qemu: paths.qemu.clone(),
            resume: part != Part::Whole,
            memory: part != Part::Disk,
            disk,
        };
        let fail = |what: &str, e: &std::io::Error| {
            Fault::internal(format!("{what} in {}: {e}", paths.dir.display()))
        };
        paths.make().map_err(|e| fail("making a place for a relay", &e))?;
        let text =
            serde_json::to_vec_pretty(&config).map_err(|e| Fault::internal(e.to_string()))?;
        std::fs::OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&paths.config)
            .and_then(|mut f| std::io::Write::write_all(&mut f, &text))
            .map_err(|e| fail("writing a relay's configuration", &e))?;
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&paths.log)
            .map_err(|e| fail("making a relay's log", &e))?;
        let err = log.try_clone().map_err(|e| fail("sharing a relay's log", &e))?;
        let mut command = tokio::process::Command::new(&self.options.relay_program);
        command
            .arg("relay")
            .arg(&paths.config)
            .env_clear()
            .envs(kept_environment())
            .stdin(std::process::Stdio::null())
            .stdout(log)
            .stderr(err)
            .process_group(0)
            .kill_on_drop(false);
        let mut child = command.spawn().map_err(|e| fail("starting a relay", &e))?;
        let attach = RelayClient::attach_within(&paths.control, RELAY_WITHIN);
        let client = tokio::select! {
            client = attach => client.map_err(coded),
            status = child.wait() => Err(Fault::internal(format!(
                "the relay ended at its start ({}): {}",
                status.map_or_else(|e| e.to_string(), |s| s.to_string()),
                last_line(&paths.log),
            ))),
        };
        if client.is_ok() {
            // Reaped when it ends; it is not this task's to end.
            tokio::spawn(async move { child.wait().await });
        } else {
            let _ = child.start_kill();
        }
        client
    }

    /// Ends this site's relay of a migration, if it is there, and waits until its process is gone:
    /// what it held is free then. One that does not listen is killed.
    pub(super) async fn end_relay(&self, migration: &Migration) {
        let paths = MovePaths::of(&self.dirs.run, migration);
        let asked = async {
            let relay = RelayClient::attach(&paths.control).await.ok()?;
            let why = "the migration was given up".to_owned();
            let _ = relay.command(&RelayCommand::Abort { why }).await;
            let _ = relay.wait(|s| s.end.is_some()).await;
            relay.command(&RelayCommand::Finish).await.ok()
        };
        let _ = tokio::time::timeout(RELAY_WITHIN, asked).await;
        let deadline = tokio::time::Instant::now() + END_WITHIN;
        while let Some(pid) = process_of(&paths.config) {
            if tokio::time::Instant::now() >= deadline + END_WITHIN {
                tracing::error!(pid, "a relay does not end even when it is killed");
                return;
            }
            if tokio::time::Instant::now() >= deadline {
                tracing::warn!(pid, "a relay that does not end is killed");
                if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// What a relay keeps of this daemon's environment, which may hold secrets.
fn kept_environment() -> impl Iterator<Item = (&'static str, std::ffi::OsString)> {
    const KEPT: &[&str] = &["PATH", "GODWIT_LOG", "RUST_BACKTRACE"];
    // Where tests have processes wait.
    const TESTED: &[&str] = if cfg!(debug_assertions) { &[godwit_hold::VARIABLE] } else { &[] };
    KEPT.iter().chain(TESTED).filter_map(|name| Some((*name, std::env::var_os(name)?)))
}

/// Kills every relay whose configuration is in `dir`, and waits until they are gone.
pub(super) async fn end_all_below(dir: &Path) {
    let deadline = tokio::time::Instant::now() + END_WITHIN;
    let found = || relay_process(|config| Path::new(config).parent() == Some(dir));
    while let Some(pid) = found()
        && tokio::time::Instant::now() < deadline
    {
        if let Some(pid) = rustix::process::Pid::from_raw(pid) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The relay that was started with this configuration, if it lives.
fn process_of(config: &Path) -> Option<i32> {
    relay_process(|c| Path::new(c) == config)
}

/// A relay that lives and was started with a configuration that `is` so.
fn relay_process(is: impl Fn(&std::ffi::OsStr) -> bool) -> Option<i32> {
    use std::os::unix::ffi::OsStrExt;
    let entries = std::fs::read_dir("/proc").ok()?;
    entries.flatten().find_map(|e| {
        let pid: i32 = e.file_name().to_str()?.parse().ok()?;
        // A zombie has no command line.
        let line = std::fs::read(e.path().join("cmdline")).ok()?;
        let mut words = line.split(|b| *b == 0).skip(1);
        let relay = words.next() == Some(b"relay");
        (relay && words.next().is_some_and(|c| is(std::ffi::OsStr::from_bytes(c)))).then_some(pid)
    })
}

/// Where a relay has its sockets and files.
pub(super) struct MovePaths {
    pub(super) dir: PathBuf,
    pub(super) control: PathBuf,
    pub(super) qemu: PathBuf,
    pub(super) nbd: PathBuf,
    pub(super) written: PathBuf,
    pub(super) config: PathBuf,
    log: PathBuf,
}

impl MovePaths {
    pub(super) fn of(run: &Path, migration: &Migration) -> Self {
        let text = migration.id.0.simple().to_string();
        // The last digits of a version 7 id are its random ones; socket paths are short.
        let dir = run.join(format!("mig-{}", &text[20..]));
        // A relay that ends late must not take the sockets of the next one away.
        let mine = |name: &str| match migration.attempt {
            0 => dir.join(name),
            n => dir.join(format!("{n}-{name}")),
        };
        Self {
            control: mine("control"),
            qemu: mine("qemu"),
            // QEMU keeps the path that it was started with.
            nbd: dir.join("nbd"),
            written: mine("written"),
            config: mine("relay.json"),
            log: dir.join("relay.log"),
            dir,
        }
    }
}

impl MovePaths {
    /// Makes the directory, nobody's but ours; the machine's QEMU is let through when there is one.
    pub(super) fn make(&self) -> std::io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)
    }
}

fn last_line(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(2000)..]).into_owned();
    text.trim().lines().last().unwrap_or("it said nothing").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_a_migration_fit() {
        let name: godwit_types::Name =
            "a".repeat(godwit_types::Name::MAX_LEN).parse().expect("valid");
        let run = super::super::SiteDirs::usual(&name).run;
        let id = godwit_types::MigrationId::new();
        let mut migration = Migration::new(id, End::Source, name);
        migration.attempt = 9_999;
        let paths = MovePaths::of(&run, &migration);
        assert!(paths.control.as_os_str().len() <= 107);
    }
}
