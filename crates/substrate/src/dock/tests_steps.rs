use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use godwit_qemu::{BootFile, MacAddress, MachineSpec, Manifest, NicBackend};
use godwit_store::{Store, StoreOptions};
use godwit_types::{Arch, Code, CodedError, Hash, Mib, Name, PAGE_SIZE, SubstrateKind};

use super::super::plan::Held;
use super::*;
use crate::manifest::{FORMAT, Part, Shape, Sizes};
use crate::pool::PoolDirs;

const MEMORY: Mib = Mib(32);
const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);

/// What a docking asks of a machine, in order.
type Asked = Arc<Mutex<Vec<&'static str>>>;

/// A machine that does what it is asked, but for one thing.
#[derive(Clone)]
struct Fake {
    asked: Asked,
    refuses: &'static str,
    state: PathBuf,
}

impl Fake {
    fn is_asked(&self, what: &'static str) -> Result<(), SubstrateError> {
        self.asked.lock().expect("asked").push(what);
        if self.refuses == what { Err(SubstrateError::Worker(what)) } else { Ok(()) }
    }
}

impl Subject for Fake {
    async fn rest(
        &self,
        _: &[Nic],
        _: SubstrateKind,
        listens: impl FnOnce() + Send,
    ) -> Result<Option<u8>, SubstrateError> {
        if self.refuses == "listen" {
            return Err(SubstrateError::Worker("listen"));
        }
        listens();
        self.is_asked("rest").map(|()| Some(0))
    }

    async fn save(&self, _: &Plan) -> Result<Vec<BlockInUse>, SubstrateError> {
        self.is_asked("save")?;
        std::fs::write(&self.state, b"device state").expect("saved");
        Ok(Vec::new())
    }

    async fn run_on(&self, nics: &[Nic]) -> Result<(), SubstrateError> {
        assert_eq!(nics.len(), 1, "its NIC is given back");
        self.is_asked("run on")
    }

    async fn kill(&self) {
        self.asked.lock().expect("asked").push("kill");
    }
}

struct Place {
    dir: tempfile::TempDir,
    pool: Pool,
    asked: Asked,
    stop: DockStop,
}

impl Place {
    fn new(limit_bytes: u64) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let options =
            StoreOptions { reserve_bytes: 0, memory_limit_bytes: 0, ..StoreOptions::default() };
        let store = Store::open(&dir.path().join("store"), options).expect("store");
        let dirs = PoolDirs {
            substrates: dir.path().join("substrates"),
            memory: dir.path().join("memory"),
        };
        let pool = Pool::open(dirs, store, limit_bytes).expect("pool");
        Self { dir, pool, asked: Asked::default(), stop: DockStop::default() }
    }

    fn memory(&self) -> PathBuf {
        self.dir.path().join("ram")
    }

    /// A docking of a machine of 32 MiB with some pages in it, which refuses one thing.
    fn planned(&self, refuses: &'static str) -> Docking<Fake, Planned> {
        self.asked.lock().expect("asked").clear();
        let ram = std::fs::File::create(self.memory()).expect("memory");
        ram.set_len(MEMORY.bytes()).expect("sized");
        for n in 0..40u8 {
            ram.write_all_at(&[n + 1; 16], u64::from(n) * PAGE_SIZE as u64).expect("filled");
        }
        let plan = plan(&self.pool, &self.memory());
        let machine = Fake { asked: Arc::clone(&self.asked), refuses, state: plan.state.clone() };
        let nics = vec![Nic { port: 0, mac: MAC, backend: NicBackend::Isolated }];
        let how = (self.stop.clone(), Phases::start());
        Docking::planned(machine, self.pool.clone(), nics, plan, how)
    }

    fn asked(&self) -> Vec<&'static str> {
        self.asked.lock().expect("asked").clone()
    }

    /// Nothing of a docking is left but the machine's own.
    fn nothing_left(&self, case: &str) {
        assert!(self.pool.list().expect("list").is_empty(), "{case}");
        let left = std::fs::read_dir(self.dir.path().join("substrates")).expect("dir").count();
        assert_eq!(left, 0, "{case}: a directory is left");
        let _ = self.pool.store().gc().expect("collected");
        assert_eq!(self.pool.store().stats().expect("stats").units, 0, "{case}: units are left");
        assert!(self.memory().exists(), "{case}: the machine's memory is gone");
    }
}

