//! The relay processes of this site: started, found, ended.
//!
//! ```text
//! given open:  configuration, identity, listening sockets, at the source the layers of the disk and
//!              the memory of a QEMU that has a private copy, at the destination the file of the memory
//!              and what the machine left there
//! seen:        programs, the base image and the index of its blocks, the list of revoked
//!              certificates; at the destination its QEMU's sockets, and the directory in which it
//!              fills the disk
//! ```
//!
//! Where QEMUs have uids of their own relays have, too, and nothing else of the site's is there for
//! them ([`Companion`]). The site's key is: a relay speaks for its site.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use godwit_migrate::relay::{Given, Meeting, OwnMemory, RelayCommand, RelayDisk, RelayRole, Visit};
use godwit_migrate::{RelayClient, RelayConfig};
use godwit_qemu::{
    Companion, Confine, Machine, MemoryFile, MemoryGroups, MemorySource, NotStarted, RAM_BLOCK,
};
use godwit_transfer::{Identity, Trust};
use godwit_types::{Fault, Mib};

use super::course::{End, Migration};
use super::faults::into_fault;
use super::held::HeldMemories;
use super::record::MachineRecord;
use super::visits::{Lent, Visits};
use super::{SiteDirs, SiteOptions, filling, ran};

/// How long a relay may take until it can be steered, and until it has ended when it is told to.
const RELAY_WITHIN: Duration = Duration::from_secs(20);

/// How long a relay's process may take to go once it has said that it ends.
const END_WITHIN: Duration = Duration::from_secs(5);
/// The most memory that a relay may take, with what the kernel caches of the disk it fills.
const MEMORY: Mib = Mib(1024);
/// The list of revoked certificates where relays read it.
const REVOKED: &str = "revoked.json";
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

/// What a relay is given of a machine's memory, besides its QEMU's stream.
#[derive(Debug)]
pub(super) enum GuestMemory {
    /// Nothing.
    Unseen,
    /// At the destination: the file that it is, for writing, and what the machine left there.
    File { file: File, left: Option<Lent> },
    /// At the source: the process whose private copy it is of the sealed memory at `of`, for reading.
    Copy { of: PathBuf, place: OwnMemory, memory: File, pagemap: File, sealed: File },
}

/// Tells a relay that the QEMU for which it waits listens. Dropped before, it waits no more, and
/// gives the migration up.
#[derive(Debug)]
pub(super) struct Listens(PipeWriter);

impl Listens {
    /// One, and what a relay hears it by.
    pub(super) fn new() -> Result<(Self, PipeReader), Fault> {
        let made = std::io::pipe();
        let (read, write) =
            made.map_err(|e| Fault::internal(format!("making a pipe for a relay: {e}")))?;
        Ok((Self(write), read))
    }

    /// It does.
    pub(super) fn announce(mut self) {
        // A relay that has ended says itself why.
        let _ = self.0.write_all(&[1]);
    }
}

impl GuestMemory {
    /// Makes the file of the memory of a machine that comes, before its QEMU does, and opens it.
    pub(super) fn of_arrival(path: &Path, size: Mib, left: Option<Lent>) -> Result<Self, Fault> {
        MemoryFile::create(path, size, None).map_err(into_fault)?;
        Self::open(path, left)
    }

    /// Opens the file at `path`.
    pub(super) fn of_file(path: &Path) -> Result<Self, Fault> {
        Self::open(path, None)
    }

    fn open(path: &Path, left: Option<Lent>) -> Result<Self, Fault> {
        let no_follow = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
        let open = File::options().read(true).write(true).custom_flags(no_follow).open(path);
        let file = open.map_err(|e| Fault::io("opening", path, &e))?;
        Ok(Self::File { file, left })
    }

