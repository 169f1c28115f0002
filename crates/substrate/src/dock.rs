//! Docking by conversion: a running machine becomes a substrate.
//!
//! ```text
//! quiesce --> STOP, device state --> memory --> disk --> commit --> release
//!    |              |                   |        |         |           (QEMU ends, its memory
//!    +--------------+-------------------+--------+---------+            file is sealed)
//!                         any failure
//!                              v
//!            cont, NICs plugged again, user programs thawed: it runs on
//! ```
//!
//! The same way back is taken when the process that docked is gone: [`run_on`] needs nothing of it.
//!
//! While the guest comes to rest its memory is stored already, as far as that gets: of a page that
//! does not change until the STOP only the hash is computed again while the machine stands.
//!
//! The commit is the rename of the substrate's directory. Before it the machine can go on and
//! nothing of the substrate is left; after it the machine is ended.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use godwit_disk::FrozenChain;
use godwit_image::Image;
use godwit_qemu::{
    AgentSession, BlockInUse, DiskChain, Launch, Layer, Life, Machine, Manifest, MemorySource, Nic,
    NicBackend,
};
use godwit_store::{Effort, PageMap, UNIT, Writer, zero_hash};
use godwit_types::{
    BLOCK_SIZE, DockReport, Hash, Mib, Name, PAGE_SIZE, Phases, SubstrateId, SubstrateKind,
};
use rayon::prelude::*;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use tokio::task::JoinHandle;

use crate::agent::{
    AFTER_ACTIVATE, BEFORE_DOCK, CARD_KEPT, END_BEFORE_DOCK, KEEP_CARD, SHELL, run_script,
};
use crate::error::SubstrateError;
use crate::manifest::{FORMAT, MAX_STATE, Part, Shape, Sizes, Substrate, read_bounded};
use crate::memory::{SealedMemory, room};
use crate::pool::{Parts, Pool, held_bytes};
use crate::private::PrivateMemory;

/// How long the agent may take to answer at all before the machine counts as not dockable.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// How long the guest may take to come to rest, and to wake again.
const SCRIPT_WITHIN: Duration = Duration::from_secs(120);
/// Bytes of disk that the small files of a substrate may take.
const SMALL_FILES: u64 = 16 << 20;
/// Bytes of a running machine's memory stored in one go.
const WINDOW: u64 = 1 << 20;
/// Bytes of a stopped machine's memory stored before a request to stop is looked at.
const GO: u64 = 16 << 20;
/// Bytes of it that one thread copies at a time.
const COPIED: usize = 1 << 20;
/// The nice value of what stores them: the guest comes to rest first.
const AHEAD_NICE: i32 = 10;
/// Blocks put into the store in one go.
const BATCH: usize = 1024;

/// What a machine is to become.
#[derive(Debug, Clone)]
pub struct DockRequest {
    /// Id of the substrate.
    pub id: SubstrateId,
    /// Its name.
    pub name: Name,
    /// Who may use it.
    pub kind: SubstrateKind,
    /// Whose it is.
    pub owner: Name,
    /// The image that the machine stands on.
    pub image: Image,
    /// By which it is stopped on request.
    pub stop: DockStop,
}

/// Stops a docking on request, as long as that is before its commit. Clones are one.
#[derive(Debug, Clone, Default)]
pub struct DockStop(Arc<AtomicU8>);

impl DockStop {
    const WORKING: u8 = 0;
    const STOPPED: u8 = 1;
    const COMMITTED: u8 = 2;

    /// Wants it stopped; whether that came before its commit.
    pub fn stop(&self) -> bool {
        self.become_state(Self::STOPPED)
    }

    fn become_state(&self, state: u8) -> bool {
        let before =
            self.0.compare_exchange(Self::WORKING, state, Ordering::SeqCst, Ordering::SeqCst);
        before.is_ok() || before == Err(state)
    }

