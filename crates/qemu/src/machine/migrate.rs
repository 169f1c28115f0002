//! Saving, loading and migrating: everything that moves a machine's state.
//!
//! Addresses go to QEMU as structured `channels`, never as a URI: an `exec:` URI would be a shell,
//! and a comma in a `file:` URI an option.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Machine;
use super::life::{Action, Life};
use crate::error::QemuError;
use crate::launch::MemorySource;
use crate::qmp::WaitError;

/// How long a save or a load may take.
const STATE_WITHIN: Duration = Duration::from_secs(120);
/// How long a cancelled migration may take to end.
const CANCEL_WITHIN: Duration = Duration::from_secs(60);
/// How long the question for the level may take before the newest event answers it. The main loop
/// of a post-copy destination stands still while it needs a page that does not come.
const LEVEL_WITHIN: Duration = Duration::from_secs(2);
/// Beside waiting for an event, the level is looked at this often.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// A migration capability that Godwit uses. Both ends need the same ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// Shared memory files are left out of the stream.
    IgnoreShared,
    /// The destination may run before it has every page.
    PostcopyRam,
    /// Demanded pages use a channel of their own.
    PostcopyPreempt,
    /// The source answers the destination's questions, in pre-copy too.
    ReturnPath,
    /// The source waits between stopping and sending device state (`migrate-continue`).
    PauseBeforeSwitchover,
    /// The source neither switches nor ends pre-copy by itself before it has read SWITCHOVER_ACK on
    /// its return path. Set at the source alone, so that only the relay beside it says when.
    SwitchoverAck,
}

impl Capability {
    const ALL: [Self; 6] = [
        Self::IgnoreShared,
        Self::PostcopyRam,
        Self::PostcopyPreempt,
        Self::ReturnPath,
        Self::PauseBeforeSwitchover,
        Self::SwitchoverAck,
    ];

    /// QEMU's name for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::IgnoreShared => "x-ignore-shared",
            Self::PostcopyRam => "postcopy-ram",
            Self::PostcopyPreempt => "postcopy-preempt",
            Self::ReturnPath => "return-path",
            Self::PauseBeforeSwitchover => "pause-before-switchover",
            Self::SwitchoverAck => "switchover-ack",
        }
    }
}

/// Migration parameters; what is `None` stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Parameters {
    /// Pre-copy limit in bytes per second; 0 is none.
    pub max_bandwidth: Option<u64>,
    /// Post-copy background limit in bytes per second; 0 is none.
    pub max_postcopy_bandwidth: Option<u64>,
    /// Pre-copy ends when the rest takes less than this.
    pub downtime_limit_ms: Option<u64>,
    /// The bandwidth that QEMU reckons with for the rest, in bytes per second; 0 is what it has
    /// measured.
    pub avail_switchover_bandwidth: Option<u64>,
}

/// QEMU's migration status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "the names are QEMU's own")]
pub enum MigrationStatus {
    None,
    Setup,
    Cancelling,
    Cancelled,
    Active,
    PostcopyActive,
    PostcopyPaused,
    PostcopyRecoverSetup,
    PostcopyRecover,
    Completed,
    Failed,
    Colo,
    PreSwitchover,
    Device,
    WaitUnplug,
}

impl MigrationStatus {
    fn of(text: &str) -> Option<Self> {
        serde_json::from_value(Value::from(text)).ok()
    }

    /// Whether nothing more will happen.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// What `query-migrate` tells.
#[derive(Debug, Clone, PartialEq)]
pub struct MigrationInfo {
    /// The status.
    pub status: MigrationStatus,
    /// Why it failed.
    pub error: Option<String>,
    /// Bytes of memory sent.
    pub transferred: u64,
    /// Bytes of memory to be sent yet.
    pub remaining: u64,
    /// Bytes of memory in all.
    pub total: u64,
    /// Rounds over memory: 1 in the first pre-copy round, 2 after it.
    pub rounds: u64,
    /// Pages the destination has asked for.
    pub postcopy_requests: u64,
}

impl MigrationInfo {
    fn of(answer: &Value) -> Result<Self, QemuError> {
        let text = answer["status"].as_str().unwrap_or("none");
        let status = MigrationStatus::of(text).ok_or_else(|| QemuError::Unexpected {
            what: "QEMU's migration status",
            why: text.chars().take(40).collect(),
        })?;
        let ram = |key: &str| answer["ram"][key].as_u64().unwrap_or(0);
        Ok(Self {
            status,
            error: answer["error-desc"].as_str().map(str::to_owned),
            transferred: ram("transferred"),
            remaining: ram("remaining"),
            total: ram("total"),
            rounds: ram("dirty-sync-count"),
            postcopy_requests: ram("postcopy-requests"),
        })
    }
}

/// One of QEMU's RAM blocks: guest memory, video memory, a ROM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockInUse {
    /// Its id in a migration stream.
    pub name: String,
    /// Bytes that it has in use.
    pub used_bytes: u64,
    /// Where QEMU has it in its own memory.
    pub host_address: u64,
}

