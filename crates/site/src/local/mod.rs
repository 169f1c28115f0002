//! This host as a site: its machines, images and pool.
//!
//! A machine is a QEMU process of its own session. The daemon that started it may end; the next
//! one finds the machine by its record and adopts it. Of a machine that left, the highest generation
//! seen stays, so that an older one is refused for good.

mod adopt;
mod allowed;
mod answers;
mod apart;
mod carry;
mod dirs;
mod dock;
mod entry;
mod exec;
mod filling;
mod logs;
mod machines;
mod meet;
mod moves;
mod neighbours;
mod pool;
mod promise;
mod quit;
mod ran;
mod record;
mod relays;
mod report;
mod resume;
mod sched;
mod screens;
mod scrub;
mod stop;
mod stored;
mod tombs;
mod users;
mod waiting;
mod warrant;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use godwit_image::{Image, ImageCache, Recipe};
use godwit_qemu::{Accel, Confine, MemoryGroups};
use godwit_transfer::{Revocations, Trust};
use godwit_types::{Arch, Code, Fault, Name, VmId};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, RwLock, Semaphore};

use super::{ByteStream, Call, ImageInfo, SiteHost, SiteReply, SiteRequest, StreamRequest};
use crate::Progress;

use allowed::Action;
pub use apart::Uids;
pub use dirs::SiteDirs;
use entry::Entry;
pub use promise::MACHINE_OVERHEAD_MIB;
use record::MachineRecord;
pub use users::in_use;

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
    /// Bytes of memory that machines may be promised; what the host has, less a reserve, when left
    /// out.
    pub memory_promise_bytes: Option<u64>,
    /// How often all that is stored is read and checked; once a day when left out.
    pub scrub_every: Option<std::time::Duration>,
    /// QEMUs that wait for each substrate that was activated of late; 0 keeps none.
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
            memory_promise_bytes: None,
            scrub_every: None,
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
    dirs: SiteDirs,
    images: ImageCache,
    accel: BTreeMap<&'static str, Accel>,
    qemu: String,
    machines: RwLock<BTreeMap<VmId, Arc<Mutex<Entry>>>>,
    tombs: tombs::Tombs,
    /// Activations that go on at once.
    turns: Arc<Semaphore>,
    /// One promise of memory at a time, until its machine is entered.
    promising: Mutex<()>,
    /// The memory of machines made by this daemon: their records may not be written yet.
    sizes: std::sync::Mutex<std::collections::HashMap<VmId, godwit_types::Mib>>,
    pool: godwit_substrate::Pool,
    shells: godwit_substrate::Shells,
    moves: moves::Moves,
    neighbours: neighbours::Neighbours,
    trust: Trust,
    options: SiteOptions,
    confine: Option<Confine>,
    groups: Option<MemoryGroups>,
    screens: screens::Screens,
    sched: std::sync::Mutex<Option<godwit_sched_host::service::Service>>,
    me: std::sync::Weak<Self>,
}

impl std::fmt::Debug for LocalSite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalSite").field("name", &self.name).finish_non_exhaustive()
    }
}