    fn check(&self) -> Result<(), SubstrateError> {
        match self.0.load(Ordering::SeqCst) {
            Self::STOPPED => Err(SubstrateError::Cancelled),
            _ => Ok(()),
        }
    }

    /// From here on it is not stopped any more.
    fn commit(&self) -> Result<(), SubstrateError> {
        match self.become_state(Self::COMMITTED) {
            true => Ok(()),
            false => Err(SubstrateError::Cancelled),
        }
    }
}

/// Converts `machine` into a substrate in `pool`. When this succeeds the machine has ended, its
/// memory file has become the substrate's sealed one, and its cow image may be removed. When it
/// fails the machine runs on and nothing is left in the pool. The work goes on to its end even
/// when the future is dropped.
///
/// Whoever may be killed meanwhile writes down before that the machine is being docked, as what,
/// and with which NICs. Afterwards it is a substrate if the pool has that; if not, [`run_on`] makes
/// it what it was.
///
/// # Errors
/// [`SubstrateError::NotRunningOn`] when it is to be called to run on again;
/// [`SubstrateError::Cancelled`], [`SubstrateError::AgentSilent`], [`SubstrateError::NoRoom`], [`SubstrateError::Exists`], and
/// what the machine, the disk and the store say.
pub async fn dock_convert(
    machine: &Machine,
    pool: &Pool,
    request: DockRequest,
) -> Result<(Substrate, DockReport), SubstrateError> {
    let (machine, pool) = (machine.clone(), pool.clone());
    tokio::spawn(async move { convert(&machine, &pool, request).await })
        .await
        .map_err(|_| SubstrateError::Worker("docking"))?
}

async fn convert(
    machine: &Machine,
    pool: &Pool,
    request: DockRequest,
) -> Result<(Substrate, DockReport), SubstrateError> {
    let mut phases = Phases::start();
    let launch = machine.launch();
    let mut plan = Plan::of(machine, &launch, pool, &request)?;
    let nics = launch.nics.clone();
    let mut agent = match machine.agent().connect("guest-exec", ANSWER_WITHIN).await {
        Ok(agent) => agent,
        Err(e) => {
            pool.undo(request.id);
            return Err(SubstrateError::AgentSilent(Box::new(e)));
        }
    };
    let ahead = Ahead::start(pool, &plan);
    let stop = request.stop.clone();
    let done = async {
        let rested = quiesce(machine, &nics, &mut agent).await;
        drop(agent);
        plan.substrate.nic_in = rested?;
        godwit_hold::at("dock.quiesced").await;
        stop.check()?;
        phases.end("quiesce");
        let stopped = phases.elapsed();
        ahead.enough();
        let blocks = plan.save(machine).await?;
        phases.end("device state");
        godwit_hold::at("dock.stopped").await;
        Ok::<_, SubstrateError>((phases, stopped, blocks))
    };
    let stopped = done.await;
    // Awaited in every case: what it has written is gone before anything is said to have failed.
    let writer = ahead.end().await;
    let done = async {
        let (phases, stopped, blocks) = stopped?;
        let (plan, pool, writer) = (plan.clone(), pool.clone(), writer?);
        let stop = request.stop.clone();
        let store = move || plan.store(&pool, writer, &blocks, phases, &stop);
        let docked = tokio::task::spawn_blocking(store)
            .await
            .map_err(|_| SubstrateError::Worker("docking"))??;
        Ok::<_, SubstrateError>((docked, stopped))
    };
    let result = done.await;
    let ((substrate, pages, mut phases), stopped) = match result {
        Ok(done) => done,
        Err(e) => {
            pool.undo(plan.substrate.id);
            return Err(match run_on(machine, &nics).await {
                Ok(()) => e,
                Err(source) => {
                    SubstrateError::NotRunningOn { why: Box::new(e), source: Box::new(source) }
                }
            });
        }
    };
    godwit_hold::at("dock.published").await;
    // Killed, not asked to quit: after its STOP it must not touch its memory any more.
    machine.kill().await;
    godwit_hold::at("dock.ended").await;
    if let MemorySource::Shared { path } = &launch.memory {
        // As an idle one's, it goes to where others have to give way; else it is laid out when it is
        // needed.
        let _room = pool.make_room(substrate.id, substrate.sizes.memory_bytes);
        let sealed = pool.memory_path(substrate.id);
        if !pool.memory_fits(substrate.id) {
            tracing::info!(id = %substrate.id, "memory file not taken over: it is over the budget");
        } else if let Err(error) = SealedMemory::hand_over(path, &pages, &sealed) {
            tracing::info!(%error, "memory file not taken over; it is laid out at the first activation");
        }
    }
    phases.end("release");
    let pause_ms = phases.elapsed().saturating_sub(stopped).as_secs_f64() * 1e3;
    let (phases, total_ms) = phases.finish();
    let report = DockReport {
        total_ms,
        pause_ms,
        device_state_bytes: substrate.state.bytes,
        raw_bytes: substrate.sizes.raw_bytes,
        stored_bytes: substrate.sizes.stored_bytes,
        phases,
    };
    Ok((substrate, report))
}