    /// That of a machine that leaves; without it the move only takes longer.
    pub(super) async fn of_departure(machine: &Machine) -> Self {
        let MemorySource::PrivateOf { path } = machine.launch().memory else { return Self::Unseen };
        let open = async {
            let fail = |e| Fault::io("opening the memory over", &path, &e);
            let sealed = File::open(&path).map_err(fail)?;
            // QEMU maps the file that is at that path.
            let files = machine.memory().map_err(into_fault)?.files().map_err(fail)?;
            let blocks = machine.ram_blocks().await.map_err(into_fault)?;
            Ok::<_, Fault>(files.zip(Some((sealed, blocks))))
        };
        match open.await {
            Ok(Some(((memory, pagemap, address), (sealed, blocks)))) => {
                let bytes = machine.launch().spec.memory.bytes();
                let others = blocks.into_iter().filter(|b| b.name != RAM_BLOCK);
                let blocks = others.map(|b| (b.name, b.host_address, b.used_bytes)).collect();
                let place = OwnMemory { address, bytes, blocks };
                Self::Copy { of: path, place, memory, pagemap, sealed }
            }
            Ok(None) => Self::Unseen,
            Err(error) => {
                tracing::warn!(%error, "a machine's own pages are not read from outside its QEMU");
                Self::Unseen
            }
        }
    }
}

/// The relays of one site.
pub(super) struct Relays {
    dirs: SiteDirs,
    trust: Trust,
    /// The program whose role `relay CONFIG` is a relay.
    program: PathBuf,
    /// How long a relay keeps a silent link.
    patience: Duration,
    confine: Option<Confine>,
    groups: Option<MemoryGroups>,
    /// Memory that both sites of a move hold.
    pub(super) held: HeldMemories,
    visits: Arc<Visits>,
}

impl Relays {
    /// As the site is run, in its directories. `trust` says whom they believe.
    pub(super) fn new(
        dirs: &SiteDirs,
        trust: &Trust,
        site: &SiteOptions,
        (confine, groups): (&Option<Confine>, &Option<MemoryGroups>),
        (held, visits): (HeldMemories, Arc<Visits>),
    ) -> Self {
        Self {
            dirs: dirs.clone(),
            trust: trust.clone(),
            program: site.relay_program.clone(),
            patience: site.link_patience,
            confine: confine.clone(),
            groups: groups.clone(),
            held,
            visits,
        }
    }

    /// Starts the relay of this end, as a process that outlives this one.
    pub(super) async fn start(
        &self,
        record: &MachineRecord,
        meeting: Meeting,
        disk: Option<RelayDisk>,
        given: (Part, GuestMemory),
    ) -> Result<RelayClient, Fault> {
        self.start_before(record, meeting, disk, given, None).await
    }

