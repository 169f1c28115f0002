//! What is docked, from where, and how it comes into the store.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use godwit_disk::FrozenChain;
use godwit_image::Image;
use godwit_qemu::{BlockInUse, DiskChain, Launch, Layer, Machine, Manifest, MemorySource};
use godwit_store::{Effort, PageMap, UNIT, Writer, zero_hash};
use godwit_types::{BLOCK_SIZE, Hash, Mib, PAGE_SIZE, SubstrateId, SubstrateKind};
use rayon::prelude::*;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use tokio::task::JoinHandle;

use super::{DockRequest, DockStop};
use crate::error::SubstrateError;
use crate::manifest::{FORMAT, MAX_STATE, Part, Shape, Sizes, Substrate, read_bounded};
use crate::memory::room;
use crate::pool::{Parts, Pool, held_bytes};
use crate::private::PrivateMemory;

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

/// All that can be said before the machine is touched.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// As it will be, less the hashes and sizes of its parts.
    pub(super) substrate: Substrate,
    pub(super) memory: Held,
    pub(super) disk: Option<(PathBuf, Vec<PathBuf>)>,
    /// Where QEMU saves its devices.
    pub(super) state: PathBuf,
}

/// Where the memory of the machine is.
#[derive(Debug, Clone)]
pub(super) enum Held {
    /// In a file of its own.
    File(PathBuf),
    /// In the machine, over that of its parent.
    Private(Arc<PrivateMemory>),
}

impl Plan {
    pub(super) fn of(
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
            generalised: request.kind == SubstrateKind::Public,
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

    /// The substrate that it becomes.
    pub(super) const fn id(&self) -> SubstrateId {
        self.substrate.id
    }

    /// The NIC in that port stays in the machine.
    pub(super) const fn nic_stays(&mut self, port: Option<u8>) {
        self.substrate.nic_in = port;
    }

    /// The file of its memory, if that is its own.
    pub(super) fn own_memory(&self) -> Option<PathBuf> {
        match &self.memory {
            Held::File(path) => Some(path.clone()),
            Held::Private(_) => None,
        }
    }

    /// Stops the machine and has its devices saved; gives the RAM blocks that QEMU has not saved.
    pub(super) async fn save(&self, machine: &Machine) -> Result<Vec<BlockInUse>, SubstrateError> {
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

    /// Hashes everything and stores what is not there yet; tells when it had the memory.
    pub(super) fn store(
        mut self,
        writer: &mut Writer,
        blocks: &[BlockInUse],
        stop: &DockStop,
    ) -> Result<(StoredParts, Instant), SubstrateError> {
        stop.check()?;
        writer.start_over();
        let (pages, state) = match &self.memory {
            Held::File(path) => {
                let memory = self.substrate.shape.memory;
                let pages = store_file(writer, path, memory, stop)?;
                (pages, read_bounded(&self.state, MAX_STATE)?)
            }
            Held::Private(memory) => {
                let pages = memory.store(writer, || stop.check().map(|()| true))?;
                let pages = pages.ok_or(SubstrateError::Cancelled)?;
                (pages, memory.state(&self.state, blocks)?)
            }
        };
        let memory_at = Instant::now();
        stop.check()?;
        let disk = match &self.disk {
            Some((base, layers)) => Some(store_disk(writer, base, layers)?),
            None => None,
        };
        self.substrate.sizes.memory_bytes = held_bytes(&pages);
        self.substrate.sizes.disk_bytes = disk.as_ref().map_or(0, held_bytes);
        writer.forget_wrong_guesses();
        let parts =
            Parts { state, pages: pages.encode(), disk: disk.as_ref().map(PageMap::encode) };
        Ok((StoredParts { substrate: self.substrate, pages, parts }, memory_at))
    }
}

/// A substrate whose units are all in the store.
pub(super) struct StoredParts {
    pub(super) substrate: Substrate,
    pub(super) pages: PageMap,
    pub(super) parts: Parts,
}

/// Puts the memory of a machine that still runs into the store, so that only what changes until
/// its STOP has to be encoded and written while it stands. What is read torn, or changes, is a
/// wrong guess that the writer forgets.
pub(super) struct Ahead {
    enough: Arc<AtomicBool>,
    work: JoinHandle<Result<Writer, SubstrateError>>,
}

impl Ahead {
    pub(super) fn start(pool: &Pool, plan: &Plan) -> Self {
        let enough = Arc::new(AtomicBool::new(false));
        let (stop, pool, owner) = (Arc::clone(&enough), pool.clone(), plan.substrate.id.into());
        let memory = plan.memory.clone();
        let work = tokio::task::spawn_blocking(move || {
            let mut writer = pool
                .store()
                .writer(owner, Effort::Fast)
                .map_err(SubstrateError::store("opening the store"))?;
            let polite = polite()?;
            match &memory {
                Held::File(path) => Self::put(&mut writer, path, &polite, &stop)?,
                Held::Private(memory) => {
                    let go_on = || Ok(!stop.load(Ordering::Relaxed));
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
    pub(super) fn enough(&self) {
        self.enough.store(true, Ordering::Relaxed);
    }

    /// Waits until the work has ended.
    pub(super) async fn end(self) -> Result<Writer, SubstrateError> {
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
enum Zero {
    /// No: a page without an entry is zero.
    Left,
    /// Yes: a block without an entry shows the base.
    Kept,
}

fn push(map: &mut PageMap, first: u64, hashes: &[Hash], zero: Zero) -> Result<(), SubstrateError> {
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