fn plan(pool: &Pool, memory: &Path) -> Plan {
    let file = BootFile { path: "/none".into(), hash: Hash::of(b"kernel") };
    let shape = Shape {
        arch: Arch::X86_64,
        memory: MEMORY,
        vcpus: 1,
        display: false,
        disk: false,
        nic_ports: 1,
    };
    let spec = MachineSpec {
        arch: shape.arch,
        memory: shape.memory,
        vcpus: 1,
        kernel: file,
        initrd: None,
        cmdline: "quiet".into(),
        display: false,
        disk: false,
        nic_ports: 1,
    };
    let unknown = Part { hash: Hash::of(b""), bytes: 0 };
    let id = SubstrateId::new();
    let name = |s| Name::new(s).expect("name");
    let substrate = Substrate {
        generalised: false,
        format: FORMAT,
        id,
        name: name("s"),
        kind: SubstrateKind::Private,
        owner: name("operator"),
        image: name("tiny"),
        image_hash: Hash::of(b"image"),
        shape,
        cmdline: "quiet".into(),
        machine: Manifest::of(&spec, "10.0.2"),
        macs: vec![(0, MAC)],
        nic_in: None,
        agent: true,
        state: unknown,
        pages: unknown,
        disk: None,
        docked_unix_ms: 1,
        sizes: Sizes { raw_bytes: MEMORY.bytes(), ..Sizes::default() },
    };
    let dir = pool.new_dir(id);
    std::fs::create_dir_all(&dir).expect("dir");
    let state = dir.join(crate::manifest::STATE);
    Plan { substrate, memory: Held::File(memory.to_owned()), disk: None, state }
}

async fn dock(planned: Docking<Fake, Planned>) -> Result<Substrate, SubstrateError> {
    let published = planned.quiesce().await?.stop().await?.store().await?.publish().await?;
    Ok(published.end().await.0)
}

#[tokio::test]
async fn whatever_step_fails_the_machine_is_given_back_what_was_taken_from_it_once() {
    let place = Place::new(1 << 30);
    for (refuses, asked) in [
        // A guest that does not listen was not touched.
        ("listen", &[][..]),
        ("rest", &["rest", "run on"]),
        ("save", &["rest", "save", "run on"]),
    ] {
        let error = dock(place.planned(refuses)).await.expect_err(refuses);
        assert!(matches!(error, SubstrateError::Worker(w) if w == refuses), "{error}");
        assert_eq!(place.asked(), asked, "{refuses}");
        place.nothing_left(refuses);
    }

    // Its memory file is not what it was.
    let stopped = place.planned("").quiesce().await.expect("at rest");
    let stopped = stopped.stop().await.expect("stopped");
    std::fs::write(place.memory(), b"cut").expect("cut");
    let error = stopped.store().await.err().expect("cut");
    assert_eq!(error.code(), Code::Damaged, "{error}");
    assert_eq!(place.asked(), ["rest", "save", "run on"]);
    place.nothing_left("store");

    // There is no room for it.
    let full = Place::new(1);
    let error = dock(full.planned("")).await.expect_err("full");
    assert_eq!(error.code(), Code::NoRoom, "{error}");
    assert_eq!(full.asked(), ["rest", "save", "run on"]);
    full.nothing_left("publish");

    // None of these is in the way of the next.
    let substrate = dock(place.planned("")).await.expect("docked");
    assert_eq!(place.asked(), ["rest", "save", "kill"]);
    assert_eq!((substrate.nic_in, substrate.sizes.memory_bytes), (Some(0), 40 * 4096));
    assert_eq!(place.pool.list().expect("list").len(), 1);
}

#[tokio::test]
async fn a_docking_is_stopped_on_request_before_its_commit_and_not_behind_it() {
    let place = Place::new(1 << 30);
    assert!(place.stop.stop());
    let error = place.planned("").quiesce().await.err().expect("stopped");
    assert!(matches!(error, SubstrateError::Cancelled), "{error}");
    assert_eq!(place.asked(), ["rest", "run on"]);
    place.nothing_left("quiesced");

    let place = Place::new(1 << 30);
    let stored = async { place.planned("").quiesce().await?.stop().await?.store().await };
    let stored = stored.await.expect("stored");
    assert!(place.stop.stop());
    let error = stored.publish().await.err().expect("stopped");
    assert!(matches!(error, SubstrateError::Cancelled), "{error}");
    assert_eq!(place.asked(), ["rest", "save", "run on"]);
    place.nothing_left("stored");

    let place = Place::new(1 << 30);
    let stored = async { place.planned("").quiesce().await?.stop().await?.store().await };
    let published = stored.await.expect("stored").publish().await.expect("published");
    assert!(!place.stop.stop());
    assert_eq!(place.asked(), ["rest", "save"], "what becomes of it now is the next step's");
    let (substrate, report) = published.end().await;
    assert_eq!(place.pool.get(substrate.id).expect("there").id, substrate.id);
    let phases: Vec<_> = report.phases.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(phases, ["quiesce", "device state", "memory", "disk", "commit", "release"]);
}

#[tokio::test]
async fn a_machine_that_does_not_run_on_is_reported() {
    let place = Place::new(1 << 30);
    // Undone by whoever holds it, at any step.
    let stopped = async { place.planned("run on").quiesce().await?.stop().await };
    let stopped = stopped.await.expect("stopped");
    let error = stopped.undo(SubstrateError::Cancelled).await;
    let SubstrateError::NotRunningOn { why, .. } = &error else { panic!("{error}") };
    assert!(matches!(**why, SubstrateError::Cancelled), "{why}");
    place.nothing_left("not running on");
}