/// All that can be said before the machine is touched.
#[derive(Debug, Clone)]
struct Plan {
    /// As it will be, less the hashes and sizes of its parts.
    substrate: Substrate,
    memory: Held,
    disk: Option<(PathBuf, Vec<PathBuf>)>,
    /// Where QEMU saves its devices.
    state: PathBuf,
}

/// Where the memory of the machine is.
#[derive(Debug, Clone)]
enum Held {
    /// In a file of its own.
    File(PathBuf),
    /// In the machine, over that of its parent.
    Private(Arc<PrivateMemory>),
}

impl Plan {
    fn of(
        machine: &Machine,
        launch: &Launch,
        pool: &Pool,
        request: &DockRequest,
    ) -> Result<Self, SubstrateError> {
        let spec = &launch.spec;
        let unknown = Part { hash: zero_hash(), bytes: 0 };
        let substrate = Substrate {
            format: FORMAT,
            id: request.id,
            name: request.name.clone(),
            kind: request.kind,
            owner: request.owner.clone(),
            image: request.image.name.clone(),
            image_hash: request.image.hash,
            shape: Shape {
                arch: spec.arch,
                memory: spec.memory,
                vcpus: spec.vcpus,
                display: spec.display,
                disk: spec.disk,
                nic_ports: spec.nic_ports,
            },
            cmdline: spec.cmdline.clone(),
            machine: machine.manifest(),
            macs: launch.nics.iter().map(|n| (n.port, n.mac)).collect(),
            nic_in: None,
            agent: true,
            state: unknown,
            pages: unknown,
            disk: spec.disk.then_some(unknown),
            docked_unix_ms: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |d| d.as_millis() as u64),
            sizes: Sizes { raw_bytes: spec.memory.bytes(), ..Sizes::default() },
        };
        // The machine must be the one that this description and this image give again.
        let again = Manifest::of(&substrate.spec(&request.image)?, machine.version());
        substrate.fits(&again)?;
        pool.is_free(request.id, &request.name)?;
        pool.room_for(0)?;
        room(&pool.inner.dirs.substrates, SMALL_FILES, "a substrate")?;
        let disk = launch.disk.as_ref().map(|d| layers(d, &request.image)).transpose()?;
        let memory = match &launch.memory {
            MemorySource::Shared { path } => Held::File(path.clone()),
            MemorySource::PrivateOf { path } => {
                Held::Private(Arc::new(PrivateMemory::open(machine, pool, path, &substrate)?))
            }
        };
        let dir = pool.new_dir(request.id);
        std::fs::create_dir_all(&dir).map_err(SubstrateError::io("making", &dir))?;
        Ok(Self { substrate, memory, disk, state: dir.join(crate::manifest::STATE) })
    }

    /// Stops the machine and has its devices saved; gives the RAM blocks that QEMU has not saved.
    async fn save(&self, machine: &Machine) -> Result<Vec<BlockInUse>, SubstrateError> {
        let stopping = SubstrateError::machine;
        match &self.memory {
            Held::File(_) => {
                machine.save_state(&self.state).await.map_err(stopping("stopping"))?;
                Ok(Vec::new())
            }
            Held::Private(_) => {
                machine.save_devices(&self.state).await.map_err(stopping("stopping"))?;
                machine.ram_blocks().await.map_err(stopping("asking for its memory"))
            }
        }
    }

    /// Hashes and stores everything and commits.
    fn store(
        mut self,
        pool: &Pool,
        mut writer: Writer,
        blocks: &[BlockInUse],
        mut phases: Phases,
        stop: &DockStop,
    ) -> Result<(Substrate, PageMap, Phases), SubstrateError> {
        stop.check()?;
        writer.start_over();
        let (pages, state) = match &self.memory {
            Held::File(path) => {
                let memory = self.substrate.shape.memory;
                let pages = store_file(&mut writer, path, memory, stop)?;
                (pages, read_bounded(&self.state, MAX_STATE)?)
            }
            Held::Private(memory) => {
                let pages = memory.store(&mut writer, || stop.check().map(|()| true))?;
                let pages = pages.ok_or(SubstrateError::Cancelled)?;
                (pages, memory.state(&self.state, blocks)?)
            }
        };
        phases.end("memory");
        stop.check()?;
        let disk = match &self.disk {
            Some((base, layers)) => Some(store_disk(&mut writer, base, layers)?),
            None => None,
        };
        self.substrate.sizes.memory_bytes = held_bytes(&pages);
        self.substrate.sizes.disk_bytes = disk.as_ref().map_or(0, held_bytes);
        writer.forget_wrong_guesses();
        phases.end("disk");
        let parts =
            Parts { state, pages: pages.encode(), disk: disk.as_ref().map(PageMap::encode) };
        godwit_hold::at_blocking("dock.saved");
        stop.commit()?;
        let substrate = pool.publish(self.substrate, &parts, writer)?;
        phases.end("commit");
        Ok((substrate, pages, phases))
    }
}