/// A line of QEMU's list of RAM blocks: name, page size (of two words), offset, bytes in use, bytes
/// at most, address, whether it is read-only.
fn ram_block(line: &str) -> Option<BlockInUse> {
    let mut words = line.split_whitespace();
    let name = words.next()?.to_owned();
    let mut numbers = words.rev().skip(1).map(|word| {
        let digits = word.strip_prefix("0x")?;
        u64::from_str_radix(digits, 16).ok()
    });
    let host_address = numbers.next()??;
    let used_bytes = numbers.nth(1)??;
    Some(BlockInUse { name, used_bytes, host_address })
}

fn file_channel(path: &Path) -> Value {
    json!([{ "channel-type": "main", "addr": {
        "transport": "file", "filename": path.to_string_lossy(), "offset": 0,
    }}])
}

fn unix_channel(path: &Path) -> Value {
    json!([{ "channel-type": "main", "addr": {
        "transport": "socket", "type": "unix", "path": path.to_string_lossy(),
    }}])
}

impl Machine {
    pub(super) async fn enable_migration_events(&self) -> Result<(), QemuError> {
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.qmp("migrate-set-capabilities", events).await.map(drop)
    }

    /// Switches exactly `on` on, and every other [`Capability`] off.
    ///
    /// # Errors
    /// A combination that QEMU refuses, or a migration under way.
    pub async fn set_capabilities(&self, on: &[Capability]) -> Result<(), QemuError> {
        let mut all: Vec<Value> = Capability::ALL
            .iter()
            .map(|c| json!({ "capability": c.name(), "state": on.contains(c) }))
            .collect();
        all.push(json!({ "capability": "events", "state": true }));
        self.qmp("migrate-set-capabilities", json!({ "capabilities": all })).await.map(drop)
    }

    /// Sets migration parameters.
    ///
    /// # Errors
    /// A value that QEMU refuses.
    pub async fn set_parameters(&self, p: Parameters) -> Result<(), QemuError> {
        let mut object = serde_json::Map::new();
        for (key, value) in [
            ("max-bandwidth", p.max_bandwidth),
            ("max-postcopy-bandwidth", p.max_postcopy_bandwidth),
            ("downtime-limit", p.downtime_limit_ms),
            ("avail-switchover-bandwidth", p.avail_switchover_bandwidth),
        ] {
            if let Some(value) = value {
                object.insert(key.to_owned(), Value::from(value));
            }
        }
        self.qmp("migrate-set-parameters", Value::Object(object)).await.map(drop)
    }

    /// Stops the machine and saves its state to the file at `path`; memory in a shared file stays
    /// where it is and is left out. Gives the bytes written. The machine may run on afterwards.
    ///
    /// The memory of a machine with private memory has no file of its own and goes into the state
    /// file whole, zero pages excepted; [`Machine::save_devices`] leaves it where it is.
    ///
    /// # Errors
    /// [`super::Refused`] unless running or paused; a failed save (say, a full disk) leaves the
    /// machine stopped with its state unharmed.
    pub async fn save_state(&self, path: &Path) -> Result<u64, QemuError> {
        self.allowed(Action::Save).await?;
        self.qmp("stop", Value::Null).await?;
        self.set_capabilities(&[Capability::IgnoreShared]).await?;
        self.set_parameters(Parameters { max_bandwidth: Some(0), ..Parameters::default() }).await?;
        let place = self.file_place(path)?;
        let saved = async {
            self.qmp("migrate", json!({ "channels": file_channel(&place.qemu_path) })).await?;
            self.wait_migration("saving the state", &[MigrationStatus::Completed], STATE_WITHIN)
                .await?;
            place.take_file()
        }
        .await;
        if saved.is_err() {
            place.clear();
        }
        saved?;
        let meta = std::fs::metadata(path)
            .map_err(QemuError::file("reading the size of the state", path))?;
        Ok(meta.len())
    }

