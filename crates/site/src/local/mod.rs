//! This host as a site: its machines, images and pool.
//!
//! A machine is a QEMU process of its own session. The daemon that started it may end; the next
//! one finds the machine by its record and adopts it. Of a machine that left, the highest generation
//! seen stays, so that an older one is refused for good.

mod adopt;
mod allowed;
mod answers;
mod apart;
mod arrivals;
mod back;
mod carry;
mod course;
mod departures;
mod dirs;
mod dock;
mod drive;
mod entry;
mod exec;
mod faults;
mod filling;
mod held;
mod images;
mod launch;
mod logs;
mod look;
mod machines;
mod meet;
mod moves;
mod moving;
mod neighbours;
mod net;
mod owner;
mod parts;
mod pool;
mod ports;
mod progress;
mod promise;
mod ran;
mod reboots;
mod record;
mod relays;
mod report;
mod resume;
mod room;
mod sched;
mod screens;
mod scrub;
mod starts;
mod steps;
mod stop;
mod stored;
mod substrates;
mod table;
mod tombs;
mod travellers;
mod visits;
mod waiting;
mod warrant;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_back;
#[cfg(test)]
mod tests_owner;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use godwit_transfer::{Identity, Revocations, Trust};
use godwit_types::{Code, Fault, Name, SiteKind};
use tokio::net::UnixStream;

use super::{ByteStream, Call, SiteHost, SiteReply, SiteRequest, StreamRequest};

use allowed::Action;
pub use apart::Uids;
pub use dirs::SiteDirs;
pub use images::{image_info, images_of, in_use};
pub use promise::MACHINE_OVERHEAD_MIB;

/// The ports that machines of a site may publish when nothing else is said: those that need no right.
pub const PUBLISH_PORTS: std::ops::RangeInclusive<u16> = 1024..=65535;

/// How a site is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SiteOptions {
    /// The address under which other sites' relays reach this site's.
    pub relay_address: std::net::IpAddr,
    /// Nobody can reach this site's relays: they dial those of the other site, also where a
    /// machine comes here.
    pub behind_nat: bool,
    /// The program whose role `relay CONFIG` is a relay: usually this one.
    pub relay_program: PathBuf,
    /// Bytes that the pool's store may hold on disk.
    pub pool_bytes: u64,
    /// Bytes of encoded pages that the store keeps in memory.
    pub store_memory_bytes: u64,
    /// Bytes of tmpfs that sealed memory may take before what no machine maps is dropped; half of
    /// that tmpfs when left out.
    pub memory_cache_bytes: Option<u64>,
    /// Bytes of memory that may be kept of machines that have left, for when they come back; a quarter
    /// of what sealed memory may take when left out. None of it at a device.
    pub memory_visits_bytes: Option<u64>,
    /// Bytes of memory that machines may be promised; what the host has, less a reserve, when left
    /// out.
    pub memory_promise_bytes: Option<u64>,
    /// How often all that is stored is read and checked; once a day when left out.
    pub scrub_every: Option<std::time::Duration>,
    /// The ports of this host that machines may publish.
    pub publish_ports: std::ops::RangeInclusive<u16>,
    /// QEMUs that wait for each substrate that was activated recently; 0 keeps none.
    pub waiting: usize,
    /// Whether the siblings among this host's vCPUs are scheduled with each other in mind.
    pub co_schedule: bool,
    /// Whether each QEMU gets a uid of its own, and from where.
    pub uids: Uids,
    /// How long a relay keeps a silent link.
    pub link_patience: std::time::Duration,
}

impl SiteOptions {
    /// A site that is reached at `relay_address`, with this program as its relay, a pool of at
    /// most 64 GiB and 256 MiB of it in memory.
    ///
    /// # Errors
    /// When this program does not know where it is.
    pub fn new(relay_address: std::net::IpAddr) -> Result<Self, Fault> {
        let relay_program = std::env::current_exe()
            .map_err(|e| Fault::internal(format!("finding this program: {e}")))?;
        Ok(Self {
            relay_address,
            behind_nat: false,
            relay_program,
            pool_bytes: 64 << 30,
            store_memory_bytes: 256 << 20,
            memory_cache_bytes: None,
            memory_visits_bytes: None,
            memory_promise_bytes: None,
            scrub_every: None,
            publish_ports: PUBLISH_PORTS,
            waiting: 1,
            co_schedule: false,
            uids: Uids::default(),
            link_patience: godwit_transfer::PATIENCE,
        })
    }
}