/// Puts the memory of a machine that still runs into the store, so that only what changes until
/// its STOP has to be encoded and written while it stands. What is read torn, or changes, is a
/// wrong guess that the writer forgets.
struct Ahead {
    enough: Arc<AtomicBool>,
    work: JoinHandle<Result<Writer, SubstrateError>>,
}

impl Ahead {
    fn start(pool: &Pool, plan: &Plan) -> Self {
        let enough = Arc::new(AtomicBool::new(false));
        let (told, pool, owner) = (Arc::clone(&enough), pool.clone(), plan.substrate.id.into());
        let memory = plan.memory.clone();
        let work = tokio::task::spawn_blocking(move || {
            let mut writer = pool
                .store()
                .writer(owner, Effort::Fast)
                .map_err(SubstrateError::store("opening the store"))?;
            let polite = polite()?;
            match &memory {
                Held::File(path) => Self::put(&mut writer, path, &polite, &told)?,
                Held::Private(memory) => {
                    let go_on = || Ok(!told.load(Ordering::Relaxed));
                    let _ = polite.install(|| memory.store(&mut writer, go_on))?;
                }
            }
            Ok(writer)
        });
        Self { enough, work }
    }

    fn put(
        writer: &mut Writer,
        path: &Path,
        polite: &rayon::ThreadPool,
        enough: &AtomicBool,
    ) -> Result<(), SubstrateError> {
        let file = File::open(path).map_err(SubstrateError::io("opening the memory file", path))?;
        let io = SubstrateError::io;
        let len = file.metadata().map_err(io("reading", path))?.len();
        let mut buffer = vec![0; WINDOW as usize];
        let mut at = 0;
        while let Some((from, to)) = next_data(&file, at, len).map_err(io("seeking in", path))? {
            if enough.load(Ordering::Relaxed) {
                break;
            }
            // Copied out: the machine writes to the file while it is read.
            let part = &mut buffer[..(to - from).min(WINDOW) as usize];
            file.read_exact_at(part, from).map_err(io("reading", path))?;
            polite
                .install(|| writer.put_units(part))
                .map_err(SubstrateError::store("storing the memory"))?;
            at = from + part.len() as u64;
        }
        Ok(())
    }