    /// Stops the machine and saves its devices alone to the file at `path`, without any RAM block:
    /// half of a state, of which [`join_devices`](crate::stream::join_devices) makes a whole. No
    /// byte of memory is read; a machine with private memory has no other way to be saved without
    /// filling the holes of the file that it maps. The machine may run on afterwards.
    ///
    /// # Errors
    /// [`super::Refused`] unless running or paused; a failed save leaves the machine stopped with
    /// its state unharmed.
    pub async fn save_devices(&self, path: &Path) -> Result<(), QemuError> {
        self.allowed(Action::Save).await?;
        self.qmp("stop", Value::Null).await?;
        // Named for what it was made for; it is there in every build, and asks nothing of Xen. Not
        // `live` is what leaves the disks as they are.
        let place = self.file_place(path)?;
        let arguments = json!({ "filename": place.qemu_path.to_string_lossy(), "live": false });
        let saved = match self.qmp("xen-save-devices-state", arguments).await {
            Ok(_) => place.take_file(),
            Err(e) => Err(e),
        };
        if saved.is_err() {
            place.clear();
        }
        saved
    }

    /// Loads the state that [`Machine::save_state`] wrote to `path`. The machine is paused
    /// afterwards. The caller has compared the manifests.
    ///
    /// # Errors
    /// [`super::Refused`] unless it waits for a state; a state that QEMU cannot load.
    pub async fn load_state(&self, path: &Path) -> Result<(), QemuError> {
        const DOING: &str = "loading the state";
        self.allowed(Action::Load).await?;
        self.set_capabilities(&[Capability::IgnoreShared]).await?;
        let place = self.copy_place(path)?;
        let loaded = async {
            self.begin_incoming(file_channel(&place.qemu_path)).await?;
            self.wait_migration(DOING, &[MigrationStatus::Completed], STATE_WITHIN).await?;
            self.wait_life(DOING, Life::Paused, STATE_WITHIN).await
        }
        .await;
        place.clear();
        loaded?;
        if let Err(e) = self.let_free_memory_go().await {
            tracing::warn!(error = %e, "a clone keeps the memory that its guest frees");
        }
        Ok(())
    }

    /// Waits for a connection on the unix socket at `path` and takes the state that comes over it
    /// in. Returns once QEMU listens. Set capabilities before.
    ///
    /// # Errors
    /// [`super::Refused`] unless it waits for a state.
    pub async fn migrate_incoming(&self, path: &Path) -> Result<(), QemuError> {
        self.allowed(Action::Load).await?;
        let place = self.socket_place(path)?;
        self.begin_incoming(unix_channel(&place.qemu_path)).await?;
        place.take_socket()
    }

    async fn begin_incoming(&self, channels: Value) -> Result<(), QemuError> {
        // Without exit-on-error QEMU stays to tell why a load failed.
        let arguments = json!({ "channels": channels, "exit-on-error": false });
        self.qmp("migrate-incoming", arguments).await.map(drop)
    }

    /// Starts to send the state over the unix socket at `path`. Returns at once; follow it with
    /// [`Machine::events`] and [`Machine::query_migrate`].
    ///
    /// # Errors
    /// [`super::Refused`] unless running or paused.
    pub async fn migrate_to(&self, path: &Path) -> Result<(), QemuError> {
        self.allowed(Action::Send).await?;
        self.let_connect(path)?;
        self.qmp("migrate", json!({ "channels": unix_channel(path) })).await.map(drop)
    }

    /// Switches the outgoing migration to post-copy.
    ///
    /// # Errors
    /// When no migration with [`Capability::PostcopyRam`] is under way.
    pub async fn start_postcopy(&self) -> Result<(), QemuError> {
        self.qmp("migrate-start-postcopy", Value::Null).await.map(drop)
    }