/// This host.
pub struct LocalSite {
    name: Name,
    parts: Arc<parts::Parts>,
    moves: moving::Moves,
    docks: Arc<dock::Docks>,
    starts: starts::Starts,
    neighbours: neighbours::Neighbours,
    trust: Trust,
    options: SiteOptions,
    screens: screens::Screens,
    sched: std::sync::Mutex<Option<godwit_sched_host::service::Service>>,
}

impl std::fmt::Debug for LocalSite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalSite").field("name", &self.name).finish_non_exhaustive()
    }
}

impl LocalSite {
    /// Opens the site: makes its directories, finds out how guests are run here, and adopts the
    /// machines that run. `trust` says whom its relays believe.
    ///
    /// # Errors
    /// When a directory cannot be made or no QEMU is there.
    pub async fn open(
        name: Name,
        dirs: SiteDirs,
        trust: Trust,
        options: SiteOptions,
    ) -> Result<Arc<Self>, Fault> {
        dirs.make()?;
        report::check_tmpfs(&dirs.memory)?;
        let confine = apart::confine(options.uids, &dirs)?;
        let groups = apart::groups(&dirs);
        relays::publish_revoked(&dirs, &trust)?;
        let images = Arc::new(images::Images::open(name.clone(), &dirs.images)?);
        let how = (&confine, &groups);
        let substrates = substrates::Substrates::open(name.clone(), &dirs, &options, how).await?;
        let pool = &substrates.pool;
        let sched = std::sync::Mutex::new(options.co_schedule.then(sched::start).flatten());
        waiting::sweep(&dirs).await;
        let visits = Arc::new(visits::Visits::open(
            dirs.visits(),
            visits_budget(&dirs, pool.memory_budget(), options.memory_visits_bytes)?,
        )?);
        let spare = Arc::clone(&visits);
        pool.gives_way_first(Box::new(move |bytes| spare.free(bytes)));
        let promise = options.memory_promise_bytes;
        let promise = (promise, Arc::clone(&visits));
        let machines = table::Machines::open(name.clone(), dirs.clone(), pool.clone(), promise)?;
        let room = room::Room::new(name.clone(), dirs.clone(), pool.clone());
        let held = held::HeldMemories::new(pool.clone());
        let how = (&confine, &groups);
        let relays = relays::Relays::new(&dirs, &trust, &options, how, (held, visits));
        let reach = meet::Reach::new(name.clone(), options.relay_address, options.behind_nat);
        let networks = Arc::new(net::SiteNetworks::of(
            &dirs.data,
            ports::Ports::new(name.clone(), options.publish_ports.clone()),
        ));
        let launcher = launch::Launcher::probe(
            name.clone(),
            dirs.clone(),
            pool.clone(),
            Arc::clone(&networks),
            (confine, groups),
        )
        .await?;
        let warrants = warrant::Warrants::new(name.clone(), trust.clone());
        let parts = Arc::new(parts::Parts {
            name: name.clone(),
            dirs,
            images,
            launcher,
            networks,
            machines,
            room,
            substrates,
            relays,
            reach,
            warrants,
        });
        let moves = moving::Moves::new(&parts);
        let docks = Arc::new(dock::Docks::new(Arc::clone(&parts)));
        let starts = starts::Starts::new(Arc::clone(&parts));
        let site = Arc::new(Self {
            name,
            parts,
            moves,
            docks,
            starts,
            neighbours: neighbours::Neighbours::default(),
            trust,
            options,
            screens: screens::Screens::new(screens::SCREENS_AT_ONCE),
            sched,
        });
        site.adopt_all().await?;
        site.sweep_strays().await;
        scrub::start(&site, site.options.scrub_every);
        net::start(&site);
        logs::start(&site);
        Ok(site)
    }