    /// As [`Relays::start`], of one that meets the other relay while its QEMU is started, and waits
    /// then for the word of [`Listens`].
    pub(super) async fn start_before(
        &self,
        record: &MachineRecord,
        meeting: Meeting,
        disk: Option<RelayDisk>,
        (part, memory): (Part, GuestMemory),
        listens: Option<PipeReader>,
    ) -> Result<RelayClient, Fault> {
        let migration = record
            .migration
            .clone()
            .ok_or_else(|| Fault::internal("a relay for a machine that is in no migration"))?;
        let paths = MovePaths::of(&self.dirs.run, &migration);
        let (role, generation) = match migration.end() {
            End::Source => {
                let next = migration.next().unwrap_or_else(|| record.generation.next());
                (RelayRole::Source, next)
            }
            End::Destination => (RelayRole::Destination, record.generation),
        };
        let fail = |what: &str, e: &std::io::Error| {
            Fault::internal(format!("{what} in {}: {e}", paths.dir.display()))
        };
        paths.make().map_err(|e| fail("making a place for a relay", &e))?;
        let mut config = RelayConfig {
            role,
            meeting,
            migration: migration.id,
            generation,
            peer: migration.peer.clone(),
            keys: self.dirs.keys().join("identity"),
            revoked: (*self.trust.revocations()).clone(),
            revoked_file: Some(self.dirs.for_relays().join(REVOKED)),
            link_patience_ms: self.patience.as_millis() as u64,
            control: paths.control.clone(),
            qemu: paths.qemu.clone(),
            resume: part != Part::Whole,
            memory: part != Part::Disk,
            disk,
            held: None,
            visit: None,
            own: None,
            given: None,
        };
        let commit = match (migration.end(), part) {
            (End::Destination, Part::Whole) => Some(ran::open(&self.dirs.vm(record.vm))?),
            // It runs there already, and the rest of its memory is awaited.
            (End::Destination, Part::Rest) => {
                let dir = self.dirs.vm(record.vm);
                ran::says(&dir).map(|_| ran::open(&dir)).transpose()?
            }
            (End::Destination, Part::Disk) | (End::Source, _) => None,
        };
        let held = match part {
            Part::Whole => self.held.take(migration.id),
            Part::Rest | Part::Disk => None,
        };
        config.held = held.as_ref().map(|h| h.memory.clone());
        let file = held.as_ref().map(|h| h.open.file().try_clone()).transpose();
        let file = file.map_err(|e| fail("handing on the memory that both sites hold", &e))?;
        // What is held is what it is a copy of, or its own pages are not told from the others.
        let other = |of: &Path| held.as_ref().is_some_and(|h| h.open.path() != of);
        let (guest, left) = match memory {
            GuestMemory::Copy { of, place, memory, pagemap, sealed } if !other(&of) => {
                config.own = Some(place);
                ([Some(memory), Some(pagemap), Some(sealed)], None)
            }
            GuestMemory::File { file, left } => {
                let under = left.as_ref().and_then(|left| left.under.as_ref());
                let under = under.and_then(|under| under.file().try_clone().ok());
                ([Some(file), None, under], left)
            }
            GuestMemory::Copy { .. } | GuestMemory::Unseen => ([None, None, None], None),
        };
        let known = match part {
            Part::Whole => self.visit(record, &migration, left.as_ref()),
            Part::Rest | Part::Disk => Memory::default(),
        };
        config.visit = known.visit.as_ref().map(|(visit, _)| visit.clone());
        let guest_file = guest[0].is_some() && role == RelayRole::Destination;
        let known = Memory { held: file, guest, ..known };
        let open = give(&mut config, (commit, listens), known)?;
        let input = written(&config, &paths.config)
            .map_err(|e| fail("writing a relay's configuration", &e))?;
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&paths.log)
            .map_err(|e| fail("making a relay's log", &e))?;
        // Pages that it fills in of a machine's memory count as its own.
        let filled_in = if guest_file { record.memory } else { Mib(0) };
        let limit = Mib(MEMORY.0.saturating_add(filled_in.0));
        let groups = self.groups.as_ref();
        let group = groups
            .map(|g| g.make_named(&paths.group(&migration), limit).map_err(into_fault))
            .transpose()?;
        let mut readable = vec![self.dirs.for_relays()];
        let mut writable = Vec::new();
        let mut filled = None;
        match &config.disk {
            Some(RelayDisk::Source { base, index, .. }) => {
                readable.push(base.clone());
                readable.extend(index.clone());
            }
            Some(RelayDisk::Destination { base, mid, .. }) => {
                readable.push(base.clone());
                writable.extend(mid.parent().map(Path::to_owned));
                filled = Some(self.dirs.vm(record.vm));
            }
            None => {}
        }
        writable.extend(hold_dir());
        let relay = Companion {
            program: self.program.clone(),
            args: vec!["relay".into(), paths.config.clone().into(), "--given".into()],
            env: kept_environment().map(|(name, value)| (name.into(), value)).collect(),
            meeting: paths.dir.clone(),
            readable,
            writable,
            uids: self.confine.as_ref().map(|c| c.uids),
            group: group.clone(),
            open,
            input,
            log,
        };
        let mut child = relay
            .spawn(|uid| match &filled {
                Some(dir) => filling::make(dir, uid),
                None => Ok(()),
            })
            .map_err(|e| match e {
                NotStarted::Qemu(e) => into_fault(e),
                NotStarted::Caller(f) => f,
            })?;
        let attach = RelayClient::attach_within(&paths.control, RELAY_WITHIN);
        let client = tokio::select! {
            client = tokio::time::timeout(RELAY_WITHIN, attach) => match client {
                Ok(client) => client.map_err(into_fault),
                Err(_) => Err(Fault::internal("a relay does not answer")),
            },
            status = child.wait() => Err(Fault::internal(format!(
                "the relay ended at its start ({}): {}",
                status.map_or_else(|e| e.to_string(), |s| s.to_string()),
                last_line(&paths.log),
            ))),
        };
        if client.is_err() {
            let _ = child.start_kill();
        }
        // Reaped when it ends; it is not this task's to end.
        tokio::spawn(async move {
            let _ = child.wait().await;
            // While it ran the memory was in use.
            drop((held, left));
            if let Some(group) = group {
                if group.was_outgrown() {
                    tracing::error!(limit = %group.limit, "a relay wanted more than its memory and was ended");
                }
                group.remove();
            }
        });
        client
    }

    /// What is known of an earlier visit of a machine to where it goes, and where that of its pages is
    /// written which serves its way back.
    fn visit(&self, record: &MachineRecord, migration: &Migration, left: Option<&Lent>) -> Memory {
        match migration.end() {
            End::Source => {
                let visit = self.visits.marks(record.vm, &migration.peer);
                Memory { visit, ..Memory::default() }
            }
            End::Destination => {
                let visit = left.and_then(|l| Some((l.visit.clone(), l.file.try_clone().ok()?)));
                let arrived = self.visits.comes(record.vm, migration.id, record.memory);
                Memory { visit, arrived, ..Memory::default() }
            }
        }
    }

    /// Removes what a move that is over has left for its relay.
    pub(super) fn clear(&self, migration: &Migration) {
        let paths = MovePaths::of(&self.dirs.run, migration);
        // What stays is removed when the site starts next.
        let _ = std::fs::remove_dir_all(&paths.dir);
        if let Some(groups) = &self.groups {
            groups.named(&paths.group(migration), MEMORY).remove();
        }
    }

    /// Ends this site's relay of a migration, if it is there, and waits until its process is gone:
    /// what it held is free then. One that does not listen is killed.
    pub(super) async fn end(&self, migration: &Migration) {
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

/// What a relay is given open of what is known of a machine's memory.
#[derive(Debug, Default)]
struct Memory {
    held: Option<File>,
    visit: Option<(Visit, File)>,
    arrived: Option<File>,
    /// What it is itself, as [`GuestMemory`] has it: memory, page map, sealed memory.
    guest: [Option<File>; 3],
}

/// Opens what a relay is to have open, and says so in its configuration.
fn give(
    config: &mut RelayConfig,
    (commit, listens): (Option<File>, Option<PipeReader>),
    memory: Memory,
) -> Result<Vec<OwnedFd>, Fault> {
    let listen = |path: &Path| -> Result<OwnedFd, Fault> {
        listen(path).map(OwnedFd::from).map_err(|e| Fault::io("listening on", path, &e))
    };
    let identity = Identity::load(&config.keys).map_err(|e| Fault::of(&e))?;
    let identity = Given::identity(&identity)
        .map_err(|e| Fault::internal(format!("handing a relay its identity: {e}")))?;
    let control = listen(&config.control)?;
    let mut given = Given {
        control: Given::number(&control),
        identity: Given::number(&identity),
        ..Given::default()
    };
    let mut open = vec![control, identity];
    if config.role == RelayRole::Source {
        let qemu = listen(&config.qemu)?;
        given.qemu = Some(Given::number(&qemu));
        open.push(qemu);
    }
    match &config.disk {
        Some(RelayDisk::Source { layers, .. }) => {
            for path in layers {
                let file = File::open(path).map_err(|e| Fault::io("opening", path, &e))?;
                given.layers.push(Given::number(&file));
                open.push(file.into());
            }
        }
        Some(RelayDisk::Destination { nbd, .. }) => {
            let nbd = listen(nbd)?;
            given.nbd = Some(Given::number(&nbd));
            open.push(nbd);
        }
        None => {}
    }
    let [of_guest, pagemap, sealed] = memory.guest;
    let visit = memory.visit.map(|(_, file)| file);
    for (file, number) in [
        (commit, &mut given.commit),
        (memory.held, &mut given.held),
        (visit, &mut given.visit),
        (memory.arrived, &mut given.arrived),
        (of_guest, &mut given.memory),
        (pagemap, &mut given.pagemap),
        (sealed, &mut given.sealed),
    ] {
        *number = file.as_ref().map(Given::number);
        open.extend(file.map(OwnedFd::from));
    }
    given.listens = listens.as_ref().map(Given::number);
    open.extend(listens.map(OwnedFd::from));
    config.given = Some(given);
    Ok(open)
}

/// A unix socket for our user at `path`, in place of what a relay that is gone had there.
fn listen(path: &Path) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Writes a configuration down, and opens it for whom it is meant for.
fn written(config: &RelayConfig, path: &Path) -> std::io::Result<File> {
    let text = serde_json::to_vec_pretty(config)?;
    std::fs::OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?
        .write_all(&text)?;
    File::open(path)
}

/// Puts the list of revoked certificates where relays read it again and again.
pub(super) fn publish_revoked(dirs: &SiteDirs, trust: &Trust) -> Result<(), Fault> {
    /// The list is read and written by one at a time, so that an older one is never the last.
    static TELLING: Mutex<()> = Mutex::new(());
    let _one = TELLING.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = dirs.for_relays();
    let failed = |e: std::io::Error| Fault::io("writing below", &dir, &e);
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(&dir).map_err(failed)?;
    let part = dir.join("part");
    trust.revocations().save(&part).map_err(|e| Fault::of(&e))?;
    std::fs::set_permissions(&part, std::fs::Permissions::from_mode(0o644))
        .and_then(|()| std::fs::rename(&part, dir.join(REVOKED)))
        .map_err(failed)
}

/// Where a test has relays wait.
fn hold_dir() -> Option<PathBuf> {
    let dir = std::env::var_os(godwit_hold::VARIABLE).filter(|_| cfg!(debug_assertions))?;
    Some(PathBuf::from(dir)).filter(|dir| dir.is_dir())
}

/// What a relay keeps of this daemon's environment, which may hold secrets.
fn kept_environment() -> impl Iterator<Item = (&'static str, std::ffi::OsString)> {
    const KEPT: &[&str] = &["PATH", "GODWIT_LOG", "RUST_BACKTRACE"];
    // Where tests have processes wait.
    const TESTED: &[&str] = if cfg!(debug_assertions) { &[godwit_hold::VARIABLE] } else { &[] };
    KEPT.iter().chain(TESTED).filter_map(|name| Some((*name, std::env::var_os(name)?)))
}

/// Kills every relay whose configuration is in `dir`, and waits until they are gone; whether they
/// are.
pub(super) async fn end_all_below(dir: &Path) -> bool {
    let deadline = tokio::time::Instant::now() + END_WITHIN;
    let found = || relay_process(|config| Path::new(config).parent() == Some(dir));
    while let Some(pid) = found() {
        if tokio::time::Instant::now() >= deadline {
            tracing::warn!(dir = %dir.display(), "a relay does not end");
            return false;
        }
        if let Some(pid) = rustix::process::Pid::from_raw(pid) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    true
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
    /// The name of the relay's control group.
    fn group(&self, migration: &Migration) -> String {
        let dir = self.dir.file_name().unwrap_or_default().to_string_lossy();
        format!("{dir}-{}", migration.attempt)
    }

    /// Makes the directory, nobody's but ours; QEMU and relay are let through when there are any.
    pub(super) fn make(&self) -> std::io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)
    }
}

fn last_line(log: &Path) -> String {
    let mut text = Vec::new();
    let read = std::fs::File::open(log).and_then(|mut file| {
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(2000)))?;
        file.take(2000).read_to_end(&mut text)
    });
    if let Err(error) = read {
        tracing::debug!(log = %log.display(), %error, "a log is not read");
    }
    let text = String::from_utf8_lossy(&text).into_owned();
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
        let mut migration = Migration::departure(id, name, None);
        migration.attempt = 9_999;
        let paths = MovePaths::of(&run, &migration);
        assert!(paths.control.as_os_str().len() <= 107);
    }
}