    /// Lets a migration that waits before the switch-over go on.
    ///
    /// # Errors
    /// When none waits.
    pub async fn migrate_continue(&self) -> Result<(), QemuError> {
        self.qmp("migrate-continue", json!({ "state": "pre-switchover" })).await.map(drop)
    }

    /// Cancels the outgoing migration and waits until it has ended.
    ///
    /// # Errors
    /// A migration that completed all the same.
    pub async fn migrate_cancel(&self) -> Result<(), QemuError> {
        self.qmp("migrate_cancel", Value::Null).await?;
        let ends = [MigrationStatus::Cancelled, MigrationStatus::None, MigrationStatus::Failed];
        self.wait_migration("cancelling the migration", &ends, CANCEL_WITHIN).await.map(drop)
    }

    /// Breaks the connection of a post-copy on purpose; both ends pause.
    ///
    /// # Errors
    /// When no post-copy is under way.
    pub async fn migrate_pause(&self) -> Result<(), QemuError> {
        Ok(self.inner.qmp.execute_oob("migrate-pause", Value::Null).await.map(drop)?)
    }

    /// At the destination of a paused post-copy: waits for a new connection on the unix socket at
    /// `path`.
    ///
    /// # Errors
    /// When the post-copy is not paused.
    pub async fn migrate_recover(&self, path: &Path) -> Result<(), QemuError> {
        // This command still takes a URI; a path cannot change its scheme.
        let place = self.socket_place(path)?;
        let arguments = json!({ "uri": format!("unix:{}", place.qemu_path.to_string_lossy()) });
        self.inner.qmp.execute_oob("migrate-recover", arguments).await?;
        place.take_socket()
    }

    /// At the source of a paused post-copy: goes on over the unix socket at `path`.
    ///
    /// # Errors
    /// When the post-copy is not paused.
    pub async fn migrate_resume(&self, path: &Path) -> Result<(), QemuError> {
        self.let_connect(path)?;
        let arguments = json!({ "channels": unix_channel(path), "resume": true });
        self.qmp("migrate", arguments).await.map(drop)
    }