    /// The machine is about to stop: from then on, what is stored is stored for good.
    fn enough(&self) {
        self.enough.store(true, Ordering::Relaxed);
    }

    /// Waits until the work has ended.
    async fn end(self) -> Result<Writer, SubstrateError> {
        self.enough();
        self.work.await.map_err(|_| SubstrateError::Worker("docking"))?
    }
}

/// Threads that leave the machine its processors while it comes to rest.
fn polite() -> Result<rayon::ThreadPool, SubstrateError> {
    let nice = |_| {
        // Of this thread alone. Without it the work is only less polite.
        let _ = rustix::process::setpriority_process(None, AHEAD_NICE);
    };
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get().div_ceil(2));
    rayon::ThreadPoolBuilder::new()
        .num_threads(cores)
        .start_handler(nice)
        .build()
        .map_err(|_| SubstrateError::Worker("storing the memory ahead"))
}

/// The base and the layers on it, the top image last. Refuses a machine whose disk is still
/// coming from elsewhere, or that stands on another base.
fn layers(chain: &DiskChain, image: &Image) -> Result<(PathBuf, Vec<PathBuf>), SubstrateError> {
    let refuse = |why: &str| SubstrateError::damaged("the machine's disk chain", why);
    let mut paths = Vec::new();
    let mut base = None;
    for l in &chain.layers {
        match &l.layer {
            Layer::Raw { path } if base.is_none() => base = Some(path.clone()),
            Layer::Qcow2 { path } if base.is_some() => paths.push(path.clone()),
            Layer::Nbd { .. } => return Err(refuse("it still reads from another site")),
            _ => return Err(refuse("it is not one base and layers on it")),
        }
    }
    paths.push(chain.top.clone());
    let base = base.ok_or_else(|| refuse("it has no base"))?;
    let id = |p: &Path| std::fs::metadata(p).map(|m| (m.dev(), m.ino())).ok();
    match image.disk_path() {
        Some(p) if id(&p).is_some() && id(&p) == id(&base) => Ok((base, paths)),
        _ => Err(refuse("its base is not the image's")),
    }
}

/// Brings the guest to rest and takes its NICs out, but for one that its interface can be taken down
/// of instead: to find a new one takes an emulated guest more than all else in an activation. Gives
/// the port of that one.
async fn quiesce(
    machine: &Machine,
    nics: &[Nic],
    agent: &mut AgentSession<'_>,
) -> Result<Option<u8>, SubstrateError> {
    // A TAP offers the guest more than a user network does.
    let may_stay = match nics {
        [nic] if !matches!(nic.backend, NicBackend::Tap(_)) => Some(nic.port),
        _ => None,
    };
    let env: Vec<String> = may_stay.iter().map(|_| KEEP_CARD.to_owned()).collect();
    let said = run_script(agent, BEFORE_DOCK, &[], &env, SCRIPT_WITHIN).await?;
    let inside = may_stay.filter(|_| said.lines().any(|l| l == CARD_KEPT));
    for nic in nics.iter().filter(|n| Some(n.port) != inside) {
        let unplugged = machine.unplug_nic(nic.port).await;
        unplugged.map_err(SubstrateError::machine("unplugging the NIC"))?;
    }
    Ok(inside)
}