/// How many activations go on at once: each waits for its guest half of the time.
fn at_once() -> usize {
    2 * std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

const fn arch_key(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "x86-64",
        Arch::Aarch64 => "aarch64",
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
        let images = ImageCache::open(&dirs.images).map_err(|e| Fault::of(&e))?;
        let binaries = godwit_qemu::Binaries::default();
        let qemu = godwit_qemu::doctor::qemu_version(binaries.of(Arch::X86_64))
            .await
            .map_err(|e| Fault::of(&e).hint("see what is missing with: godwit doctor"))?;
        let mut accel = BTreeMap::new();
        for arch in [Arch::X86_64, Arch::Aarch64] {
            let cache = dirs.data.join(format!("accel-{}.json", arch_key(arch)));
            match godwit_qemu::accel::probe(binaries.of(arch), arch, &cache).await {
                Ok(p) => {
                    accel.insert(arch_key(arch), p.accel);
                }
                Err(e) => tracing::info!(%arch, error = %e, "guests of this kind cannot run here"),
            }
        }
        let pool = Self::open_pool(&dirs, &options)?;
        let sched = std::sync::Mutex::new(options.co_schedule.then(sched::start).flatten());
        waiting::sweep(&dirs).await;
        let shells = waiting::shells(&pool, &dirs, confine.clone(), groups.clone());
        let tombs = tombs::Tombs::open(dirs.tombs())?;
        let site = Arc::new_cyclic(|me| Self {
            name,
            dirs,
            images,
            accel,
            qemu,
            machines: RwLock::default(),
            tombs,
            turns: Arc::new(Semaphore::new(at_once())),
            promising: Mutex::default(),
            sizes: std::sync::Mutex::default(),
            pool,
            shells,
            moves: moves::Moves::default(),
            neighbours: neighbours::Neighbours::default(),
            trust,
            options,
            confine,
            groups,
            screens: screens::Screens::new(screens::SCREENS_AT_ONCE),
            sched,
            me: me.clone(),
        });
        site.adopt_all().await?;
        site.sweep_strays().await;
        scrub::start(&site, site.options.scrub_every);
        logs::start(&site);
        Ok(site)
    }

    fn whole(&self) -> Result<Arc<Self>, Fault> {
        self.me.upgrade().ok_or_else(|| Fault::unavailable("the site is being closed"))
    }

    /// The directories.
    #[must_use]
    pub const fn dirs(&self) -> &SiteDirs {
        &self.dirs
    }

    fn accel(&self, arch: Arch) -> Result<Accel, Fault> {
        self.accel.get(arch_key(arch)).copied().ok_or_else(|| {
            Fault::unavailable(format!("site '{}' cannot run {arch} guests", self.name))
                .hint("see what is missing with: godwit doctor")
        })
    }

    /// The image of exactly that content, even when the name has moved on to a newer build.
    fn image_by_hash(&self, record: &MachineRecord) -> Result<Image, Fault> {
        let dir: PathBuf = self.images.dir().join("by-hash").join(record.image_hash.to_string());
        if !dir.is_dir() {
            return Err(Fault::conflict(format!(
                "site '{}' does not hold image '{}' with the hash {}",
                self.name, record.image, record.image_hash
            ))
            .hint(format!(
                "build it there: godwit image build {} --site {}; a newer build has another hash",
                record.image, self.name
            )));
        }
        let image = Image::open(&dir).map_err(|e| Fault::of(&e))?;
        if image.hash == record.image_hash {
            return Ok(image);
        }
        let words = format!("{} holds an image with another hash", dir.display());
        Err(Fault::new(Code::Damaged, words))
    }

    /// As [`LocalSite::image_by_hash`], its files verified.
    async fn sound_image(&self, record: &MachineRecord) -> Result<Image, Fault> {
        let (image, cache) = (self.image_by_hash(record)?, self.images.clone());
        tokio::task::spawn_blocking(move || cache.check(&image).map(|()| image))
            .await
            .map_err(|e| Fault::internal(e.to_string()))?
            .map_err(|e| Fault::of(&e))
    }

    async fn list_images(&self) -> Result<Vec<ImageInfo>, Fault> {
        let cache = self.images.clone();
        tokio::task::spawn_blocking(move || images_of(&cache))
            .await
            .map_err(|e| Fault::internal(e.to_string()))?
    }

    async fn build_image(&self, name: Name, call: Call) -> Result<ImageInfo, Fault> {
        let cancel = call.cancel.clone();
        let told = move |p: godwit_image::Progress| {
            call.progress(Progress {
                stage: p.stage.as_str().into(),
                done: p.fraction.map_or(0, |f| (f64::from(f) * 1000.0) as u64),
                total: if p.fraction.is_some() { 1000 } else { 0 },
                unit: "permille".into(),
                note: p.note,
            });
        };
        tokio::select! {
            // Dropping the build kills its tools and publishes nothing.
            () = cancel.cancelled() => Err(Fault::cancelled()),
            built = self.images.build(&name, told) => {
                built.map(|i| image_info(&i)).map_err(|e| Fault::of(&e))
            }
        }
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
        list.save(&self.dirs.revoked()).map_err(|e| Fault::of(&e))?;
        relays::publish_revoked(&self.dirs, &self.trust)
    }
}

/// The images of a cache: those that are built, those that are there and cannot be used, and the
/// other recipes.
///
/// # Errors
/// The cache cannot be read.
pub fn images_of(cache: &ImageCache) -> Result<Vec<ImageInfo>, Fault> {
    let built = cache.list().map_err(|e| Fault::of(&e))?;
    let mut out: Vec<_> = built.iter().map(image_info).collect();
    for (info, image) in out.iter_mut().zip(&built) {
        info.fault = match cache.damage(image) {
            Ok(path) => path.map(|path| format!("{} is damaged; build it again", path.display())),
            Err(e) => Some(godwit_types::chain(&e)),
        };
        info.built = info.fault.is_none();
    }
    for name in Recipe::names() {
        if out.iter().any(|i| i.name == name) {
            continue;
        }
        let Ok(r) = Recipe::get(&name) else { continue };
        let fault = match cache.get(&name) {
            Ok(_) | Err(godwit_image::ImageError::NotBuilt { .. }) => None,
            Err(e) => Some(godwit_types::chain(&e)),
        };
        out.push(ImageInfo {
            hash: r.hash(),
            name,
            arch: r.arch,
            memory: r.memory,
            vcpus: r.vcpus,
            bytes: 0,
            display: r.display,
            app: r.app.clone(),
            built: false,
            fault,
        });
    }
    Ok(out)
}

/// What is told of an image that is built.
#[must_use]
pub fn image_info(i: &Image) -> ImageInfo {
    ImageInfo {
        name: i.name.clone(),
        hash: i.hash,
        arch: i.arch,
        memory: i.memory,
        vcpus: i.vcpus,
        bytes: i.files().map(|f| f.bytes).sum(),
        display: i.display,
        app: i.app.clone(),
        built: true,
        fault: None,
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
            StreamRequest::SubstrateExport { id } => return self.export(id).await,
            StreamRequest::SubstrateSupply { id } => return Ok(self.supply(id)),
            StreamRequest::SubstrateTake { content } => return Ok(self.take(content, None)),
            StreamRequest::SubstrateTakeAmong(t) => {
                return Ok(self.take(t.content, Some(t.among)));
            }
            StreamRequest::SubstrateImport { name, content } => {
                // A file says of itself that it is public; the center's own copy is what it is.
                let not_public_as_it_was = content.is_none();
                return Ok(self.import(godwit_substrate::Becomes {
                    name,
                    content,
                    not_public_as_it_was,
                    ..Default::default()
                }));
            }
            StreamRequest::SubstrateUpload(t) => {
                return Ok(self.import(godwit_substrate::Becomes {
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
        let machine = self.qemu_for(vm, action).await?;
        let paths = machine.paths();
        let path = if display { &paths.vnc } else { &paths.console };
        let stream = UnixStream::connect(path).await.map_err(|e| {
            Fault::unavailable(format!("connecting to {} of the machine: {e}", path.display()))
        })?;
        Ok(Box::pin(screens::Shown::new(stream, place)))
    }
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