    /// How a migration, a save or a load stands.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn query_migrate(&self) -> Result<MigrationInfo, QemuError> {
        MigrationInfo::of(&self.qmp("query-migrate", Value::Null).await?)
    }

    /// Waits until the migration has one of the statuses `wanted`. A destination whose main loop
    /// waits for a missing page tells its status by events alone; the figures are 0 then.
    ///
    /// # Errors
    /// Any other final status, with QEMU's reason; the end of the time or of QEMU.
    pub async fn wait_migration(
        &self,
        doing: &'static str,
        wanted: &[MigrationStatus],
        within: Duration,
    ) -> Result<MigrationInfo, QemuError> {
        let deadline = Instant::now() + within;
        loop {
            // The cursor is older than the look at the level, so nothing falls between them.
            let mut events = self.events();
            let info = match tokio::time::timeout(LEVEL_WITHIN, self.query_migrate()).await {
                Ok(info) => info?,
                Err(_) => self.reported_migration()?,
            };
            if wanted.contains(&info.status) {
                return Ok(info);
            }
            if info.status.is_final() {
                let status = format!("{:?}", info.status).to_lowercase();
                return Err(QemuError::Migration { doing, status, reason: info.error });
            }
            if Instant::now() >= deadline {
                return Err(QemuError::TimedOut { doing, within });
            }
            self.next_of(&mut events, |e| e.migration_status().is_some()).await?;
        }
    }

    /// Whether QEMU has reported an event of that name since it was connected to.
    #[must_use]
    pub fn has_reported(&self, name: &str) -> bool {
        self.inner.qmp.newest_event(|e| (e.name == name).then_some(())).is_some()
    }

    /// Whether the newest of QEMU's words on it is that it runs, not that it stands still.
    #[must_use]
    pub fn last_resumed(&self) -> bool {
        let newest = self.inner.qmp.newest_event(|e| match e.name.as_str() {
            "RESUME" => Some(true),
            "STOP" => Some(false),
            _ => None,
        });
        newest == Some(true)
    }

    /// Whether its guest has powered itself off, as QEMU has reported since it was connected to.
    #[must_use]
    pub fn has_powered_off(&self) -> bool {
        let by_guest = |e: &crate::qmp::Event| {
            let off = || e.data["guest"] == true && e.data["reason"] == "guest-shutdown";
            (e.name == "SHUTDOWN").then(off)
        };
        self.inner.qmp.newest_event(by_guest) == Some(true)
    }

    /// The RAM blocks of the machine.
    ///
    /// # Errors
    /// When QEMU does not answer, or in a form that is not known.
    pub async fn ram_blocks(&self) -> Result<Vec<BlockInUse>, QemuError> {
        let answer = self.qmp("x-query-ramblock", Value::Null).await?;
        let text = answer["human-readable-text"].as_str().unwrap_or_default();
        let unknown = |line: &str| QemuError::Unexpected {
            what: "the list of RAM blocks",
            why: line.chars().take(200).collect(),
        };
        let lines = text.lines().skip(1).filter(|l| !l.trim().is_empty());
        lines.map(|l| ram_block(l).ok_or_else(|| unknown(l))).collect()
    }

    /// How the migration stands by the newest event: the status alone, without figures.
    fn reported_migration(&self) -> Result<MigrationInfo, QemuError> {
        let status = self.inner.qmp.newest_event(|e| e.migration_status().map(Value::from));
        MigrationInfo::of(&json!({ "status": status.unwrap_or_else(|| "none".into()) }))
    }

    /// Waits until the machine's state is `wanted`.
    ///
    /// # Errors
    /// The end of the time or of QEMU.
    pub async fn wait_life(
        &self,
        doing: &'static str,
        wanted: Life,
        within: Duration,
    ) -> Result<(), QemuError> {
        let deadline = Instant::now() + within;
        loop {
            let mut events = self.events();
            match self.life().await? {
                life if life == wanted => return Ok(()),
                Life::Exited => {
                    let name = self.launched().name.to_string();
                    return Err(QemuError::Exited { name, exit: self.exited().await });
                }
                _ if Instant::now() >= deadline => {
                    return Err(QemuError::TimedOut { doing, within });
                }
                _ => {}
            }
            self.next_of(&mut events, |_| true).await?;
        }
    }

    /// Waits for an event that `wanted` picks, or until it is time to look at the level again.
    async fn next_of(
        &self,
        events: &mut crate::qmp::EventCursor,
        wanted: impl FnMut(&crate::qmp::Event) -> bool,
    ) -> Result<(), QemuError> {
        match events.wait_for("a change of state", LOOK_AGAIN, wanted).await {
            Ok(_) | Err(WaitError::TimedOut(..)) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Whether the memory stays in a file when QEMU ends.
    #[must_use]
    pub fn keeps_memory(&self) -> bool {
        matches!(self.launched().memory, MemorySource::Shared { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_of_qemu_is_known_or_refused() {
        let info = MigrationInfo::of(&json!({
            "status": "postcopy-active",
            "ram": {"transferred": 5, "remaining": 3, "total": 8, "dirty-sync-count": 2},
        }))
        .unwrap();
        assert_eq!((info.status, info.rounds), (MigrationStatus::PostcopyActive, 2));
        assert_eq!(MigrationInfo::of(&json!({})).unwrap().status, MigrationStatus::None);
        assert!(MigrationInfo::of(&json!({"status": "novel"})).is_err());
    }

    #[test]
    fn a_line_of_the_list_of_blocks_is_read() {
        let line = "  /rom@etc/acpi/tables    4 KiB  0x0000000010080000 0x0000000000020000 \
                    0x0000000000200000 0x00007f9d0c800000  ro";
        let block = BlockInUse {
            name: "/rom@etc/acpi/tables".into(),
            used_bytes: 0x20000,
            host_address: 0x7f9d_0c80_0000,
        };
        assert_eq!(ram_block(line), Some(block));
        assert_eq!(ram_block("nonsense"), None);
    }

    #[test]
    fn a_path_cannot_become_another_transport() {
        let c = file_channel(Path::new("exec:rm,offset=1"));
        assert_eq!(c[0]["addr"]["transport"], "file");
        assert_eq!(c[0]["addr"]["filename"], "exec:rm,offset=1");
    }
}