/// Lets a machine run on whose docking broke off, at whatever step and in whichever process: its
/// vCPUs run, its NICs are there, its user programs are thawed. Called again it changes nothing.
///
/// # Errors
/// When QEMU or the guest does not do its part; what was done stays, and it may be called again.
pub async fn run_on(machine: &Machine, nics: &[Nic]) -> Result<(), SubstrateError> {
    const DOING: &str = "letting the machine run on";
    let run_on = SubstrateError::machine;
    let mut life = machine.life().await.map_err(run_on(DOING))?;
    if life == Life::Leaving {
        // A save that nobody waits for any more comes to its end by itself.
        let _ = machine.wait_life(DOING, Life::PostMigrate, SCRIPT_WITHIN).await;
        life = machine.life().await.map_err(run_on(DOING))?;
    }
    if life != Life::Running {
        machine.run().await.map_err(run_on(DOING))?;
    }
    for nic in nics {
        machine.replug_nic(nic.clone()).await.map_err(run_on("plugging the NIC again"))?;
    }
    let agent = machine.agent().connect("guest-exec", SCRIPT_WITHIN).await;
    let mut agent = agent.map_err(|e| run_on("talking to the guest")(e.into()))?;
    // What still brings the guest to rest would take from it again what it gets back here. A guest
    // without a shell has to do without.
    if let Err(error) = run_script(&mut agent, SHELL, &END_BEFORE_DOCK, &[], SCRIPT_WITHIN).await {
        tracing::debug!(%error, "not looked for what brings the guest to rest");
    }
    run_script(&mut agent, AFTER_ACTIVATE, &[], &[], SCRIPT_WITHIN).await.map(drop)
}

/// Puts the memory file of a stopped machine into the store, holes left out.
fn store_file(
    writer: &mut Writer,
    path: &Path,
    memory: Mib,
    stop: &DockStop,
) -> Result<PageMap, SubstrateError> {
    let file = File::open(path).map_err(SubstrateError::io("opening the memory file", path))?;
    let len = memory.bytes();
    let resized = |why: String| SubstrateError::damaged(path.display().to_string(), why);
    let sized = || match file.metadata().map_err(SubstrateError::io("reading", path))?.len() {
        found if found == len => Ok(()),
        found => Err(resized(format!("it has {found} bytes, the machine {len}"))),
    };
    sized()?;
    let mut pages = PageMap::new(len / PAGE_SIZE as u64);
    let mut buffer = vec![0; GO as usize];
    let mut at = 0;
    while let Some((from, to)) =
        next_data(&file, at, len).map_err(SubstrateError::io("seeking in", path))?
    {
        stop.check()?;
        // Copied out: its QEMU stands, but one that is not what it should be can cut the file, and
        // a mapping that is cut ends whoever reads it.
        let part = &mut buffer[..(to - from).min(GO) as usize];
        let pieces = part.par_chunks_mut(COPIED).enumerate();
        let read =
            pieces.try_for_each(|(i, piece)| file.read_exact_at(piece, from + (i * COPIED) as u64));
        read.map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => resized("it was cut while it was read".into()),
            _ => SubstrateError::io("reading", path)(e),
        })?;
        let hashes = writer.put_units(part).map_err(SubstrateError::store("storing the memory"))?;
        push(&mut pages, from / PAGE_SIZE as u64, &hashes, Zero::Left)?;
        at = from + part.len() as u64;
    }
    sized()?;
    Ok(pages)
}