    /// The directories.
    #[must_use]
    pub fn dirs(&self) -> &SiteDirs {
        &self.parts.dirs
    }

    /// Takes the center's list of revoked certificates. It counts at once, also when it cannot be
    /// kept for the next daemon.
    fn accept_revocations(&self, list: Revocations) -> Result<(), Fault> {
        let newer = self.trust.revoke(list.clone()).map_err(|e| Fault::of(&e))?;
        if list.number < self.trust.revocations().number {
            return Ok(());
        }
        if newer {
            tracing::info!(number = list.number, "a newer list of revoked certificates");
        }
        // Relays of earlier versions read it there. The center's own site shares its list, and has it
        // without being told.
        list.save(&self.parts.dirs.revoked()).map_err(|e| Fault::of(&e))?;
        relays::publish_revoked(&self.parts.dirs, &self.trust)
    }
}

#[async_trait]
impl SiteHost for LocalSite {
    fn name(&self) -> &Name {
        &self.name
    }

    async fn answer(&self, request: SiteRequest, call: Call) -> Result<SiteReply, Fault> {
        self.handle(request, call).await.map_err(|f| advise(&self.name, f))
    }

    async fn open(&self, request: StreamRequest) -> Result<ByteStream, Fault> {
        let (vm, display) = match request {
            StreamRequest::Console { vm } => (vm, false),
            StreamRequest::Display { vm } => (vm, true),
            StreamRequest::SubstrateExport { id } => return self.parts.substrates.export(id).await,
            StreamRequest::SubstrateSupply { id } => return Ok(self.parts.substrates.supply(id)),
            StreamRequest::SubstrateTake { content } => {
                return Ok(self.parts.substrates.take(content, None));
            }
            StreamRequest::SubstrateTakeAmong(t) => {
                return Ok(self.parts.substrates.take(t.content, Some(t.among)));
            }
            StreamRequest::SubstrateImport { name, content } => {
                // A file says of itself that it is public; the center's own copy is what it is.
                let not_public_as_it_was = content.is_none();
                return Ok(self.parts.substrates.import(godwit_substrate::ImportAs {
                    name,
                    content,
                    not_public_as_it_was,
                    ..Default::default()
                }));
            }
            StreamRequest::SubstrateUpload(t) => {
                return Ok(self.parts.substrates.import(godwit_substrate::ImportAs {
                    name: Some(t.name),
                    id: Some(t.id),
                    owner: Some(t.owner),
                    // What a file says of itself makes nothing public.
                    not_public: true,
                    among: Some(t.among),
                    ..Default::default()
                }));
            }
        };
        let place = self.screens.place(&self.name)?;
        let action = if display { Action::Screen } else { Action::Console };
        let machine = self.parts.machines.qemu_for(vm, action).await?;
        let paths = machine.paths();
        let path = if display { &paths.vnc } else { &paths.console };
        let stream = UnixStream::connect(path).await.map_err(|e| {
            Fault::unavailable(format!("connecting to {} of the machine: {e}", path.display()))
        })?;
        Ok(Box::pin(screens::Shown::new(stream, place)))
    }
}

/// How many bytes may be kept of machines that have left.
fn visits_budget(dirs: &SiteDirs, sealed: u64, wanted: Option<u64>) -> Result<u64, Fault> {
    let me = Identity::load(&dirs.keys().join("identity")).map_err(|e| Fault::of(&e))?;
    Ok(match me.me().kind {
        // It is one person's, and does not know whose the machines are that come to it.
        SiteKind::Device => 0,
        SiteKind::Center | SiteKind::Ap => wanted.unwrap_or(sealed / 4),
    })
}

/// Says what to do about a site that is full, where nothing better was said.
fn advise(site: &Name, f: Fault) -> Fault {
    if f.code != Code::NoRoom || f.hint.is_some() {
        return f;
    }
    f.hint(format!(
        "make room at '{site}': delete machines or substrates there, or give it more space; see: \
         godwit site list -o wide, godwit pool status"
    ))
}