/// The next stretch of data at or behind `at`, widened to whole pages.
pub(crate) fn next_data(file: &File, at: u64, len: u64) -> std::io::Result<Option<(u64, u64)>> {
    const PAGE: u64 = PAGE_SIZE as u64;
    if at >= len {
        return Ok(None);
    }
    let from = match rustix::fs::seek(file.as_fd(), SeekFrom::Data(at)) {
        Ok(n) => n / PAGE * PAGE,
        Err(Errno::NXIO) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let to = rustix::fs::seek(file.as_fd(), SeekFrom::Hole(from))?;
    Ok(Some((from, to.next_multiple_of(PAGE).min(len))))
}

/// Puts every block above the base into the store.
fn store_disk(
    writer: &mut Writer,
    base: &Path,
    layers: &[PathBuf],
) -> Result<PageMap, SubstrateError> {
    let disk = SubstrateError::disk;
    let chain = FrozenChain::open(base, layers).map_err(disk("opening the machine's disk"))?;
    let allocated = chain.allocation().map_err(disk("reading the machine's disk"))?;
    let mut map = PageMap::new(chain.blocks());
    let (mut numbers, mut bytes) = (Vec::new(), Vec::new());
    let mut flush = |numbers: &mut Vec<u64>, bytes: &mut Vec<u8>| {
        let hashes = writer.put_units(bytes).map_err(SubstrateError::store("storing the disk"))?;
        for (n, h) in numbers.drain(..).zip(hashes) {
            push(&mut map, n, &[h], Zero::Kept)?;
        }
        bytes.clear();
        Ok::<(), SubstrateError>(())
    };
    for block in chain.export(&allocated) {
        let (number, data) = block.map_err(disk("reading the machine's disk"))?;
        numbers.push(number);
        bytes.extend_from_slice(&data[..BLOCK_SIZE]);
        if numbers.len() == BATCH {
            flush(&mut numbers, &mut bytes)?;
        }
    }
    flush(&mut numbers, &mut bytes)?;
    Ok(map)
}

/// Whether zero units get an entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Zero {
    /// No: a page without an entry is zero.
    Left,
    /// Yes: a block without an entry shows the base.
    Kept,
}

pub(crate) fn push(
    map: &mut PageMap,
    first: u64,
    hashes: &[Hash],
    zero: Zero,
) -> Result<(), SubstrateError> {
    const { assert!(UNIT == PAGE_SIZE && UNIT == BLOCK_SIZE) };
    for (n, h) in (first..).zip(hashes) {
        if zero == Zero::Kept || *h != zero_hash() {
            map.push(n, *h).map_err(|source| SubstrateError::Pages {
                what: "the machine".to_owned(),
                source,
            })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use godwit_store::{Store, StoreOptions};
    use godwit_types::{Code, CodedError};

    use super::*;

    /// As a QEMU could do that its guest has taken over.
    #[test]
    fn a_memory_file_that_is_cut_or_grows_while_it_is_read_is_named_and_ends_nobody() {
        const SIZE: Mib = Mib(32);
        let dir = tempfile::tempdir().expect("dir");
        let options = StoreOptions { reserve_bytes: 1 << 20, ..StoreOptions::default() };
        let store = Store::open(&dir.path().join("store"), options).expect("store");
        let path = dir.path().join("ram");
        let bytes: Vec<u8> = (0..SIZE.bytes() / 8).flat_map(u64::to_le_bytes).collect();
        let read = || {
            let mut writer =
                store.writer(SubstrateId::new().into(), Effort::Fast).expect("a writer");
            store_file(&mut writer, &path, SIZE, &DockStop::default())
        };
        std::fs::write(&path, &bytes).expect("written");
        assert_eq!(read().expect("whole").entries().len(), bytes.len() / PAGE_SIZE);

        let file = File::options().write(true).open(&path).expect("opened");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for size in [SIZE.bytes() / 2, SIZE.bytes() * 2, 0].into_iter().cycle() {
                    if done.load(Ordering::Relaxed) {
                        return;
                    }
                    file.set_len(size).expect("cut");
                    std::thread::yield_now();
                    file.set_len(SIZE.bytes()).expect("grown again");
                    file.write_all_at(&bytes, 0).expect("filled");
                }
            });
            let mut refused = 0;
            for _ in 0..500 {
                let Err(e) = read() else { continue };
                assert!(matches!(e.code(), Code::Damaged | Code::Internal), "{e}");
                assert!(e.to_string().contains("ram"), "{e}");
                refused += usize::from(e.code() == Code::Damaged);
                if refused == 5 {
                    break;
                }
            }
            done.store(true, Ordering::Relaxed);
            assert_eq!(refused, 5, "it was never seen");
        });
    }
}
